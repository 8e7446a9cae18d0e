"""The command line: what it accepts, and what doctor finds and advises."""

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_syncbn import __version__, cli, horovod_build, native, vectors
from hvd_syncbn.cli import bench, cost_model, doctor, job, networks, packets, rank, stacks, verify

VERSIONS = {"torch": "2.13.0", "tensorflow": "2.21.0"}
HEALTHY = {"gloo": True, "mpi": False, "nccl": False, "isa": "avx2"}


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation where every probe succeeds."""
    monkeypatch.setattr(horovod_build, "framework_versions", lambda: VERSIONS)
    monkeypatch.setattr(horovod_build, "check", list)
    monkeypatch.setattr(horovod_build, "cuda_frameworks", list)
    monkeypatch.setattr(doctor, "_probe", lambda _body: HEALTHY)
    monkeypatch.delenv("HOROVOD_CYCLE_TIME", raising=False)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = cli.main(argv)
    return status, " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("healthy")
class TestDoctor:
    def test_healthy(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out = run(capsys, "doctor")
        assert status == 0
        for text in (__version__, "2.13.0", "2.21.0", "built with gloo", "instruction set avx2", "1 ms, the default"):
            assert text in out
        assert "To fix" not in out

    def test_cycle_time_in_force(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOROVOD_CYCLE_TIME", "0.1")
        assert "HOROVOD_CYCLE_TIME 0.1 ms" in run(capsys, "doctor")[1]

    def test_advice(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOROVOD_CACHE_CAPACITY", "0")
        monkeypatch.setenv("HOROVOD_AUTOTUNE", "1")
        status, out = run(capsys, "doctor")
        assert status == 0
        assert "HOROVOD_CACHE_CAPACITY 0: ranks negotiate every packet again; unset it" in out
        assert "HOROVOD_AUTOTUNE set: tunes for large fused tensors" in out

    def test_cache_of_a_large_network(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOROVOD_CACHE_CAPACITY", "1024")
        assert "HOROVOD_CACHE_CAPACITY 1024: in a network with more tensors than that" in run(capsys, "doctor")[1]
        for capacity in ("8192", "16384"):
            monkeypatch.setenv("HOROVOD_CACHE_CAPACITY", capacity)
            assert "HOROVOD_CACHE_CAPACITY" not in run(capsys, "doctor")[1]

    def test_cache_capacity_is_that_of_the_patch(self) -> None:
        """The number that doctor and docs/performance.md name."""
        (patch,) = (patch for patch in horovod_build.patches() if patch.name.startswith("0028"))
        assert f"+  uint32_t cache_capacity = {doctor.CACHE_CAPACITY};" in patch.diff
        assert f"holds {doctor.CACHE_CAPACITY} tensors" in (Path(__file__).parents[2] / "docs/performance.md").read_text()

    def test_horovod_for_another_version(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(horovod_build, "check", lambda: ["Horovod was built for torch 2.12.0."])
        status, out = run(capsys, "doctor")
        assert status == 1
        assert "Horovod was built for torch 2.12.0." in out
        assert "-m hvd_syncbn.horovod_build" in out

    def test_parts_that_do_not_load(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_probe", lambda _body: {"error": "ImportError: undefined symbol [x]"})
        status, out = run(capsys, "doctor")
        assert status == 1
        assert "ImportError: undefined symbol" in out
        assert out.count("-m pip install") == 1

    def test_memory(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"):
            monkeypatch.delenv(name, raising=False)
        advice = "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 reuses them"
        assert advice in run(capsys, "doctor")[1]
        monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
        assert advice not in run(capsys, "doctor")[1]
        monkeypatch.delenv("LD_PRELOAD")
        monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
        assert advice not in run(capsys, "doctor")[1]
        monkeypatch.delenv("MALLOC_MMAP_MAX_")
        monkeypatch.setattr(horovod_build, "framework_versions", lambda: {"tensorflow": "2.21.0"})
        assert advice not in run(capsys, "doctor")[1]

    def test_gpus(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """What is there, and what the layers and Horovod lack to use it."""
        monkeypatch.setattr(horovod_build, "cuda_frameworks", lambda: ["torch"])

        def found(**changed: object) -> tuple[int, str]:
            probe = HEALTHY | {"gpus": ["NVIDIA H100"] * 2, "cuda": True, "nccl": True} | changed
            monkeypatch.setattr(doctor, "_probe", lambda _body: probe)
            return run(capsys, "doctor")

        status, out = found()
        assert status == 0 and "torch GPUs 2: NVIDIA H100" in out and "CUDA kernels built in" in out
        status, out = found(cuda=False)
        assert status == 1 and "CUDA kernels not built in" in out and "pip install --no-build-isolation" in out
        status, out = found(nccl=False)
        assert status == 1 and "packets go through host memory" in out and "horovod_build --with-nccl" in out
        status, out = found(gpus=[], nccl=False, cuda=False)
        assert status == 0 and "torch GPUs none available" in out

    def test_no_framework(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(horovod_build, "framework_versions", dict)
        status, out = run(capsys, "doctor")
        assert status == 1
        assert "neither PyTorch nor TensorFlow is installed" in out


class TestProbe:
    def test_returns_what_the_statements_found(self) -> None:
        assert doctor._probe("print('noise'); found['x'] = 1") == {"x": 1}

    def test_first_line_of_an_error(self) -> None:
        assert doctor._probe("raise ImportError('first\\nsecond')") == {"error": "ImportError: first"}

    def test_a_crash_is_told(self) -> None:
        assert doctor._probe("os.kill(os.getpid(), 11)") == {"error": "crashed with SIGSEGV"}

    def test_an_exit_is_told(self) -> None:
        assert "error" in doctor._probe("os._exit(3)")


@pytest.mark.slow
def test_the_real_installation_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "doctor")
    assert status == 0, out


def test_build_horovod_reaches_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, bool] = {}
    monkeypatch.setattr(horovod_build, "build", lambda **options: called.update(options))
    assert cli.main(["build-horovod", "--with-nccl", "--no-install"]) == 0
    assert called == {"mpi": False, "nccl": True, "install": False}


@pytest.mark.parametrize("argv", [[], ["unknown"], ["doctor", "extra"]])
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2


@pytest.mark.slow
def test_verify_finds_one_sha256(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify"]) == 0
    output = capfd.readouterr().out
    assert "one sha256, that of the reference" in output and "NOT EQUAL" not in output
    for name, title in verify.FRAMEWORKS.items():
        left_out = importlib.util.find_spec(name) is None
        assert output.count(title) == (1 if left_out else len(native.isas()) * len(stacks.LAYOUTS))


@pytest.fixture(scope="module")
def good() -> str:
    """The reference's sha256."""
    return vectors.digest(*stacks.reference_stack())


