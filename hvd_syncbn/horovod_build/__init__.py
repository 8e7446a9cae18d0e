"""Builds Horovod for the frameworks of this Python: ``hvd-syncbn build-horovod``.

Horovod 0.28.1, its last release, does not compile against today's PyTorch and TensorFlow, and fails where a job has to survive.
With the changes in ``patches/`` (see patching.py) and one CMake setting it does not. The rules of this room:

* It runs before anything of ours is built (``python -m hvd_syncbn.horovod_build``), so it imports the standard
  library and rich, nothing else; rich where it is used, so that a missing one is named like any other tool. Frameworks and what
  the system has (system.py) are looked at, never imported.
* One wheel for each combination of everything that decides the binary. All environments of a user share the cache,
  so a second checkout installs in seconds what the first one built in minutes.
* A build that fails says what the compiler said first, and where the log is.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from hvd_syncbn.horovod_build.patching import BuildError, apply, patches
from hvd_syncbn.horovod_build.system import (
    cuda_frameworks,
    find_compiler,
    find_cuda,
    find_mpi,
    find_nccl,
    framework_versions,
)

if TYPE_CHECKING:
    from rich.console import Console

HOROVOD_VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

# Horovod reads more HOROVOD_* variables when it runs than when it is built. These are the build's.
_BUILD_VARIABLE = re.compile(
    r"HOROVOD_(GPU(_.+)?|CPU_OPERATIONS|(NCCL|NVTX|CUDA|ROCM|BUILD)_.+|ALLOW_MIXED_GPU_IMPL|CMAKE|DEBUG)"
)
# Folders of them: where things lie does not change the binary, their versions do.
_PLACE = re.compile(r"HOROVOD_(NCCL|CUDA)_(HOME|INCLUDE|LIB)")
_PARTS = ("PYTORCH", "TENSORFLOW", "MXNET", "MPI", "GLOO")
_TOOLS = ("rich", "setuptools", "wheel", "packaging")
_STEP = re.compile(r"^\s*\[\s*(\d+)%\] (.+)$")
_PLAIN_PROGRESS_S = 15.0
_GIB_PER_COMPILER = 2

# The most telling first: a compiler's message may come after lines that only mention errors.
_ERROR_LINES = (
    re.compile(r"(: (fatal )?error: )|(^\s*nvcc fatal)"),
    re.compile(r"CMake Error"),
    re.compile(r"undefined reference|ld returned"),
    re.compile(r"\berror:", re.IGNORECASE),
)


# ---------------------------------------------------------------------------------------------------------------
# What is here


def cache_root() -> Path:
    """Return the folder that keeps Horovod's source and the wheels built from it."""
    own = os.environ.get("HVD_SYNCBN_CACHE")
    if own:
        return Path(own).expanduser() / "horovod"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hvd-syncbn" / "horovod"


