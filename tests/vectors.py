"""Moved."""

from hvd_syncbn.vectors import *  # noqa: F403
