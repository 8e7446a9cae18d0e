"""Two ranks as Spark tasks: ``spark-submit --master "local[2]" spark_job.py``, or with the master of a cluster."""

from __future__ import annotations

import cloudpickle
import horovod.spark
import job
from pyspark.sql import SparkSession

if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(job)  # else every node would need the file
    session = SparkSession.builder.appName("hvd-syncbn").getOrCreate()
    ranks, words = zip(*horovod.spark.run(job.train, num_proc=2, use_gloo=True, start_timeout=180, verbose=0), strict=True)
    session.stop()
    assert ranks == (0, 1) and words[0] == words[1], (ranks, words)
    print(f"launched: {words[0]}", flush=True)
