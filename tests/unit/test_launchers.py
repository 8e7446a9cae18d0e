"""docs/launchers.md, and the files of examples/launch that are not run. `make launchers` runs the others."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvd_syncbn import vectors
from hvd_syncbn.cli.stacks import reference_stack

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
PAGE = (ROOT / "docs" / "launchers.md").read_text()


def bash_syntax(text: str) -> str:
    """What bash has to say against a script; nothing is run."""
    result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=10, check=False)
    return result.stderr if result.returncode or result.stderr else ""


def slurm_options(text: str) -> dict[str, str]:
    """The #SBATCH lines, which Slurm reads up to the first command only."""
    header = re.split(r"^(?!#|\s*$)", text, maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", header, re.MULTILINE))


class TestSlurm:
    TEXT = (LAUNCH / "slurm.sbatch").read_text()

    def test_bash_takes_it(self) -> None:
        assert self.TEXT.startswith("#!/bin/bash\n")
        assert bash_syntax(self.TEXT) == ""
        assert "unexpected EOF" in bash_syntax(self.TEXT.replace('"$SLURM_CPUS_PER_TASK"', '"$SLURM_CPUS_PER_TASK', 1))

    def test_options_come_before_the_first_command(self) -> None:
        options = slurm_options(self.TEXT)
        assert len(options) == self.TEXT.count("\n#SBATCH ")
        assert {"nodes", "ntasks-per-node", "cpus-per-task", "time"} <= options.keys()
        assert re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])
        assert slurm_options("#!/bin/bash\nset -e\n#SBATCH --nodes=2\n") == {}

    def test_starts_the_job_that_make_launchers_runs(self) -> None:
        (program,) = re.findall(r"^srun .* (\S+\.py)$", self.TEXT, re.MULTILINE)
        assert (ROOT / program).is_file()


def mpi_job_problems(manifest: Any) -> list[str]:
    """What the MPI operator would refuse: the fields that `kubeflow.org/v2beta1` requires, and our own numbers."""
    problems = []
    if (manifest.get("apiVersion"), manifest.get("kind")) != ("kubeflow.org/v2beta1", "MPIJob"):
        problems.append("not an MPIJob of v2beta1")
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", manifest.get("metadata", {}).get("name", "")):
        problems.append("no name that Kubernetes takes")
    spec = manifest.get("spec", {})
    unknown = spec.keys() - {"slotsPerWorker", "runPolicy", "mpiReplicaSpecs", "sshAuthMountPath", "launcherCreationPolicy"}
    problems += [f"unknown field {field}" for field in sorted(unknown)]
    replicas = spec.get("mpiReplicaSpecs", {})
    if replicas.keys() != {"Launcher", "Worker"}:
        return [*problems, "not one Launcher and Worker"]
    if replicas["Launcher"].get("replicas") != 1:
        problems.append("not one launcher")
    for role, replica in replicas.items():
        for container in replica.get("template", {}).get("spec", {}).get("containers", []) or [{}]:
            problems += [f"{role}: a container without {field}" for field in ("name", "image") if not container.get(field)]
            command = container.get("command", [])
            if not all(isinstance(word, str) for word in command):
                problems.append(f"{role}: a word of the command that is no string")
            elif "-np" in command and int(command[command.index("-np") + 1]) != spec.get("slotsPerWorker", 1) * replicas[
                "Worker"
            ].get("replicas", 0):
                problems.append(f"{role}: another number of ranks than of slots")
    return problems


class TestKubeflow:
    TEXT = (LAUNCH / "mpijob.yaml").read_text()

    def test_the_operator_would_take_it(self) -> None:
        assert mpi_job_problems(yaml.safe_load(self.TEXT)) == []

    @pytest.mark.parametrize(
        ("old", "new", "problem"),
        [
            ("v2beta1", "v1", "not an MPIJob of v2beta1"),
            ("kind: MPIJob", "kind: Job", "not an MPIJob of v2beta1"),
            ("name: hvd-syncbn", "name: hvd_syncbn", "no name that Kubernetes takes"),
            ("slotsPerWorker", "slotsPerWorkers", "unknown field slotsPerWorkers"),
            ("    Worker:", "    Workers:", "not one Launcher and Worker"),
            ("replicas: 1", "replicas: 2", "not one launcher"),
            ("replicas: 2", "replicas: 3", "Launcher: another number of ranks than of slots"),
            ("image: ", "picture: ", "Launcher: a container without image"),
            ('"8"', "8", "Launcher: a word of the command that is no string"),
        ],
    )
    def test_a_mistake_is_seen(self, old: str, new: str, problem: str) -> None:
        assert problem in mpi_job_problems(yaml.safe_load(self.TEXT.replace(old, new)))

    def test_starts_the_job_that_make_launchers_runs(self) -> None:
        launcher = yaml.safe_load(self.TEXT)["spec"]["mpiReplicaSpecs"]["Launcher"]
        (command,) = (container["command"] for container in launcher["template"]["spec"]["containers"])
        assert (ROOT / Path(command[-1]).relative_to("/hvd-syncbn")).is_file()


@pytest.mark.parametrize("name", ["slurm.sbatch", "mpijob.yaml"])
def test_what_was_not_run_says_so(name: str) -> None:
    assert "NOT RUN" in (LAUNCH / name).read_text()
    assert f"`{name}`" in PAGE.partition("## Not tested")[2]


def test_the_page_shows_one_sha256_of_all_and_it_is_the_references() -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| .* \|$", PAGE, re.MULTILINE)]
    rows = [row for row in rows if len(row) == 7 and row[0] != "launcher"]
    launchers = " ".join(row[0] for row in rows)
    for launcher in ("none", "horovodrun --gloo", "horovodrun --mpi", "mpirun", "Ray", "Spark"):
        assert launcher in launchers
    reference = vectors.digest(*reference_stack())
    assert f"gives `{reference}`" in PAGE
    assert {(row[4], row[5]) for row in rows} == {(f"`{reference[:16]}`", "yes")}


def test_the_page_is_of_the_versions_that_are_installed() -> None:
    pins = dict(re.findall(r"^(\w+)==(\S+)$", (LAUNCH / "requirements.txt").read_text(), re.MULTILINE))
    for label, name in (("Ray", "ray"), ("PySpark", "pyspark")):
        assert f"| {label} {pins[name]} |" in PAGE