class TestVerifyTells:
    """What it makes of what jobs report."""

    @pytest.fixture
    def jobs(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """By framework the sha256 that its job reports, or the error that it ends with."""
        outcomes: dict[str, Any] = {}

        def run(task: str, framework: str, hosts: Any, *, report: Callable[[job.Report], None], **_: Any) -> None:
            if isinstance(outcomes[framework], job.JobError):
                raise outcomes[framework]
            report({"configurations": 1})
            where = {"layout": "channels_first"} | ({"split": "even"} if hosts else {})
            report({"configuration": f"{task} on {hosts}", "sha256": outcomes[framework], **where})

        monkeypatch.setattr(job, "run", run)
        monkeypatch.setattr(verify.importlib.util, "find_spec", lambda _name: object())  # whatever is installed here
        return outcomes

    def test_equal(self, jobs: dict[str, Any], good: str, capsys: pytest.CaptureFixture[str]) -> None:
        jobs.update(torch=good, tensorflow=good)
        assert cli.main(["verify"]) == 0
        assert "EQUAL: 2 configurations have one sha256" in capsys.readouterr().out

    @pytest.mark.parametrize("other", [{"tensorflow": "ab" * 32}, {"tensorflow": "ab" * 32, "torch": "ab" * 32}])
    def test_not_that_of_the_reference(
        self, jobs: dict[str, Any], good: str, other: dict[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        jobs.update({"torch": good, "tensorflow": good} | other)
        assert cli.main(["verify"]) == 1
        assert f"NOT EQUAL: {len(other)} of 2 configurations differ" in capsys.readouterr().out

    def test_a_framework_that_could_not_run(self, jobs: dict[str, Any], good: str, capsys: pytest.CaptureFixture[str]) -> None:
        jobs.update(torch=good, tensorflow=job.JobError("host [h2] cannot be reached by ssh: no route"))
        assert cli.main(["verify", "-np", "2"]) == 1
        out = capsys.readouterr().out
        assert "TensorFlow could not run: host [h2] cannot be reached by ssh: no route" in out
        assert "EQUAL" not in out

    def test_json(self, jobs: dict[str, Any], good: str, capsys: pytest.CaptureFixture[str]) -> None:
        jobs.update(torch=good, tensorflow="ab" * 32)
        assert cli.main(["verify", "--json", "-np", "3", "-H", "h1:2,h2:2"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert (found["ranks"], found["hosts"], found["reference"], found["equal"]) == (3, ["h1:2", "h2:1"], good, False)
        assert [result["equal"] for result in found["results"]] == [True, False]

    def test_every_launcher(self, jobs: dict[str, Any], good: str, capsys: pytest.CaptureFixture[str]) -> None:
        jobs.update(torch=good, tensorflow=good)
        assert cli.main(["verify", "--launcher", "all"]) == 0
        out = capsys.readouterr().out
        # 2 of one process, and on 1, 2 and 4 ranks 2 of horovodrun, 1 of torchrun, 2 of tf.distribute.
        assert "EQUAL: 17 configurations have one sha256" in out and f"sha256 {good}" in out and out.count("1, 2, 4") == 5
        for launcher in ("one process", *job.LAUNCHERS):
            assert launcher in out

    def test_a_launcher_that_differs(self, jobs: dict[str, Any], good: str, capsys: pytest.CaptureFixture[str]) -> None:
        jobs.update(torch=good, tensorflow="ab" * 32)
        assert cli.main(["verify", "--launcher", "all", "-np", "2"]) == 1
        out = capsys.readouterr().out
        assert "NOT EQUAL: 4 of 7 configurations differ" in out and out.count("NO: 1 of 1") == 4
        assert f"TensorFlow, multiworker, 2 ranks, replicas on {[('localhost', 2)]}: {'ab' * 32}" in out.replace(
            "Host(name='localhost', slots=2)", "('localhost', 2)"
        )

    def test_a_launcher_that_could_not_run(self, jobs: dict[str, Any], good: str, capsys: pytest.CaptureFixture[str]) -> None:
        jobs.update(torch=job.JobError("no"), tensorflow=good)
        assert cli.main(["verify", "--launcher", "all", "-np", "2"]) == 1
        out = capsys.readouterr().out
        assert "PyTorch, one process could not run: no" in out and "PyTorch, torchrun, 2 ranks could not run: no" in out

    def test_what_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None if name == "horovod" else object())
        runs, left_out = verify.plan("all", job.place(2, None))
        assert left_out == ["horovod"] and {one.launcher for one in runs} == {"", "torchrun", "mirrored", "multiworker"}
        monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
        runs, left_out = verify.plan("all", None)
        assert left_out == ["torch"] and {one.framework for one in runs} == {"tensorflow"} and len(runs) == 10


class TestJob:
    def test_hosts(self) -> None:
        assert job.parse_hosts("h1:2, 10.0.0.2:4") == [("h1", 2), ("10.0.0.2", 4)]

    @pytest.mark.parametrize("text", ["", "h1", "h1:0", "h1:x", "h1:2,", "h1:2;rm:2"])
    def test_no_hosts(self, text: str) -> None:
        with pytest.raises(ValueError, match="Received: "):
            job.parse_hosts(text)

    def test_as_many_slots_as_ranks(self) -> None:
        hosts = [job.Host("a", 4), job.Host("b", 4), job.Host("c", 4)]
        assert job.place(6, hosts) == [("a", 4), ("b", 2)]
        assert job.place(3, None) == [("localhost", 3)]
        with pytest.raises(ValueError, match=r"slots for 13 ranks\. Received: -H a:4,b:4,c:4"):
            job.place(13, hosts)
        assert [job.host_of(rank, job.place(6, hosts)) for rank in (0, 3, 4, 5)] == ["a", "a", "b", "b"]

    @pytest.mark.parametrize(
        ("said", "why"),
        [
            (
                ["ssh not successful for host h2:", "ssh: Could not resolve hostname h2: Name or service not known"],
                "host h2 cannot be reached by ssh: ssh: Could not resolve hostname h2: Name or service not known",
            ),
            (
                ["[1]<stderr>:/x/python: Error while finding module specification for 'hvd_syncbn.cli.rank' "
                 "(ModuleNotFoundError: No module named 'hvd_syncbn')"],
                "rank 1 on b: ModuleNotFoundError: No module named 'hvd_syncbn'",
            ),
            (  # the rank that failed, not the one that missed it
                ["[0]<stderr>:horovod.common.exceptions.HorovodInternalError: peer closed", "[1]<stderr>:ValueError: no"],
                "rank 1 on b: ValueError: no",
            ),
            (["[0]<stderr>:HorovodInternalError: peer closed"], "rank 0 on a: HorovodInternalError: peer closed"),
            (["[1,1]<stderr>:RuntimeError: under MPI"], "rank 1 on b: RuntimeError: under MPI"),
            (["[1]<stderr>:env: '/x/python': No such file or directory", ""],
             "rank 1 on b: env: '/x/python': No such file or directory"),
            (["Exception: Timed out waiting for tasks to start. Please"], "Timed out waiting for tasks to start. Please"),
        ],
    )  # fmt: skip
    def test_what_failed(self, said: list[str], why: str) -> None:
        assert job.explain(said, [job.Host("a", 1), job.Host("b", 1)]) == why

    def test_nothing_said(self) -> None:
        assert job.explain([], None) is None

    @pytest.mark.parametrize(
        "argv",
        [
            ["-H", "h1:2"],
            ["-np", "0"],
            ["-np", "4", "-H", "h1:2"],
            ["-np", "2", "-H", "h1"],
            ["--launcher", "torchrun"],
            ["--launcher", "torchrun", "-np", "2", "-H", "h1:2"],
            ["--launcher", "all", "-np", "2", "-H", "h1:2"],
        ],
    )
    def test_wrong_options(self, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["verify", *argv])
        assert stopped.value.code == 2
        assert "np" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", range(1, 20))
def test_splits_deal_out_everything(ranks: int) -> None:
    for kind in vectors.SPLITS:
        parts = vectors.split(ranks, kind)
        assert len(parts) == ranks
        assert sorted(sample for part in parts for sample in part) == list(range(vectors.SAMPLES))
    assert ranks == 1 or [] in vectors.split(ranks, "empty")


@pytest.mark.parametrize("label", ["", "[0]<stdout>:", "[1,0]<stdout>:"])
@pytest.mark.parametrize("behind", ["\n", "[1,0]<stdout>:\n"])
def test_a_report_among_the_launchers_labels(label: str, behind: str) -> None:
    """horovodrun labels lines as Gloo or Open MPI does; mpirun's next label may stand in the same line."""
    assert job._report(f'{label}{job.MARK}{{"sha256": "6a"}}{behind}') == {"sha256": "6a"}
    assert job._report(f"{label}a word of a rank{behind}") is None


class TestBench:
    @pytest.mark.sources
    def test_runs_the_benchmarks_of_the_checkout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[object] = []

        def run(command: list[str], *, cwd: Path, check: bool) -> subprocess.CompletedProcess[str]:
            called.extend([command[1:], (cwd / "benchmarks" / "__main__.py").exists()])
            return subprocess.CompletedProcess(command, 3)

        monkeypatch.setattr(bench.subprocess, "run", run)
        assert cli.main(["bench", "--quick"]) == 3
        assert called == [["-m", "benchmarks", "--quick"], True]

    def test_a_wheel_has_none(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setattr(bench, "__file__", str(tmp_path / "hvd_syncbn" / "cli" / "bench.py"))
        assert cli.main(["bench"]) == 1
        assert "run `make bench`" in capsys.readouterr().err


class TestDoctorOnRanks:
    """What it says of measured packets; that it measures: tests/parallel/test_cli.py."""

    LINK = cost_model.Link(3e-4, 2e-5, 1e-9)

    def cluster(self, hosts: list[str], controller: str = "Gloo") -> packets.Cluster:
        """What a cluster of this link would have measured."""
        found = []
        for groups in [*rank.layouts(hosts), [list(range(len(hosts)))]]:
            spans = max(len({hosts[rank] for rank in group}) for group in groups)
            for size in (1e4, 3e5, 2e6):
                seconds = cost_model.ring(len(groups[0]), size, self.LINK)
                neighbours = groups[0] == list(range(len(groups[0])))
                found.append(packets.Packet(len(groups[0]), len(groups), neighbours, spans, int(size), seconds))
        return packets.Cluster(hosts, controller, found, [])

    def test_layouts(self) -> None:
        assert rank.layouts(["a", "a"]) == []
        assert rank.layouts(["a", "a", "a"]) == [[[0, 1]]]
        assert rank.layouts(["a", "a", "b", "b"]) == [[[0, 1], [2, 3]], [[0, 2]]]
        assert [len(groups[0]) for groups in rank.layouts(["a"] * 6 + ["b"] * 6)] == [2, 4, 6, 8, 2]

    def test_a_step_by_the_links_that_a_group_uses(self) -> None:
        cluster = self.cluster(["a"] * 8 + ["b"] * 8)
        assert cluster.links[True] == pytest.approx(self.LINK, rel=1e-6)
        assert cluster.links[False] == pytest.approx(self.LINK, rel=1e-6)
        for name, channels in networks.NETWORKS.items():
            for size, seconds in cluster.steps()[name].items():
                want = cost_model.step(channels, lambda data, size=size: cost_model.ring(size, data, self.LINK))
                assert seconds == pytest.approx(want, rel=1e-6)
        assert list(cluster.steps()["ResNet-50"]) == [2, 4, 8, 16]

    def test_group_size(self) -> None:
        assert packets.group_size({2: 1.0, 4: 2.0, 8: 3.0}) is None  # all are no more than enough
        assert packets.group_size({2: 1.0, 4: 2.0, 8: 3.0, 16: 4.0}) is None  # not worth it
        assert packets.group_size({2: 1.0, 4: 2.0, 8: 3.0, 16: 6.0, 32: 12.0}) == 8
        assert packets.group_size({2: 1.0, 8: 10.0, 16: 5.0, 32: 12.0}) == 16

    @pytest.mark.usefixtures("healthy")
    def test_is_told(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        cluster = self.cluster(["a"] * 64)
        monkeypatch.setattr(doctor, "measure", lambda *_: cluster)
        status, out = run(capsys, "doctor", "-np", "64")
        assert status == 0
        milliseconds = 1e3 * cluster.steps()["ResNet-50"][8]
        for text in (
            "64 ranks on 1 host, Gloo",
            f"Group size: 8, by process_set=groups(8).mine: {milliseconds:.0f} ms",
        ):
            assert text in out
        assert cli.main(["doctor", "--json", "-np", "64"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["group_size"] == 8
        assert found["links"]["inside"] == pytest.approx(self.LINK._asdict(), rel=1e-6)
        assert len(found["packets"]) == len(cluster.packets)

    @pytest.mark.parametrize(
        ("slowest", "ran_by_caller", "hosts", "text"),
        [
            ("call", 1.0, ["a", "a"], "the framework's call until the packet is enqueued"),
            ("cycle", 0.0, ["a", "a"], "start with horovodrun --gloo"),
            ("cycle", 1.0, ["a", "a"], "another cycle was running"),
            ("agreement", 1.0, ["a", "a"], "Give each rank a core to spare"),
            ("agreement", 1.0, ["a", "b"], "the time that ping shows"),
            ("sum", 1.0, ["a", "a"], "less time in smaller groups"),
            ("return", 0.0, ["a", "a"], "start with horovodrun --gloo"),
            ("return", 1.0, ["a", "a"], "the framework's code after the callback"),
        ],
    )
    @pytest.mark.usefixtures("healthy")
    def test_stages_of_a_packet(
        self,
        slowest: str,
        ran_by_caller: float,
        hosts: list[str],
        text: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        stages = {stage: [4e-6 if stage == slowest else 1e-6, 5e-5] for stage in packets.STAGES}
        cluster = self.cluster(hosts)._replace(breakdowns=[packets.Breakdown(9000, stages, ran_by_caller)])
        monkeypatch.setattr(doctor, "measure", lambda *_: cluster)
        status, out = run(capsys, "doctor", "-np", "2")
        assert status == 0
        assert "4.0 (50)" in out and f"{100 * ran_by_caller:.0f} %" in out
        assert f"Slowest stage at 9 kB: {slowest}: " in out and text in out

    @pytest.mark.usefixtures("healthy")
    def test_a_horovod_that_records_no_stages(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(doctor, "measure", lambda *_: self.cluster(["a", "a"]))
        status, out = run(capsys, "doctor", "-np", "2")
        assert status == 0 and "The stages of a packet were not recorded" in out
        # torch.distributed has no such stages.
        monkeypatch.setattr(doctor, "measure", lambda *_: self.cluster(["a", "a"], packets.DISTRIBUTED))
        status, out = run(capsys, "doctor", "-np", "2", "--launcher", "torchrun")
        assert status == 0 and "stages" not in out

    @pytest.mark.usefixtures("healthy")
    def test_a_job_that_fails(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def measure(*_: Any) -> None:
            raise job.JobError("host [h2] cannot be reached by ssh: no answer")

        monkeypatch.setattr(doctor, "measure", measure)
        status, out = run(capsys, "doctor", "-np", "2", "-H", "h1:1,h2:1")
        assert status == 1
        assert "The ranks could not be measured: host [h2] cannot be reached by ssh: no answer" in out

    @pytest.mark.usefixtures("healthy")
    @pytest.mark.parametrize(
        ("environment", "text"),
        [
            ({}, "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS 0: ranks wait forever for a missing rank"),
            ({"CHECK_TIME_SECONDS": "30", "SHUTDOWN_TIME_SECONDS": "20"}, "20 s: has no effect, because it must be more than"),
            ({"SHUTDOWN_TIME_SECONDS": "600"}, "600 s: then every waiting rank gets an error"),
            ({"CHECK_DISABLE": "1"}, "HOROVOD_STALL_CHECK_DISABLE set"),
        ],
    )
    def test_stalls(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], text: str
    ) -> None:
        for name in ("CHECK_TIME_SECONDS", "SHUTDOWN_TIME_SECONDS", "CHECK_DISABLE"):
            monkeypatch.delenv(f"HOROVOD_STALL_{name}", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(f"HOROVOD_STALL_{name}", value)
        assert text in run(capsys, "doctor")[1]
