"""Builds Horovod for the frameworks of this Python: ``hvd-syncbn build-horovod``.

Horovod 0.28.1, its last release, does not compile against current PyTorch and TensorFlow and has bugs that end jobs.
The changes in ``patches/`` (see patching.py) and one CMake setting fix both. Rules:

* This package runs before the rest of hvd-syncbn is built (``python -m hvd_syncbn.horovod_build``), so it imports only the
  standard library and rich. rich is imported inside functions, so that it is reported like any other missing tool. Frameworks
  and system libraries (system.py) are detected without importing them.
* There is one wheel for each combination of inputs that affect the binary. All environments of a user share the cache,
  so a second checkout installs in seconds.
* The error of a failed build shows the compiler's first error and the path of the log.
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

# The HOROVOD_* variables that affect the build; most others are read at run time.
_BUILD_VARIABLE = re.compile(
    r"HOROVOD_(GPU(_.+)?|CPU_OPERATIONS|(NCCL|NVTX|CUDA|ROCM|BUILD)_.+|ALLOW_MIXED_GPU_IMPL|CMAKE|DEBUG)"
)
# Paths do not affect the binary; the versions found there do.
_PLACE = re.compile(r"HOROVOD_(NCCL|CUDA)_(HOME|INCLUDE|LIB)")
_PARTS = ("PYTORCH", "TENSORFLOW", "MXNET", "MPI", "GLOO")
_TOOLS = ("rich", "setuptools", "wheel", "packaging")
_STEP = re.compile(r"^\s*\[\s*(\d+)%\] (.+)$")
_PLAIN_PROGRESS_S = 15.0
_GIB_PER_COMPILER = 2

# The most specific pattern first, because lines that only mention errors may precede the compiler's message.
_ERROR_LINES = (
    re.compile(r"(: (fatal )?error: )|(^\s*nvcc fatal)"),
    re.compile(r"CMake Error"),
    re.compile(r"undefined reference|ld returned"),
    re.compile(r"\berror:", re.IGNORECASE),
)


# ---------------------------------------------------------------------------------------------------------------
# The installation


def cache_root() -> Path:
    """Return the cache folder of Horovod's source and the wheels built from it."""
    own = os.environ.get("HVD_SYNCBN_CACHE")
    if own:
        return Path(own).expanduser() / "horovod"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hvd-syncbn" / "horovod"


def check() -> list[str]:
    """Return the problems of the installed Horovod, one sentence each; an empty list if it fits the frameworks."""
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
        elif there.replace("-", "") != here.replace("-", ""):  # the package of 2.22.0-rc1 has version 2.22.0rc1
            problems.append(f"Horovod was built for {name} {there}, and {name} {here} is installed.")
    return problems


# ---------------------------------------------------------------------------------------------------------------
# The build's settings


class Plan(NamedTuple):
    """The settings of a build: Horovod's build variables, versions of system libraries, and notes to print."""

    settings: dict[str, str]
    system: dict[str, str]
    notes: list[str]


