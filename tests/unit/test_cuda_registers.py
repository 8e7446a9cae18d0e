"""docs/cuda_registers.csv: no kernel spills, and the table is of these sources."""

from __future__ import annotations

import csv
import shutil

import pytest

from tools import cuda_registers

pytestmark = pytest.mark.slow


def rows() -> list[dict[str, str]]:
    with cuda_registers.TABLE.open(newline="") as table:
        return list(csv.DictReader(table))


def test_no_kernel_spills() -> None:
    kernels = rows()[:-1]
    # 4 element types; 6 forms of each moment kernel, of 16-bit types 7 and forward 5 more for integers; 4 of each apply kernel.
    assert len(kernels) == 2 * (2 * (4 * 6 + 2) + 2 * 5 + 2 * 4 * 4)
    assert {row["architecture"] for row in kernels} == set(cuda_registers.ARCHITECTURES)
    for row in kernels:
        assert (row["stack bytes"], row["spill stores"], row["spill loads"]) == ("0", "0", "0"), row


def test_table_is_of_these_sources() -> None:
    assert rows()[-1]["kernel"] == cuda_registers.digest(), "run `python tools/cuda_registers.py` where nvcc is"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_row_equals_compiler() -> None:
    """The smallest source, compiled again."""
    want = [tuple(row.values()) for row in rows()[:-1] if row["architecture"] == "90" and "BackwardApply" in row["kernel"]]
    assert cuda_registers.measure("backward_apply", "90") == want
