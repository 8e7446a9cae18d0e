"""``hvd-syncbn build-horovod``, implemented in ``hvd_syncbn.horovod_build``, which also runs before this package is built."""

from hvd_syncbn.horovod_build import DESCRIPTION, EPILOG, add_arguments, run

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