def make_plan(versions: Mapping[str, str], environ: Mapping[str, str], *, mpi: bool = False, nccl: bool | None = None) -> Plan:
    """Choose the build's settings: defaults, overridden by HOROVOD_* variables, overridden by the options.

    By default GPU collectives use NCCL if every framework is a CUDA build, and a CUDA toolkit and NCCL are found. MPI is off by
    default, because `horovodrun` would use it, and it does not support elastic jobs or a second `hvd.init()` in a process
    without a launcher, and is slow with more ranks than cores.

    Args:
        versions: Versions of the frameworks.
        environ: Environment variables.
        mpi: Whether to build with MPI.
        nccl: Whether GPU collectives use NCCL; None if possible.

    Raises:
        BuildError: A requirement of an option is missing.
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
            "mpicxx is not in PATH, so MPI cannot be built in. Install it: apt-get install openmpi-bin libopenmpi-dev"
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
    """Add the settings for GPUs to a plan."""
    gpus = cuda_frameworks()
    plain = [f"{name} {version}" for name, version in versions.items() if name not in gpus]
    own = [value for name, value in plan.settings.items() if name.startswith("HOROVOD_GPU_")]
    asked = nccl or "NCCL" in own
    if not asked and not gpus:
        return
    cuda = find_cuda(environ)
    if cuda is not None:
        # Needed without GPU collectives, too: Horovod copies GPU tensors, and asks PyTorch for the path of CUDA.
        plan.system["CUDA"] = cuda.version
        plan.settings["HOROVOD_CUDA_HOME"] = str(cuda.home)
    if own and not asked:  # the caller's HOROVOD_GPU_* variables choose something other than NCCL
        return
    library = find_nccl(environ, cuda)
    problem = None
    if plain:
        problem = f"{' and '.join(plain)} is not a CUDA build, and Horovod's GPU collectives need all frameworks to be"
    elif cuda is None:
        problem = "no CUDA toolkit was found; install one that has nvcc, or set CUDA_HOME to it"
    elif library is None:
        cu = cuda.version.partition(".")[0]
        problem = f"NCCL's header was not found; {sys.executable} -m pip install nvidia-nccl-cu{cu}, or set HOROVOD_NCCL_HOME"
    if nccl is False or (problem is not None and not asked):
        why = "as requested" if nccl is False else problem
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
    """Return the name of the cache folder: versions and a hash of everything that affects the binary."""
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
    """Raise BuildError if a tool that the build needs is missing."""
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
    """Raise BuildError if a Python package that the builder needs (such as rich) is missing."""
    missing = [name for name in _TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise BuildError(f"Horovod's build needs {names}. Install with: {sys.executable} -m pip install {names}")


def build_jobs() -> int:
    """Return the number of compilers to run at once: one per CPU, limited by memory."""
    cpus = len(os.sched_getaffinity(0))
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    return max(1, min(cpus, gib // _GIB_PER_COMPILER))


def build_environment(settings: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the build."""
    # MAKEFLAGS of an outer make names a job server that this build cannot reach. Horovod's setup.py imports files beside it.
    dropped = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHONSAFEPATH"}
    env = {k: v for k, v in environ.items() if not k.startswith("HOROVOD_") and k not in dropped}
    jobs = build_jobs()
    if "HOROVOD_CUDA_HOME" in settings:
        # PyTorch and CMake otherwise guess the toolkit from the path of nvcc, which may be a script elsewhere.
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
        # Horovod queries TensorFlow's paths in a subprocess whose log would mix with the output.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


# ---------------------------------------------------------------------------------------------------------------
# The source


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify_sdist(path: Path) -> None:
    """Raise BuildError if `path` is not the Horovod source that the patches apply to."""
    found = sha256_of(path)
    if found != SDIST_SHA256:
        raise BuildError(
            f"{path} is not the released source of Horovod {HOROVOD_VERSION}: expected SHA-256 {SDIST_SHA256}. Received: "
            f"{found}. Check which package index pip uses."
        )


def fetch_sdist(folder: Path, env: Mapping[str, str]) -> Path:
    """Return Horovod's verified source archive in `folder`, downloaded with pip if it is missing."""
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
    """Return (percent, target) from a progress line of Ninja's output, else None."""
    match = _STEP.match(line)
    if match is None:
        return None
    return int(match[1]), match[2].split()[-1].rpartition("/")[2].removesuffix(".o")


@contextlib.contextmanager
def show_progress(console: Console, title: str) -> Iterator[Callable[[int, str], None]]:
    """Show progress: a live bar on a terminal, else a line every 15 seconds."""
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
    """Run a command in a new process group and write its output to `log`; an exception here ends the whole group."""
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
    """End a process group, first with SIGTERM, which allows Ninja to remove incomplete files."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, request)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


@contextlib.contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    """Hold a lock file, after waiting for another build that holds it; the system releases it when the process ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Waiting for another build of the same Horovod.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(folder: Path, archive: Path, env: Mapping[str, str], console: Console) -> Path:
    """Build the wheel in a temporary folder and move it to `folder` when it is complete."""
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
            raise BuildError(f"Horovod's build failed. The first error:\n\n{said}\n\nThe full log: {log_path}")
        (built,) = wheels.glob("horovod-*.whl")
        # The temporary folder may be on another file system, where a move is not atomic.
        staged = folder / f".{built.name}.new"
        shutil.copyfile(built, staged)
        return staged.replace(folder / built.name)


