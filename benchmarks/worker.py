"""One process of a job: `python -m benchmarks.worker FOLDER`. Writes one line per case to FOLDER/<rank>.jsonl."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import accuracy, kernels, latency, layer, overhead, settings, soak, synchronized
from benchmarks.measure import Framework, Record
from hvd_syncbn.progress import launched_rank

MEASURE: dict[str, Callable[..., Record]] = {
    "layer": layer.measure,
    "kernels": kernels.measure,
    "exact sums": layer.measure_exact_sums,
    "synchronized": synchronized.measure,
    "network": synchronized.measure_network,
    "ddp": synchronized.measure_ddp,
    "packets": settings.measure_packets,
    "latency": latency.measure,
    "training": settings.measure_training,
    "accuracy": accuracy.measure,
    "overhead": overhead.measure,
    "memory": overhead.measure_memory,
    "soak": soak.measure,
}


def _framework(name: str, ranks: int, threads: int, ports: list[int], sets: bool) -> Framework:
    if name == "torch":
        from benchmarks.with_torch import Torch

        return Torch(ranks, threads, ports, sets)
    from benchmarks.with_tensorflow import TensorFlow

    return TensorFlow(ranks, threads, ports, sets)


def main() -> None:
    """Run the job's cases in order."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    rank = launched_rank()
    cores = sorted(os.sched_getaffinity(0))
    if job["pin"]:
        os.sched_setaffinity(0, cores[: job["threads"]] if job["ranks"] == 1 else {cores[rank % len(cores)]})
    with open(folder / f"{rank}.jsonl", "w", buffering=1) as log:
        framework = _framework(job["framework"], job["ranks"], job["threads"], job["ports"], job["sets"])
        for case in job["cases"]:
            options, start = dict(case), time.monotonic()
            record = MEASURE[options.pop("kind")](framework, **options)
            log.write(json.dumps({"case": case, "seconds": time.monotonic() - start, **record}) + "\n")
    # Skip the frameworks' exit handlers: TensorFlow's strategy waits there for workers that have exited.
    framework.barrier()
    framework.shutdown()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
