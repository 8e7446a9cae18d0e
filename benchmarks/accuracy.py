"""The error of outputs on a batch with a large mean that is split unevenly between ranks.

4 samples are on one rank and 8 on the other (with slightly different means), with a standard deviation of about 1 around a
large mean. Gamma is in 0.5 to 1.5 and beta is normal, as in a trained network. Exact outputs are computed from the same float32
values in extended precision.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks import measure as m
from benchmarks.jobs import Outcome
from benchmarks.measure import Framework, Record

MEANS = (0.0, 1e2, 1e4, 1e6)
SHAPE = (12, 32, 16, 16)
FIRST_RANK = 4  # samples

Array = NDArray[np.float32]


def cases() -> list[dict[str, Any]]:
    """Return a case for each mean."""
    return [{"kind": "accuracy", "mean": mean} for mean in MEANS]


def batch(mean: float) -> Array:
    """Return the global batch."""
    x = np.random.default_rng(0).standard_normal(SHAPE)
    x[:FIRST_RANK] += 1
    return (mean + x / x.std()).astype(np.float32)


def affine() -> tuple[Array, Array]:
    """Return gamma and beta."""
    generator = np.random.default_rng(1)
    return generator.uniform(0.5, 1.5, SHAPE[1]).astype(np.float32), generator.standard_normal(SHAPE[1]).astype(np.float32)


def exact(x: Array, gamma: Array, beta: Array) -> NDArray[np.longdouble]:
    """Return the outputs in extended precision."""
    wide = x.astype(np.longdouble)
    centered = wide - wide.mean((0, 2, 3), keepdims=True)
    normal = centered / np.sqrt(np.square(centered).mean((0, 2, 3), keepdims=True) + np.longdouble(m.EPS))
    return normal * gamma[:, None, None] + beta[:, None, None]


def ulps(error: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the largest error in float32 units in the last place of max(|y|, 1)."""
    unit = np.spacing(np.maximum(np.abs(expected), 1).astype(np.float32))
    return float(np.max(error / unit))


def measure(framework: Framework, mean: float) -> Record:
    """Return each contestant's largest error on this rank's samples, absolute and in ulps, and the sha256 of its outputs."""
    x = batch(mean)
    mine = slice(0, FIRST_RANK) if framework.rank == 0 else slice(FIRST_RANK, None)
    gamma, beta = affine()
    expected = exact(x, gamma, beta)
    errors: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in framework.synchronized:
        everything = name in m.WHOLE_BATCH
        samples = slice(None) if everything else mine
        try:
            y = framework.normalize(name, x[samples], gamma, beta)[mine if everything else slice(None)]
        except Exception as error:
            errors[name] = m.one_line(error)
            continue
        distance = np.abs(y - expected[mine]).astype(np.float64)
        digest = hashlib.sha256(np.ascontiguousarray(y).tobytes()).hexdigest()
        found[name] = {"error": float(distance.max()), "ulps": ulps(distance, expected[mine]), "sha256": digest}
    return {"found": found, "errors": errors}


def rows(outcomes: list[Outcome]) -> list[Record]:
    """Return a row per framework, mean and contestant: the worst rank's error, and whether our bytes equal one process."""
    found: list[Record] = []
    for outcome in outcomes:
        framework = outcome.job.framework
        for case, _, errors, ranks in outcome.of("accuracy"):
            parts = [record["found"] for record in ranks]
            for name in parts[0]:
                row = {"framework": framework, "mean": case["mean"], "contestant": name}
                if any(all(r[n] == row[n] for n in row) for r in found):
                    continue  # the job with TensorFlow's strategy repeats ours
                # max() would lose a NaN.
                row["error"], row["ulps"] = (float(np.max([part[name][n] for part in parts])) for n in ("error", "ulps"))
                row["sha256"] = [part[name]["sha256"] for part in parts]
                if name == "ours" and "ours alone" in parts[0]:
                    row["equals one process"] = row["sha256"] == [part["ours alone"]["sha256"] for part in parts]
                found.append(row)
            for name, text in errors.items():
                found.append({"framework": framework, "mean": case["mean"], "contestant": name, "failed": text})
    return found


def table(rows: list[Record]) -> Table:
    """Return a table with a row per contestant and a column per mean."""
    result = Table(
        title="Largest output error, float32, 4 samples on one rank and 8 on the other, standard deviation 1, affine",
        title_justify="left",
        caption="'ours alone' and the frameworks' own layers process the whole batch in one process",
    )
    result.add_column("framework")
    result.add_column("layer")
    for mean in MEANS:
        result.add_column(f"mean {mean:g}", justify="right")
    contestants = dict.fromkeys((row["framework"], row["contestant"]) for row in rows)
    for framework, name in contestants:
        cells = []
        for mean in MEANS:
            row = next((r for r in rows if (r["framework"], r["contestant"], r["mean"]) == (framework, name, mean)), None)
            if row is None:
                cells.append("")
            elif "failed" in row:
                cells.append("failed")
            else:
                near = f" ({row['ulps']:.1f} ulp)" if row["ulps"] < 100 else ""
                same = {True: ", equal bytes", False: ", DIFFERENT BYTES", None: ""}[row.get("equals one process")]
                cells.append(f"{row['error']:.1e}{near}{same}")
        result.add_row(m.FRAMEWORKS[framework], m.label(framework, name), *cells)
    return result