def build(*, mpi: bool = False, nccl: bool | None = None, install: bool = True) -> Path:
    """Build Horovod for the frameworks of this Python, or find the wheel in the cache, and install it.

    Args:
        mpi: Whether to build the MPI operations, too, which need MPI with its headers.
        nccl: Whether GPU collectives use NCCL, which needs CUDA and NCCL with its headers. None: if both are found and every
            framework is a CUDA build.
        install: Whether to install the wheel into this Python.

    Returns:
        The wheel's path in the cache.

    Raises:
        BuildError: A requirement is missing, or the build failed.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    versions = framework_versions()
    if not versions:
        raise BuildError(
            f"Neither PyTorch nor TensorFlow is installed in {sys.prefix}. Horovod is built for the installed frameworks, so "
            f"install one first: {sys.executable} -m pip install torch (or tensorflow)"
        )
    # Finds the tools that pip installed beside this Python, even if its environment is not activated.
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
            console.print(f"Building {title} with {build_jobs()} jobs. This takes minutes; later installations use the cache.")
            start = time.monotonic()
            wheel = _compile(folder, fetch_sdist(root, env), env, console)
            console.print(f"Built {title} in {time.monotonic() - start:.0f} s: {wheel}")
        else:
            console.print(f"Using {title} from the cache: {wheel}")

    if install:
        # Force the wheel, because one for other frameworks has the same version; then install missing requirements.
        for options in (("--no-deps", "--force-reinstall"), ()):
            command = [sys.executable, "-m", "pip", "install", "-qq", *options, str(wheel)]
            if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
                raise BuildError(f"pip could not install {wheel}; its output is above.")
        console.print(f"Installed into {sys.prefix}")
    return wheel


# ---------------------------------------------------------------------------------------------------------------
# The command

DESCRIPTION = f"Build Horovod {HOROVOD_VERSION} for the frameworks installed in this Python, and install it."
EPILOG = """Horovod's own build variables (HOROVOD_WITH_*, HOROVOD_WITHOUT_*, HOROVOD_NCCL_HOME, HOROVOD_CUDA_HOME,
HOROVOD_GPU_ALLREDUCE, ...) are read from the environment. Wheels are cached in $HVD_SYNCBN_CACHE, by default
~/.cache/hvd-syncbn."""


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that affect the build."""
    parser.add_argument("--with-mpi", action="store_true", dest="mpi", help="build the MPI operations, too")
    nccl = parser.add_mutually_exclusive_group()
    through = "use NCCL for GPU collectives, and fail if it is missing (default: use NCCL if possible)"
    nccl.add_argument("--with-nccl", dest="nccl", action="store_const", const=True, help=through)
    host = "copy GPU tensors through host memory"
    nccl.add_argument("--without-nccl", dest="nccl", action="store_const", const=False, help=host)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add_build_arguments(parser)
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="also copy the wheel into this folder")
    parser.add_argument("--no-install", action="store_true", help="only build the wheel and print its path")
    parser.add_argument("--list", action="store_true", help="list the changes to Horovod and exit")


def list_patches() -> None:
    """Print the subject, reason and upstream issue of every change to Horovod."""
    from rich.console import Console
    from rich.padding import Padding

    console = Console(highlight=False, markup=False)
    for patch in patches():
        console.print(f"{patch.name}: {patch.subject}")
        console.print(Padding(f"{patch.why}\nUpstream: {patch.upstream}", (0, 0, 1, 4)))


def run(args: argparse.Namespace) -> int:
    """Build with the parsed options and return the exit status."""

    def stop(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    # Signals raise an exception, so that the compilers end and the temporary folder is removed.
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
