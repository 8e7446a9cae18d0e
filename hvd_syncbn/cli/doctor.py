"""``hvd-syncbn doctor``: checks the installation and prints how to fix problems; with ``-np`` it also measures packets between
the ranks of a cluster. It changes nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvd_syncbn import __version__, horovod_build
from hvd_syncbn.cli import job
from hvd_syncbn.cli.packets import DISTRIBUTED, ENOUGH_RANKS, STAGES, Cluster, advice, measure

DESCRIPTION = "Check the installation and print how to fix problems; with -np, measure packets between ranks."

# Probes run in separate processes, because a library built for another version may crash, which doctor must report.
_PROBE = """
import json, os
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
try:
    found = {{}}
    {body}
except BaseException as error:
    found = {{"error": f"{{type(error).__name__}}: {{error}}".partition("\\n")[0]}}
print("\\n" + json.dumps(found))
"""
_HOROVOD_PARTS = "found = {part: bool(getattr(hvd, part + '_built')()) for part in ('gloo', 'mpi', 'nccl')}"
_GPUS = {
    "torch": "import torch; found['gpus'] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]",
    "tensorflow": """import tensorflow as tf
    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    found['gpus'] = [detail.get("device_name", "unknown") for detail in details]""",
}
_PROBE_TIMEOUT_S = 120
# The number of tensors in the cache of the Horovod that build-horovod builds (patch 0028).
CACHE_CAPACITY = 8192

WARM_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
"""Makes glibc reuse the memory of large tensors; by default it maps new pages for each, and every page costs a fault."""


class Finding(NamedTuple):
    """One row of doctor's table, and the command that fixes it if it is a problem."""

    what: str
    found: str
    fix: str | None = None


def _probe(body: str) -> dict[str, object]:
    """Run Python statements that fill the dict `found` and return it; `error` is set if that failed."""
    code = _PROBE.format(body=body)
    try:
        result = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_PROBE_TIMEOUT_S} s"}
    if result.returncode < 0:
        return {"error": f"crashed with {signal.Signals(-result.returncode).name}"}
    if result.returncode:
        return {"error": f"ended with exit status {result.returncode}"}
    found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return found


def _built_with(found: dict[str, object]) -> str:
    return ", ".join(part for part in ("gloo", "mpi", "nccl") if found[part]) or "no controller"


def _package_version(name: str) -> str | None:
    return importlib.metadata.version(name) if importlib.util.find_spec(name) is not None else None


def _reinstall_command() -> str:
    checkout = Path(__file__).resolve().parents[2]
    what = f"-e {checkout}" if (checkout / "pyproject.toml").exists() else "--force-reinstall hvd-syncbn"
    return f"{sys.executable} -m pip install --no-build-isolation --no-deps {what}"


