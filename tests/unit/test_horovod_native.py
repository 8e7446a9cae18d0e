"""Parts of the patched Horovod, compiled with AddressSanitizer and driven without processes or GPUs: tests/horovod_native/."""

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hvd_syncbn import horovod_build

pytestmark = pytest.mark.slow

DRIVERS = Path(__file__).parents[1] / "horovod_native"
COMMON = (
    "common",
    "controller",
    "fusion_buffer_manager",
    "group_table",
    "logging",
    "message",
    "parameter_manager",
    "response_cache",
)
SOURCES = [f"horovod/common/{name}.cc" for name in (*COMMON, "stall_inspector", "tensor_queue", "thread_pool", "timeline")]
SOURCES += [f"horovod/common/{name}.cc" for name in ("utils/env_parser", "ops/gpu_operations", "ops/cuda_operations")]
SOURCES += [f"horovod/common/gloo/{name}.cc" for name in ("shared_memory", "host_tree")]
SOURCES += [f"horovod/common/optim/{name}.cc" for name in ("bayesian_optimization", "gaussian_process")]
# Compiled together, as most of their time is that of headers that they share. host_tree.cc has names of shared_memory.cc, and
# only the last unit has Eigen's headers.
HOSTS = "horovod/common/gloo/host_tree.cc"
UNITS = {
    "common": [path for path in SOURCES if "/optim/" not in path and path != HOSTS],
    "hosts": [HOSTS],
    "optim": [path for path in SOURCES if "/optim/" in path],
}
SANITIZER = "-fsanitize=address"

