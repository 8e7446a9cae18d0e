"""The digest alone: all that one rank can say."""

from tests.parallel.checks.tensorflow import check_one_digest as _check


def check_one_digest() -> list[str]:
    return _check()