def check() -> list[str]:
    """Return what is wrong with the installed Horovod, one sentence each; nothing if it fits the frameworks."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return ["Horovod is not installed."]
    try:
        built_for = json.loads(Path(spec.origin).with_name("metadata.json").read_text())
    except (OSError, ValueError):
        return ["The installed Horovod was built without native libraries."]
    problems = []
    for name, key in (("torch", "pytorch"), ("tensorflow", "tensorflow")):
        here = framework_versions().get(name)
        there = built_for.get(key)
        if here is None:
            continue
        if there is None:
            problems.append(f"Horovod was built without {name}, and {name} {here} is installed.")
        elif there.replace("-", "") != here.replace("-", ""):  # 2.22.0-rc1 calls itself 2.22.0rc1 as a package
            problems.append(f"Horovod was built for {name} {there}, and {name} {here} is installed.")
    return problems


# ---------------------------------------------------------------------------------------------------------------
# What decides the binary


class Plan(NamedTuple):
    """What is built: Horovod's build variables, the versions of the system's parts in it, and what to tell about the choice."""

    settings: dict[str, str]
    system: dict[str, str]
    notes: list[str]


def make_plan(versions: Mapping[str, str], environ: Mapping[str, str], *, mpi: bool = False, nccl: bool | None = None) -> Plan:
    """Choose what to build for: our choice, then the caller's own HOROVOD_* variables, then the options.

    GPU collectives go through NCCL where every framework is a build for CUDA, and a CUDA toolkit and NCCL are found. MPI is
    not taken along unasked: `horovodrun` would then run over it, and elastic jobs, a second `hvd.init()` in a process without
    a launcher, and more ranks than cores do not go well with it.

    Args:
        versions: The frameworks.
        environ: The environment.
        mpi: Whether to build with MPI.
        nccl: Whether to run GPU collectives through NCCL; None where it can be.

    Raises:
        BuildError: what an option asks for is missing.
    """
    system = {"compiler": find_compiler(environ)}
    notes = []
    wanted = {
        "PYTORCH": "torch" in versions,
        "TENSORFLOW": "tensorflow" in versions,
        "MXNET": False,
        "MPI": False,
        "GLOO": True,
    }
    here = find_mpi(environ)
    if mpi and here is None:
        raise BuildError(
            "No mpicxx in the path, so MPI cannot be built in. Install one: apt-get install openmpi-bin libopenmpi-dev"
        )
    for part in _PARTS:
        if environ.get(f"HOROVOD_WITH_{part}") == "1":
            wanted[part] = True
        elif environ.get(f"HOROVOD_WITHOUT_{part}") == "1":
            wanted[part] = False
    wanted["MPI"] |= mpi
    if wanted["MPI"] and here is not None:
        system["MPI"] = here.version
        notes.append(f"with MPI: {here.version} ({here.home})")
    settings = {f"HOROVOD_{'WITH' if wanted[part] else 'WITHOUT'}_{part}": "1" for part in _PARTS}
    settings |= {name: value for name, value in environ.items() if _BUILD_VARIABLE.fullmatch(name)}
    plan = Plan(settings, system, notes)
    _plan_gpu(plan, versions, environ, nccl)
    return plan


def _plan_gpu(plan: Plan, versions: Mapping[str, str], environ: Mapping[str, str], nccl: bool | None) -> None:
    """Add to a plan what GPUs need."""
    gpus = cuda_frameworks()
    plain = [f"{name} {version}" for name, version in versions.items() if name not in gpus]
    own = [value for name, value in plan.settings.items() if name.startswith("HOROVOD_GPU_")]
    asked = nccl or "NCCL" in own
    if not asked and not gpus:
        return
    cuda = find_cuda(environ)
    if cuda is not None:
        # Also without collectives on the GPU: Horovod then reads tensors that lie there, and asks PyTorch where CUDA is.
        plan.system["CUDA"] = cuda.version
        plan.settings["HOROVOD_CUDA_HOME"] = str(cuda.home)
    if own and not asked:  # the caller's GPU collectives go another way
        return
    library = find_nccl(environ, cuda)
    problem = None
    if plain:
        problem = f"{' and '.join(plain)} is no build for CUDA, and Horovod's GPU collectives need all frameworks to be"
    elif cuda is None:
        problem = "no CUDA toolkit was found; install one that has nvcc, or set CUDA_HOME to it"
    elif library is None:
        cu = cuda.version.partition(".")[0]
        problem = f"NCCL's header was not found; {sys.executable} -m pip install nvidia-nccl-cu{cu}, or set HOROVOD_NCCL_HOME"
    if nccl is False or (problem is not None and not asked):
        why = "as asked" if nccl is False else problem
        plan.notes.append(f"without NCCL, so packets of GPU tensors go through host memory: {why}")
    elif problem is not None:
        raise BuildError(f"GPU collectives through NCCL cannot be built: {problem}.")
    elif cuda is not None and library is not None:
        plan.system["NCCL"] = library.version
        plan.settings.setdefault("HOROVOD_NCCL_HOME", str(library.home))
        if nccl or not own:
            plan.settings["HOROVOD_GPU_OPERATIONS"] = "NCCL"
        plan.notes.append(f"with NCCL {library.version} ({library.home}) and CUDA {cuda.version} ({cuda.home})")


def cache_key(versions: Mapping[str, str], plan: Plan) -> str:
    """Return the name of the cache folder: readable, then a hash over everything that decides the binary."""
    python = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    ingredients = {
        "horovod": HOROVOD_VERSION,
        "source": SDIST_SHA256,
        "patches": [patch.diff for patch in patches()],
        "frameworks": dict(versions),
        "python": python,
        "libc": platform.libc_ver(),
        "system": plan.system,
        "settings": {name: value for name, value in plan.settings.items() if not _PLACE.fullmatch(name)},
    }
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    names = "-".join(f"{name}{version}" for name, version in versions.items())
    return f"{HOROVOD_VERSION}-{names}-{python}-{digest[:12]}"


def check_tools(environ: Mapping[str, str]) -> None:
    """Raise if something the build needs is missing, before minutes are spent on finding out."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise BuildError(f"Python's headers are missing ({header}). Install them: apt-get install python3-dev")
    if not shutil.which("patch", path=environ.get("PATH")):
        raise BuildError("patch is missing. Install it: apt-get install patch")
    if not shutil.which("ninja", path=environ.get("PATH")):
        raise BuildError(f"Ninja is missing. Install it: {sys.executable} -m pip install ninja")
    if not environ.get("HOROVOD_CMAKE") and not shutil.which("cmake", path=environ.get("PATH")):
        raise BuildError(f"CMake is missing. Install it: {sys.executable} -m pip install cmake")
    if importlib.util.find_spec("pip") is None:
        raise BuildError(f"{sys.executable} has no pip. Install it: {sys.executable} -m ensurepip")


