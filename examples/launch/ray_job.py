"""Two ranks as Ray actors: ``python ray_job.py``, in the cluster of RAY_ADDRESS or else in one of its own on this machine."""

from __future__ import annotations

import job
import ray
from horovod.ray import RayExecutor
from ray import cloudpickle

if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(job)  # else every node would need the file
    ray.init(include_dashboard=False)
    executor = RayExecutor(RayExecutor.create_settings(timeout_s=120), num_workers=2, cpus_per_worker=1)
    executor.start()
    ranks, words = zip(*executor.run(job.train), strict=True)
    executor.shutdown()
    ray.shutdown()
    assert ranks == (0, 1) and words[0] == words[1], (ranks, words)
    print(f"launched: {words[0]}", flush=True)
