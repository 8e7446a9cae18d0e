"""The project's promise in one line: one sha256 across both frameworks and everything that their own tests vary."""

from __future__ import annotations

import pytest

from tests.parallel import test_tensorflow, test_torch


@pytest.mark.parametrize("ranks", [2, 3])
def test_one_sha256_across_frameworks(ranks: int) -> None:
    in_torch = {d for own in test_torch.job(ranks).values("check_digest") for d in own.values()}
    in_tensorflow = {d for own in test_tensorflow.run("tensorflow", ranks).values("check_one_digest") for d in own}
    assert len(in_torch) == 1
    assert in_torch == in_tensorflow