def check_packages() -> None:
    """Raise if a Python package that the builder needs is missing; rich is one of them, so this comes first."""
    missing = [name for name in _TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise BuildError(f"Horovod's build needs {names}. Install: {sys.executable} -m pip install {names}")


def build_jobs() -> int:
    """Return how many compilers to run at once: one per CPU, as long as the memory lasts."""
    cpus = len(os.sched_getaffinity(0))
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    return max(1, min(cpus, gib // _GIB_PER_COMPILER))


def build_environment(settings: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the build."""
    # An outer make's MAKEFLAGS name a job server that this make cannot reach. Horovod's setup.py imports what is beside it.
    dropped = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHONSAFEPATH"}
    env = {k: v for k, v in environ.items() if not k.startswith("HOROVOD_") and k not in dropped}
    jobs = build_jobs()
    if "HOROVOD_CUDA_HOME" in settings:
        # PyTorch and CMake otherwise guess the toolkit from where nvcc is, which may be a script elsewhere.
        home = settings["HOROVOD_CUDA_HOME"]
        env |= {"CUDA_HOME": home, "CUDAToolkit_ROOT": home, "CUDACXX": f"{home}/bin/nvcc"}
        env["PATH"] = os.pathsep.join([f"{home}/bin", env.get("PATH", "")])
    return {
        **env,
        **settings,
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "CMAKE_GENERATOR": "Ninja",
        "NINJA_STATUS": "[%p] ",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        # Horovod asks TensorFlow for its paths in a process of its own, which logs to the same place.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


# ---------------------------------------------------------------------------------------------------------------
# The source


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify_sdist(path: Path) -> None:
    """Raise if `path` is not the Horovod source our patches were written for."""
    found = sha256_of(path)
    if found != SDIST_SHA256:
        raise BuildError(f"{path} is not Horovod {HOROVOD_VERSION} as released: SHA-256 {found}, not {SDIST_SHA256}.")


def fetch_sdist(folder: Path, env: Mapping[str, str]) -> Path:
    """Return Horovod's verified source archive in `folder`, downloaded through pip unless it is there."""
    archive = folder / f"horovod-{HOROVOD_VERSION}.tar.gz"
    if archive.exists() and sha256_of(archive) == SDIST_SHA256:
        return archive
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", temporary, f"horovod=={HOROVOD_VERSION}"]
        result = subprocess.run(command, env=dict(env), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        downloaded = Path(temporary, archive.name)
        if result.returncode or not downloaded.exists():
            said = "\n".join(first_error((result.stderr or result.stdout).splitlines()))
            raise BuildError(f"pip could not download Horovod {HOROVOD_VERSION}:\n{said}")
        verify_sdist(downloaded)
        downloaded.replace(archive)
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack Horovod's source archive into `folder` and return the source's root."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"horovod-{HOROVOD_VERSION}"


# ---------------------------------------------------------------------------------------------------------------
# The build


def first_error(lines: Sequence[str], before: int = 2, after: int = 5) -> list[str]:
    """Return the first error of a build's log with the lines around it, or the log's end if there is none."""
    for pattern in _ERROR_LINES:
        for index, line in enumerate(lines):
            if pattern.search(line):
                return [text.rstrip()[:200] for text in lines[max(0, index - before) : index + 1 + after]]
    return [text.rstrip()[:200] for text in lines[-10:]]


def parse_step(line: str) -> tuple[int, str] | None:
    """Return (percent, what is made) from a line of Ninja's output, if it is a progress line."""
    match = _STEP.match(line)
    if match is None:
        return None
    return int(match[1]), match[2].split()[-1].rpartition("/")[2].removesuffix(".o")


@contextlib.contextmanager
def show_progress(console: Console, title: str) -> Iterator[Callable[[int, str], None]]:
    """Show that something goes on: a live bar on a terminal, elsewhere a line now and then."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn(title), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
            task = progress.add_task("configuring", total=100)
            yield lambda percent, step: progress.update(task, completed=percent, description=step)
        return

    start = time.monotonic()
    latest = (0, "configuring")
    done = threading.Event()

    def report(percent: int, step: str) -> None:
        nonlocal latest
        latest = (percent, step)

    def beat() -> None:
        while not done.wait(_PLAIN_PROGRESS_S):
            percent, step = latest
            print(f"{title}: {time.monotonic() - start:.0f} s, {percent} %, {step}", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        done.set()
        thread.join()


def run_logged(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: TextIO, report: Callable[[int, str], None]
) -> int:
    """Run a command in a process group of its own, its output into `log`; if we are stopped, so is the whole group."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.write(line)
            step = parse_step(line)
            if step is not None:
                report(*step)
        return process.wait()
    except BaseException:
        _end_group(process)
        raise


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a process and its descendants, asking first: Ninja then removes what is half written."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, request)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


@contextlib.contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    """Hold a lock file, waiting for another build that has it; the system frees it whatever way we end."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Another build of the same Horovod is running; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(folder: Path, archive: Path, env: Mapping[str, str], console: Console) -> Path:
    """Build the wheel in a temporary folder and move it into `folder` when it is whole."""
    log_path = folder / "build.log"
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as temporary:
        source = unpack(archive, Path(temporary))
        apply(source, patches())
        wheels = Path(temporary, "wheels")
        command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-build-isolation", "--no-deps"]
        command += ["--wheel-dir", str(wheels), str(source)]
        with log_path.open("w") as log, show_progress(console, f"Horovod {HOROVOD_VERSION}") as report:
            status = run_logged(command, cwd=source, env=env, log=log, report=report)
        if status:
            said = "\n".join(first_error(log_path.read_text().splitlines()))
            raise BuildError(f"Horovod did not build. The first error:\n\n{said}\n\nThe full log: {log_path}")
        (built,) = wheels.glob("horovod-*.whl")
        # The temporary folder may be on another file system, where a move is not atomic.
        staged = folder / f".{built.name}.new"
        shutil.copyfile(built, staged)
        return staged.replace(folder / built.name)


def build(*, mpi: bool = False, nccl: bool | None = None, install: bool = True) -> Path:
    """Build Horovod for the frameworks of this Python, or take it from the cache, and install it.

    Args:
        mpi: Build the MPI operations, too; needs an MPI with its headers.
        nccl: Run GPU collectives through NCCL; needs CUDA and NCCL with its headers. None: where both are found and every
            framework is a build for CUDA.
        install: Install the wheel into this Python.

    Returns:
        The wheel's path in the cache.

    Raises:
        BuildError: Something is missing, or the build failed.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    versions = framework_versions()
    if not versions:
        raise BuildError(
            f"Neither PyTorch nor TensorFlow is installed in {sys.prefix}. Horovod is built for what is there, so "
            f"install one first: {sys.executable} -m pip install torch (or tensorflow)"
        )
    # The tools that pip installed lie beside this Python, also when its environment is not activated.
    environ = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
    plan = make_plan(versions, environ, mpi=mpi, nccl=nccl)
    env = build_environment(plan.settings, environ)
    root = cache_root()
    folder = root / cache_key(versions, plan)
    folder.mkdir(parents=True, exist_ok=True)
    names = " and ".join(f"{name} {version}" for name, version in versions.items())
    title = f"Horovod {HOROVOD_VERSION} for {names}"

    for note in plan.notes:
        console.print(f"Horovod {note}")
    with _locked(folder / "lock", console):
        wheel = next(folder.glob("horovod-*.whl"), None)
        if wheel is None:
            check_tools(env)
            console.print(f"Building {title} with {build_jobs()} jobs; takes minutes, once.")
            start = time.monotonic()
            wheel = _compile(folder, fetch_sdist(root, env), env, console)
            console.print(f"Built {title} in {time.monotonic() - start:.0f} s: {wheel}")
        else:
            console.print(f"{title}, built before: {wheel}")

    if install:
        # First the wheel by force, as one for other frameworks has the same version; then what it lacks, if anything.
        for options in (("--no-deps", "--force-reinstall"), ()):
            command = [sys.executable, "-m", "pip", "install", "-qq", *options, str(wheel)]
            if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
                raise BuildError(f"pip could not install {wheel}.")
        console.print(f"Installed into {sys.prefix}")
    return wheel


# ---------------------------------------------------------------------------------------------------------------
# The command

DESCRIPTION = f"Build Horovod {HOROVOD_VERSION} for the frameworks installed in this Python, and install it."
EPILOG = """Horovod's own build variables (HOROVOD_WITH_*, HOROVOD_WITHOUT_*, HOROVOD_NCCL_HOME, HOROVOD_CUDA_HOME,
HOROVOD_GPU_ALLREDUCE, ...) are passed on from the environment. Wheels are kept in $HVD_SYNCBN_CACHE, by default
~/.cache/hvd-syncbn."""


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what decides the build."""
    parser.add_argument("--with-mpi", action="store_true", dest="mpi", help="build the MPI operations, too")
    nccl = parser.add_mutually_exclusive_group()
    through = "GPU collectives through NCCL, or fail (by default where they can be built)"
    nccl.add_argument("--with-nccl", dest="nccl", action="store_const", const=True, help=through)
    nccl.add_argument("--without-nccl", dest="nccl", action="store_const", const=False, help="GPU tensors through host memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add_build_arguments(parser)
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="also copy the wheel into this folder")
    parser.add_argument("--no-install", action="store_true", help="only build the wheel and print its path")
    parser.add_argument("--list", action="store_true", help="list our changes to Horovod and build nothing")


def list_patches() -> None:
    """Print every change to Horovod: what, why, and where Horovod's people know of it."""
    from rich.console import Console
    from rich.padding import Padding

    console = Console(highlight=False, markup=False)
    for patch in patches():
        console.print(f"{patch.name}: {patch.subject}")
        console.print(Padding(f"{patch.why}\nUpstream: {patch.upstream}", (0, 0, 1, 4)))


def run(args: argparse.Namespace) -> int:
    """Build as the parsed options say and return the exit status."""

    def stop(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    # As an exception, so that the compilers end and the temporary folder goes.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    try:
        check_packages()
        if args.list:
            list_patches()
            return 0
        wheel = build(mpi=args.mpi, nccl=args.nccl, install=not args.no_install)
        if args.wheel_dir is not None:
            args.wheel_dir.mkdir(parents=True, exist_ok=True)
            print(f"Copied to {shutil.copy(wheel, args.wheel_dir)}")
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m hvd_syncbn.horovod_build``."""
    parser = argparse.ArgumentParser("python -m hvd_syncbn.horovod_build", description=DESCRIPTION, epilog=EPILOG)
    add_arguments(parser)
    return run(parser.parse_args(argv))
