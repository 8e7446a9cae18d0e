"""horovodrun starts at once: it imports no framework, its own processes are small, and it does not wait without a reason."""

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import horovod
import psutil
import pytest
from horovod.common import util
from horovod.runner.driver import driver_service
from horovod.runner.http.http_server import KVStoreServer, RendezvousServer

FRAMEWORKS = ("torch", "tensorflow", "mxnet")
PARTS = ("mpi", "gloo", "nccl", "ddl", "ccl")
HOROVODRUN = str(Path(sys.executable).with_name("horovodrun"))
LIMIT = 100


@pytest.fixture
def recorded(tmp_path: Path) -> dict[str, str]:
    """An environment in which every import of a framework fails and leaves a file `imported-NAME` in `tmp_path`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in FRAMEWORKS:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / f'imported-{name}')!r}, 'w').close()\nraise ImportError\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def imported(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("imported-*"))


def run(arguments: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HOROVODRUN, *arguments], env=env, capture_output=True, text=True, timeout=LIMIT, check=False)


def discovery(folder: Path, line: str) -> list[str]:
    """The options of an elastic job whose script prints a line."""
    script = folder / "discover.sh"
    script.write_text(f"#!/bin/sh\necho {line}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return ["--gloo", "--min-np", "1", "--host-discovery-script", str(script)]


@contextlib.contextmanager
def started(arguments: list[str]):  # type: ignore[no-untyped-def]
    """A running horovodrun; it and everything below it has ended afterwards."""
    process = subprocess.Popen([HOROVODRUN, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            family = [parent, *parent.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.communicate()


class TestFrameworks:
    def test_a_job_starts_without_importing_one(self, recorded: dict[str, str], tmp_path: Path) -> None:
        done = run(["-np", "2", "sh", "-c", "echo rank $HOROVOD_RANK"], recorded)
        assert done.returncode == 0, done.stderr
        assert {line.partition(":")[2] for line in done.stdout.splitlines()} == {"rank 0", "rank 1"}
        assert imported(tmp_path) == []

    def test_nor_does_an_elastic_one(self, recorded: dict[str, str], tmp_path: Path) -> None:
        done = run([*discovery(tmp_path, "localhost:2"), "-np", "2", "--network-interfaces", "lo", "true"], recorded)
        assert done.returncode == 0, done.stderr
        assert imported(tmp_path) == []

    @pytest.mark.parametrize("framework", ["torch", "tensorflow"])
    def test_the_build_wrote_what_the_libraries_say(self, framework: str) -> None:
        library = pytest.importorskip(f"horovod.{framework}")
        written = json.loads(Path(horovod.__file__).with_name("metadata.json").read_text())["built"]
        assert written == {part: bool(getattr(library, f"{part}_built")()) for part in PARTS}
        assert (util.gloo_built(), util.mpi_built()) == (written["gloo"], written["mpi"])

    def test_check_build_asks_the_libraries(self, recorded: dict[str, str], tmp_path: Path) -> None:
        """None of them can be loaded here, so nothing of Horovod can be used, whatever the build wrote."""
        done = run(["--check-build"], recorded)
        assert "[X]" not in done.stdout and "[ ] Gloo" in done.stdout
        assert imported(tmp_path) == [f"imported-{name}" for name in sorted(FRAMEWORKS[:2])]

    def test_a_build_that_wrote_nothing_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def answers(name: str, verbose: bool = False) -> dict[str, bool] | None:
            asked.append(name)
            return None if name == "tensorflow" else {part: part == "gloo" for part in PARTS}

        monkeypatch.setattr(util, "_build_metadata", lambda: {"pytorch": "2.13.0"})
        monkeypatch.setattr(util, "_library_answers", answers)
        assert util._part_built("gloo", "an argument that was not cached") is True
        assert asked == ["tensorflow", "torch"]


def descendants_with_two_ranks(pid: int) -> list[psutil.Process]:
    """Wait until both ranks (`sleep`) of a horovodrun are there. Return all of its descendants."""
    deadline = time.monotonic() + LIMIT
    family: list[psutil.Process] = []
    while sum(member.name() == "sleep" for member in family) < 2:
        assert time.monotonic() < deadline, family
        time.sleep(0.05)
        family = psutil.Process(pid).children(recursive=True)
    return family


class TestProcesses:
    def test_the_one_above_a_rank_loads_no_package(self) -> None:
        """One small process and a shell between horovodrun and each rank, and nothing else."""
        with started(["-np", "2", "sleep", "100"]) as process:
            family = descendants_with_two_ranks(process.pid)
            pythons = [member for member in family if member.name().startswith("python")]
            assert len(pythons) == 2
            for python in pythons:
                assert not [file.path for file in python.memory_maps() if "site-packages" in file.path]

    def test_a_killed_horovodrun_leaves_no_rank(self) -> None:
        with started(["-np", "2", "sleep", "100"]) as process:
            family = descendants_with_two_ranks(process.pid)
            process.kill()
            _, alive = psutil.wait_procs(family, timeout=LIMIT)
            for member in alive:
                member.kill()
            assert not alive

    def test_exit_status_and_environment(self) -> None:
        from horovod.runner.common.util import safe_shell_exec

        assert safe_shell_exec.execute("exit 7") == 7
        assert safe_shell_exec.execute("kill -9 $$") == 128 + 9
        assert safe_shell_exec.execute('test "$ODD" = "a b\'"', env={"ODD": "a b'", "PATH": os.environ["PATH"]}) == 0
        assert safe_shell_exec.execute('test -z "$HOME"', env={"PATH": os.environ["PATH"]}) == 0

    @pytest.mark.parametrize("server", [RendezvousServer, KVStoreServer])
    def test_a_server_asks_for_no_name(self, server: type, monkeypatch: pytest.MonkeyPatch) -> None:
        """An answer can take seconds, and nobody needs it."""

        def refuse(name: str = "") -> str:
            raise AssertionError("the network was asked for this host's name")

        monkeypatch.setattr(socket, "getfqdn", refuse)
        made = server(0)
        (made.start if server is RendezvousServer else made.start_server)()
        (made.stop if server is RendezvousServer else made.shutdown_server)()


class TestElasticOnOneHost:
    def test_localhost_needs_no_option(self, tmp_path: Path) -> None:
        done = run([*discovery(tmp_path, "localhost:2"), "-np", "2", "sh", "-c", "echo $HOROVOD_GLOO_IFACE"])
        assert done.returncode == 0, done.stderr
        assert [line.partition(":")[2] for line in done.stdout.splitlines()] == ["lo", "lo"]

    def test_another_host_is_told_what_to_type(self, tmp_path: Path) -> None:
        with started([*discovery(tmp_path, "elsewhere:2"), "-np", "2", "true"]) as process:
            line = process.stderr.readline()
            assert "one host is available, elsewhere" in line and "--network-interfaces lo" in line

    def test_a_wait_for_slots_is_reported(self, tmp_path: Path) -> None:
        options = [*discovery(tmp_path, "localhost:2"), "--network-interfaces", "lo", "-np", "3"]
        with started([*options, "true"]) as process:
            assert "waiting for 3 slots on 1 or more hosts. Available: 2 on ['localhost']" in process.stderr.readline()

    def test_named_interfaces_are_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where all hosts of the moment are local: others may join, which cannot reach lo."""
        here = {
            name: [SimpleNamespace(family=socket.AF_INET, address=address)]
            for name, address in (("lo", "127.0.0.1"), ("eth0", "10.0.0.1"))
        }
        monkeypatch.setattr(driver_service, "net_if_addrs", lambda: {**here, "eth1": []})

        def found(*nics: str) -> set[str]:
            return driver_service.get_local_interfaces(SimpleNamespace(nics=set(nics), verbose=0))

        assert (found("eth0"), found("lo"), found()) == ({"eth0"}, {"lo"}, {"lo"})
        with pytest.raises(ValueError, match=r"Received: --network-interfaces eth1. This host has: eth0, eth1, lo"):
            found("eth1")
