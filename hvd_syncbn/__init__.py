"""Synchronized batch normalization for Horovod, with bitwise identical results on every rank, world size and framework.

Import the module of a framework: ``hvd_syncbn.torch``, ``hvd_syncbn.tensorflow`` or ``hvd_syncbn.keras``.
"""

__version__ = "0.1.0"
