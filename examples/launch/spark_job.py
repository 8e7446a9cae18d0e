"""Run two ranks as Spark tasks: ``spark-submit --master "local[2]" spark_job.py``, or with the master of a cluster."""

from __future__ import annotations

import cloudpickle
import horovod.spark
import job
from pyspark.sql import SparkSession

if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(job)  # otherwise every node needs the file
    session = SparkSession.builder.appName("hvd-syncbn").getOrCreate()
    ranks, reports = zip(*horovod.spark.run(job.train, num_proc=2, use_gloo=True, start_timeout=180, verbose=0), strict=True)
    session.stop()
    assert ranks == (0, 1) and reports[0] == reports[1], (ranks, reports)
    print(f"launched: {reports[0]}", flush=True)