def examine() -> list[Finding]:
    """Check everything that a training job needs and return the findings."""
    frameworks = horovod_build.framework_versions()
    build_horovod = f"{sys.executable} -m hvd_syncbn.horovod_build"
    core_body = "from hvd_syncbn import native; found['isa'] = native.isa(); found['cuda'] = native.has_cuda()"
    bodies = {"native core": core_body}
    for name in frameworks:
        bodies[f"{name} ops"] = f"import hvd_syncbn.{name}"
        bodies[f"Horovod for {name}"] = f"import horovod.{name} as hvd; {_HOROVOD_PARTS}"
    for name in horovod_build.cuda_frameworks():
        bodies[f"{name} GPUs"] = _GPUS[name]
    with ThreadPoolExecutor(max_workers=2) as pool:
        probes = dict(zip(bodies, pool.map(_probe, bodies.values()), strict=True))

    findings = [
        Finding("hvd-syncbn", __version__),
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
    ]
    for name in ("torch", "tensorflow"):
        findings.append(Finding(name, frameworks.get(name, "not installed")))
    if not frameworks:
        fix = f"{sys.executable} -m pip install torch (or tensorflow)"
        findings.append(Finding("frameworks", "neither PyTorch nor TensorFlow is installed", fix))
    keras = _package_version("keras")
    if keras is not None:
        findings.append(Finding("Keras", keras))

    if importlib.util.find_spec("horovod") is None and frameworks:
        what = f"not installed: jobs of torchrun and tf.distribute need none; for horovodrun: {build_horovod}"
        findings.append(Finding("Horovod", what))
    else:
        findings += [Finding("Horovod", problem, build_horovod) for problem in horovod_build.check()]
    if importlib.util.find_spec("horovod") is not None:
        findings.append(Finding("Horovod", _package_version("horovod") or "unknown"))
        for name in frameworks:
            found = probes[f"Horovod for {name}"]
            if "error" in found:
                findings.append(Finding(f"Horovod for {name}", str(found["error"]), build_horovod))
            else:
                findings.append(Finding(f"Horovod for {name}", f"built with {_built_with(found)}"))

    core = probes["native core"]
    if "error" in core:
        findings.append(Finding("native core", str(core["error"]), _reinstall_command()))
    else:
        findings.append(Finding("native core", f"loads, instruction set {core['isa']}"))
    for name in frameworks:
        found = probes[f"{name} ops"]
        if "error" in found:
            findings.append(Finding(f"{name} ops", str(found["error"]), _reinstall_command()))
        else:
            findings.append(Finding(f"{name} ops", "load"))

    gpus = _gpus(probes)
    on_cpu = "torch" in frameworks and not probes.get("torch GPUs", {}).get("gpus")
    advice = _advice() if importlib.util.find_spec("horovod") is not None else []
    return findings + gpus + advice + (_memory() if on_cpu else [])


def _gpus(probes: dict[str, dict[str, object]]) -> list[Finding]:
    """Return the findings about GPUs for frameworks that are CUDA builds."""
    findings = []
    for name in _GPUS:
        found = probes.get(f"{name} GPUs")
        if found is None:
            continue
        names = found.get("gpus")
        if not isinstance(names, list) or not names:
            why = str(found["error"]) if "error" in found else "none available"
            findings.append(Finding(f"{name} GPUs", why))
            continue
        findings.append(Finding(f"{name} GPUs", f"{len(names)}: {', '.join(dict.fromkeys(names))}"))
        core, horovod = probes["native core"], probes.get(f"Horovod for {name}", {})
        if not core.get("cuda") and "error" not in core:
            what = "not built in, so the layers reject GPU tensors; reinstall with nvcc in PATH (or in CUDACXX)"
            findings.append(Finding("CUDA kernels", what, _reinstall_command()))
        elif core.get("cuda"):
            findings.append(Finding("CUDA kernels", "built in"))
        if horovod and "error" not in horovod and not horovod.get("nccl"):
            what = "Horovod is built without NCCL: packets go through host memory"
            fix = f"{sys.executable} -m hvd_syncbn.horovod_build --with-nccl"
            findings.append(Finding(f"GPU collectives of {name}", what, fix))
    return findings


def _is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def _advice() -> list[Finding]:
    """Return advice that makes a job faster (from `hvd-syncbn bench`) or prevents endless waiting."""
    cycle = os.environ.get("HOROVOD_CYCLE_TIME")
    value = f"{cycle} ms" if cycle else "1 ms, the default"
    findings = [Finding("HOROVOD_CYCLE_TIME", f"{value}: layers do not wait for it in the Horovod that build-horovod builds")]
    return findings + _negotiation() + _stalls()


def _negotiation() -> list[Finding]:
    """Return settings that make ranks negotiate tensors again that Horovod caches by default."""
    findings = []
    name = "HOROVOD_CACHE_CAPACITY"
    capacity = os.environ.get(name, "")
    if capacity.isdecimal() and int(capacity) < CACHE_CAPACITY:
        what = "ranks negotiate every packet again"
        if int(capacity):
            what = (
                "in a network with more tensors than that (a convolution with its norm has 5) ranks negotiate all of them again"
            )
        findings.append(Finding(name, f"{capacity}: {what}; unset it, the default is {CACHE_CAPACITY}"))
    if _is_set("HOROVOD_AUTOTUNE"):
        what = "set: tunes for large fused tensors, which packets are not, and disables the cache during part of its search"
        findings.append(Finding("HOROVOD_AUTOTUNE", f"{what}; unset it"))
    return findings


