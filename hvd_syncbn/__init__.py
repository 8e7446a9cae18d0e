"""Synchronized batch normalization for Horovod: the same bits on every rank, world size and framework.

Import a framework's face, not this package: ``hvd_syncbn.torch``, ``hvd_syncbn.tensorflow``, ``hvd_syncbn.keras``.
"""

__version__ = "0.1.0"
