"""The hosts that all tests of this folder share; where this machine cannot have them, all are skipped for one reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Hosts


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    try:
        made = Hosts(4)
    except RuntimeError as error:
        pytest.skip(str(error))
    with made:
        yield made