GATHERED = (
    "ERROR: Allgather is not supported with Join at this time. Specify sparse_to_dense=True if using DistributedOptimizer"
)
NOT_WITH_JOIN = [
    f"allgather: {GATHERED}",
    "broadcast: ERROR: Broadcast is not supported with Join at this time.",
    "alltoall: ERROR: Alltoall is not supported with Join at this time.",
    "reducescatter: ERROR: Reducescatter is not supported with Join at this time.",
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled drivers."""
    root = horovod_build.cache_root()
    root.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("horovod")
    source = horovod_build.unpack(horovod_build.fetch_sdist(root, os.environ), folder)
    horovod_build.apply(source, horovod_build.patches())
    third_party = source / "third_party"
    includes = [DRIVERS / "cuda", source, source / "horovod/common", third_party / "eigen", third_party / "lbfgs/include"]
    includes += [third_party / "gloo", third_party / "flatbuffers/include", *sorted(third_party.glob("boost/*/include"))]
    # Sections that nothing refers to are left out, and with them what they would need: the other collectives.
    options = ["-std=c++17", "-O0", "-g1", "-w", SANITIZER, "-D_GLIBCXX_ASSERTIONS", "-ffunction-sections"]
    # Without Gloo and MPI nothing else includes logging.h for ops/collective_operations.h.
    options += ["-include", "horovod/common/logging.h", "-DHAVE_CUDA=1", "-DHAVE_GPU=1"]
    options += [f"-I{include}" for include in includes]
    compiler = shlex.split(os.environ.get("CXX", "c++"))

    def call(*arguments: str | Path) -> None:
        result = subprocess.run([*compiler, *arguments], capture_output=True, text=True, check=False, timeout=900)
        assert result.returncode == 0, result.stderr[-4000:]

    def compiled(path: Path) -> Path:
        target = folder / f"{path.stem}.o"
        call(*options, "-c", path, "-o", target)
        return target

    units = []
    for name, paths in UNITS.items():
        units.append(folder / f"{name}_unit.cc")
        units[-1].write_text("".join(f'#include "{source / path}"\n' for path in paths))
    drivers = sorted(DRIVERS.glob("*.cc"))
    with ThreadPoolExecutor(horovod_build.build_jobs()) as pool:
        objects = list(pool.map(compiled, [*drivers, *units]))
    for driver, main in zip(drivers, objects, strict=False):
        call(SANITIZER, "-pthread", "-Wl,--gc-sections", main, *objects[len(drivers) :], "-o", folder / driver.stem)
    return folder


def run(program: Path, *arguments: str | Path) -> list[str]:
    """Run a driver and return the lines that it prints."""
    environ = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60, env=environ)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    return result.stdout.splitlines()


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_ranks_do_where_one_has_joined(programs: Path, ranks: int) -> None:
    """No access out of bounds, zeros where the tensors are, an error where a rank cannot take part: on and off the cache."""

    def devices(first: int, others: int) -> str:
        return "devices " + " ".join(map(str, [first, *[others] * (ranks - 1)]))

    expected = []
    for joined_on in (-1, 3):
        for device in (-1, 3):
            own = f"6 elements for {device} on {device}"
            refused = "Rank 0 joined on the CPU, and the tensor is on GPUs. Call hvd.join(device) there with the rank's GPU."
            answers = {"allreduce": "ALLREDUCE", "adasum": "ADASUM"}
            takes_part = joined_on == device or device == -1
            expected += [
                f"joined on {joined_on}, tensors on {device}",
                f"cached: ALLREDUCE, {devices(device, device)}; {own}",
                f"gathered: ALLGATHER, {devices(device, device)}; {own}",
                f"gathered: {GATHERED}",
                *(
                    f"{name}: {answer}, {devices(device, device)}; {own}" if takes_part else f"{name}: ERROR: {refused}"
                    for name, answer in answers.items()
                ),
                *NOT_WITH_JOIN,
                f"barrier: BARRIER, {devices(-1, device)}",
            ]
            cached = "cached, allreduce" if takes_part else "cached"
            expected.append(f"{cached}: ALLREDUCE, {devices(device, device)}" + f"; {own}" * (1 + takes_part))
            if takes_part:
                expected.append(f"adasum: ADASUM, {devices(device, device)}; {own}")
    assert [line.strip() for line in run(programs / "joined_ranks", str(ranks))] == expected


def test_asynchronous_completion_on_a_gpu(programs: Path, tmp_path: Path) -> None:
    assert run(programs / "async_completion", tmp_path / "timeline.json") == [
        # The zeros of one operation are not the next one's before NCCL is done with them.
        "sums with a rank that has joined: 1 1 1",
        # A stream waits for the operation whose result it needs, not for the next one; nobody waits on the host.
        "streams wait for: 1 and 2 operations, 0 run on the way",
        # Tensors that a layer waits for pass gradients by, and complete asynchronously but in elastic jobs.
        "awaited: streams wait for 1 and 2 operations, 0 run on the way, gradient pending, next stream 1",
        "awaited, elastic: streams wait for 0 and 0 operations, 2 run on the way, gradient pending, next stream 1",
        "awaited sums with a rank that has joined: 1 1 1",
        "with a timeline, run before the callback: 1",
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_reductions_through_shared_memory(programs: Path, ranks: int, tmp_path: Path) -> None:
    """Every type and operation, at the sizes around which the algorithm changes, has the bytes of one process."""
    (line,) = run(programs / "ranks_share_memory", "reductions", str(ranks), tmp_path)
    assert re.fullmatch(rf"{ranks} ranks: 0 of [1-9]\d\d wrong", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("how", ["killed", "left", "stopped"])
def test_the_others_get_an_error_within_a_second(programs: Path, ranks: int, how: str, tmp_path: Path) -> None:
    """The rank that waits for the one that ended finds it; another may find that one."""
    reason = {"killed": "has died|has left", "left": "has left", "stopped": "timed out after 400 ms|has left|has died"}[how]
    lines = run(programs / "ranks_share_memory", "ends", how, str(ranks), tmp_path)
    assert len(lines) == ranks - 1
    for line in lines:
        assert re.fullmatch(rf"rank \d: failed: .*({reason}).*, within a second", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("why", ["full", "not there", "not the same"])
def test_ranks_that_cannot_share_memory_agree(programs: Path, why: str, tmp_path: Path) -> None:
    assert run(programs / "ranks_share_memory", "falls_back", why, tmp_path) == ["0 of 2 ranks share memory"]
    assert not list(tmp_path.glob("horovod-*[0-9]"))


def test_ranks_that_have_no_folder_for_shared_memory_agree(programs: Path, tmp_path: Path) -> None:
    assert run(programs / "ranks_share_memory", "falls_back", "missing", tmp_path / "missing") == ["0 of 2 ranks share memory"]


def test_files_of_processes_that_died_are_removed(programs: Path, tmp_path: Path) -> None:
    """Not those that are locked, recent, or another program's."""
    assert run(programs / "ranks_share_memory", "stale", tmp_path) == ["0 of 2 wrong"]
    assert {path.name for path in tmp_path.iterdir()} == {"another-old", "horovod-1-locked", "horovod-1-new"}


@pytest.mark.parametrize(("hosts", "ranks"), [(2, 1), (3, 1), (5, 1), (2, 2), (3, 2)])
def test_reductions_between_hosts(programs: Path, hosts: int, ranks: int, tmp_path: Path) -> None:
    """Every type and operation, at all sizes, has the bytes of one process that adds in the same order."""
    (line,) = run(programs / "hosts_exchange", "reductions", str(hosts), str(ranks), tmp_path)
    assert re.fullmatch(rf"{hosts} hosts of {ranks}: 0 of [1-9]\d\d wrong", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("hosts", "ranks"), [(2, 1), (4, 1), (3, 2)])
@pytest.mark.parametrize("how", ["killed", "left", "stopped"])
def test_ranks_of_other_hosts_get_an_error_within_a_second(
    programs: Path, hosts: int, ranks: int, how: str, tmp_path: Path
) -> None:
    lines = run(programs / "hosts_exchange", "ends", how, str(hosts), str(ranks), tmp_path)
    assert len(lines) == hosts * ranks - 1
    ended = "has died|has left|has died or left|Connection reset by peer|Broken pipe"
    reason = ended if how != "stopped" else f"timed out after 400 ms|{ended}"
    for line in lines:
        assert re.fullmatch(rf"rank \d: failed: .*({reason}).*, within a second", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("first", "hosts", "ranks"), [(0, 2, 1), (1, 2, 1), (0, 3, 1), (2, 3, 1), (4, 5, 1), (0, 3, 2), (5, 3, 2)]
)
def test_one_rank_begins_and_the_others_follow(programs: Path, first: int, hosts: int, ranks: int, tmp_path: Path) -> None:
    """Ranks that have nothing to say learn that they are awaited (patch 0040), also those beyond a power of two."""
    (line,) = run(programs / "hosts_exchange", "begins", str(first), str(hosts), str(ranks), tmp_path)
    assert re.fullmatch(r"0 of [1-9]\d+ wrong", line)


def test_hosts_that_cannot_connect_agree(programs: Path) -> None:
    assert run(programs / "hosts_exchange", "falls_back", "3") == ["0 of 3 ranks are connected"]


def test_tensors_of_other_sizes_are_an_error(programs: Path) -> None:
    lines = run(programs / "hosts_exchange", "differs")
    assert len(lines) == 2 and all("failed: " in line for line in lines)
    text = r"expected message 1 of (16|24) bytes from the host of rank \d. Received: message 1 of (16|24) bytes."
    assert any(re.search(text, line) for line in lines)


@pytest.mark.parametrize(("hosts", "messages"), [(2, 1), (3, 3), (4, 2), (8, 3), (48, 7), (64, 6)])
def test_messages_grow_with_the_logarithm_of_hosts(programs: Path, hosts: int, messages: int) -> None:
    """However many ranks each host has; Gloo's ring takes 2 x 511 one after another for 64 hosts of 8."""
    assert run(programs / "hosts_exchange", "messages", str(hosts)) == [f"{hosts} hosts: {messages} messages, 0 wrong"]
