"""``hvd-syncbn build-horovod``: ``hvd_syncbn.horovod_build`` has it all, because it runs before anything of ours is built."""

from hvd_syncbn.horovod_build import DESCRIPTION, EPILOG, add_arguments, run

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
