"""Run two ranks as Ray actors: ``python ray_job.py``, in the cluster of RAY_ADDRESS or in a new one on this machine."""

from __future__ import annotations

import job
import ray
from horovod.ray import RayExecutor
from ray import cloudpickle

if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(job)  # otherwise every node needs the file
    ray.init(include_dashboard=False)
    executor = RayExecutor(RayExecutor.create_settings(timeout_s=120), num_workers=2, cpus_per_worker=1)
    executor.start()
    ranks, reports = zip(*executor.run(job.train), strict=True)
    executor.shutdown()
    ray.shutdown()
    assert ranks == (0, 1) and reports[0] == reports[1], (ranks, reports)
    print(f"launched: {reports[0]}", flush=True)