def _memory() -> list[Finding]:
    """Return advice about glibc, which maps new pages for each large CPU tensor of PyTorch; other allocators reuse memory."""
    if any(name in os.environ for name in WARM_MEMORY) or "malloc" in os.environ.get("LD_PRELOAD", ""):
        return []
    setting = " ".join(f"{name}={value}" for name, value in WARM_MEMORY.items())
    advice = "not set: PyTorch on a CPU gets new pages for every large tensor, and every page costs a fault"
    return [Finding("MALLOC_MMAP_MAX_", f"{advice}; {setting} reuses them (a step was 1.1 to 2 times as fast)")]


def _stalls() -> list[Finding]:
    """Return what happens to ranks that wait for a missing rank."""
    check, shutdown = (f"HOROVOD_STALL_{name}_TIME_SECONDS" for name in ("CHECK", "SHUTDOWN"))
    if _is_set("HOROVOD_STALL_CHECK_DISABLE"):
        return [Finding("HOROVOD_STALL_CHECK_DISABLE", "set: ranks wait for each other without a warning; unset it")]
    warns, ends = os.environ.get(check, "60"), os.environ.get(shutdown, "0")
    findings = [Finding(check, f"{warns} s{'' if check in os.environ else ', the default'}: then a warning names the layers")]
    if ends == "0":
        advice = "0: ranks wait forever for a missing rank; set it above the longest pause (checkpoint, evaluation), e.g. 600"
    elif float(ends) <= float(warns):
        advice = f"{ends} s: has no effect, because it must be more than {check}, {warns} s"
    else:
        advice = f"{ends} s: then every waiting rank gets an error"
    return [*findings, Finding(shutdown, advice)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    job.add_arguments(parser, ("horovodrun", "torchrun"))


def run(args: argparse.Namespace) -> int:
    """Print the findings and fixes; return 1 if there is a problem or the ranks could not be measured."""
    hosts = job.hosts_of(args)
    cluster, failure = None, None
    with Console(stderr=True).status("Checking the frameworks, Horovod and the native parts") as status:
        findings = examine()
        if hosts is not None and any(finding.fix for finding in findings):
            failure = "the installation has problems. Fix them first"
        elif hosts is not None:
            framework = "torch" if args.launcher == "torchrun" else next(iter(horovod_build.framework_versions()))

            def note(text: str) -> None:
                status.update(f"Measuring: {text}")

            try:
                cluster = measure(framework, hosts, args.time_limit, note, args.launcher)
            except job.JobError as error:
                failure = str(error)
    if args.json:
        found: dict[str, Any] = {"findings": [finding._asdict() for finding in findings], "failure": failure}
        print(json.dumps(found | ({} if cluster is None else _as_json(cluster)), indent=1))
    else:
        show(findings)
        if cluster is not None:
            show_cluster(cluster)
        if failure is not None:
            Console(highlight=False).print(Text(f"\nThe ranks could not be measured: {failure}", "red"), soft_wrap=True)
    return 1 if failure or any(finding.fix for finding in findings) else 0


def show(findings: list[Finding]) -> None:
    """Print the findings as a table, and the fixes."""
    console = Console(highlight=False)
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row("[red]✗[/]" if finding.fix else "[green]✓[/]", finding.what, Text(finding.found))
    console.print(table)
    # Several problems may have the same fix; print each once.
    fixes = list(dict.fromkeys(finding.fix for finding in findings if finding.fix))
    if fixes:
        console.print("\nTo fix:")
        for fix in fixes:
            console.print(f"  {fix}", markup=False, soft_wrap=True)


def _as_json(cluster: Cluster) -> dict[str, Any]:
    return {
        "hosts": cluster.hosts,
        "controller": cluster.controller,
        "packets": [packet._asdict() | {"model_seconds": cluster.model(packet)} for packet in cluster.packets],
        "breakdowns": [breakdown._asdict() for breakdown in cluster.breakdowns],
        "links": {"across" if across else "inside": link._asdict() for across, link in cluster.links.items()},
        "step_seconds": cluster.steps(),
        "group_size": cluster.group_size(),
    }


_STAGE_LABELS = {
    "call": "call: until the packet is enqueued",
    "cycle": "cycle: until the cycle begins",
    "agreement": "agreement: until all ranks have it",
    "sum": "sum: until it is summed",
    "return": "return: until the caller has the result",
}


def _show_breakdowns(console: Console, cluster: Cluster) -> None:
    """Print the stages of a packet among all ranks, and what makes the slowest stage faster."""
    if cluster.controller == DISTRIBUTED:
        return
    if not cluster.breakdowns:
        console.print("The stages of a packet were not recorded: NCCL completes it later, or Horovod is an older build.")
        return
    table = Table(title="Stages of a packet among all ranks, microseconds, median (99th percentile)", title_justify="left")
    table.add_column("stage")
    for breakdown in cluster.breakdowns:
        table.add_column(f"{breakdown.bytes / 1e3:.0f} kB", justify="right")
    for stage in STAGES:
        cells = (breakdown.stages[stage] for breakdown in cluster.breakdowns)
        table.add_row(_STAGE_LABELS[stage], *(f"{1e6 * middle:.1f} ({1e6 * late:.0f})" for middle, late in cells))
    shares = (f"{100 * breakdown.ran_by_caller:.0f} %" for breakdown in cluster.breakdowns)
    table.add_row("packets that the waiting thread ran itself", *shares)
    console.print(table)
    for breakdown in cluster.breakdowns:
        size = f"{breakdown.bytes / 1e3:.0f} kB"
        console.print(f"Slowest stage at {size}: {breakdown.slowest()}: {advice(cluster, breakdown)}", soft_wrap=True)


def show_cluster(cluster: Cluster) -> None:
    """Print the measurements, the cost model's predictions, and the cost per training step."""
    console = Console(highlight=False)
    ranks, hosts = len(cluster.hosts), len(set(cluster.hosts))
    title = f"Packets between {ranks} ranks on {hosts} host{'s' * (hosts > 1)}, {cluster.controller}, milliseconds"
    table = Table(title=title, title_justify="left")
    table.add_column("ranks")
    for column in ("packet, kB", "measured", "model", "model / measured"):
        table.add_column(column, justify="right")
    for packet in cluster.packets:
        label = f"all {ranks}" if packet.size == ranks else f"{packet.groups} x {packet.size}"
        label += ", one of every host" if not packet.neighbours else f", {packet.spans} hosts each" if packet.spans > 1 else ""
        model = cluster.model(packet)
        times = f"{1e3 * packet.seconds:.2f}", f"{1e3 * model:.2f}", f"{model / packet.seconds:.2f}"
        table.add_row(label, f"{packet.bytes / 1e3:.0f}", *times)
    console.print(table)
    _show_breakdowns(console, cluster)
    for across, link in cluster.links.items():
        console.print(
            f"{'Between hosts' if across else 'Inside a host'}: wait {1e6 * link.wait:.0f} us, "
            f"{1e6 * link.alpha:.0f} us per message, {1e9 * link.beta:.2f} ns per byte"
        )
    if ranks == 2:
        console.print("(Two ranks cannot separate waiting from messages. Measure more ranks to predict larger jobs.)")
    steps = cluster.steps()
    table = Table(
        title="Milliseconds of a training step in packets, by ranks that share a batch", title_justify="left", min_width=76
    )
    table.add_column("network")
    for size in next(iter(steps.values())):
        table.add_column(f"all {size}" if size == ranks else str(size), justify="right")
    for name, row in steps.items():
        table.add_row(name, *(f"{1e3 * seconds:.0f}" for seconds in row.values()))
    console.print(table)
    advised, resnet = cluster.group_size(), steps["ResNet-50"]
    if advised is None:
        smallest = f"groups need {ENOUGH_RANKS} ranks for 32 images at 4 each, and must save a third of the time"
        console.print(f"Group size: all {ranks} ranks, the default (process_set=None): {smallest}.")
    else:
        saved = f"{1e3 * resnet[advised]:.0f} ms of a ResNet-50's step instead of {1e3 * resnet[ranks]:.0f}"
        console.print(f"Group size: {advised}, by process_set=groups({advised}).mine: {saved}.")
