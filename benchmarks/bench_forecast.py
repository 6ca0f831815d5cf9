"""Claim: forecasts err at most half as much as AutoLRS's spline and Nelder-Mead, and never fail.

    python benchmarks/bench_forecast.py                        # thousands of series, a table
    python benchmarks/bench_forecast.py --quick --check        # hundreds, exit code 1 after a FAIL
    python benchmarks/bench_forecast.py --json forecast.json   # also the numbers

Series of n losses, forecast for update 10 n: L(t) = a exp(-b t) + c with L(0) log-uniform between
.1 and 10, c / L(0) uniform, b n log-uniform between .1 and 20, noise with a std log-uniform between
.003 and .2 of L(0): normal, heavy-tailed (Student t, 3 degrees of freedom) or with spikes (2 % of
the losses raised by 20 standard deviations on average). Flat series have a = 0. Apart, and not in
the total: a power law instead of the exponential, a curve that neither method knows.

Errors are shares of L(0), against L without its noise. The opponent is written anew from a
description of AutoLRS's. Where it raises or returns no number it has failed: left out of its own
errors, and shown a second time with the last loss in place of the forecast.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machines
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import UnivariateSpline
from scipy.optimize import minimize

from lrs_ext.autolrs.forecast import forecast

Array = NDArray[np.float64]

LENGTHS = (10, 20, 50, 100, 200, 400, 800)
HORIZON = 10  # lengths
SERIES, QUICK_SERIES = 150, 15  # of each kind and length
KINDS = ("normal", "heavy-tailed", "spikes", "flat")
OUTSIDE = "power law"  # not in the total
RATES, NOISES = (0.1, 0.3, 1.0, 3.0, 20.0), (0.003, 0.01, 0.03, 0.1, 0.2)
MAX_RATIO = 0.5
COVERAGE = (0.85, 0.95)
INTERVAL = 1.645  # standard deviations: 90 % of a normal distribution
OUTLIER_PASSES, OUTLIER_SHARE, TOLERANCE = 10, 0.03, 1e-5


def make_series(
    kind: str, n: int, count: int, rng: np.random.Generator
) -> tuple[Array, dict[str, Array]]:
    """Returns losses, (count, n), and of each series (count,): truth, first, rate (b n), noise."""
    first = 10.0 ** rng.uniform(-1.0, 1.0, (count, 1))
    floor = first * (1.0 if kind == "flat" else rng.uniform(0.0, 1.0, (count, 1)))
    rate = 10.0 ** rng.uniform(-1.0, np.log10(20.0), (count, 1))
    std = first * 10.0 ** rng.uniform(np.log10(0.003), np.log10(0.2), (count, 1))
    noise = rng.standard_normal((count, n))
    if kind == "heavy-tailed":
        noise = rng.standard_t(3, (count, n)) / np.sqrt(3.0)  # variance 1
    if kind == "spikes":
        noise += (rng.random((count, n)) < 0.02) * rng.exponential(20.0, (count, n))

    def curve(t: Array) -> Array:
        decay = (1.0 + rate * t / n) ** -0.5 if kind == OUTSIDE else np.exp(-rate * t / n)
        return floor + (first - floor) * decay

    losses = curve(np.arange(n, dtype=np.float64)) + std * noise
    truth = curve(np.array([float(HORIZON * n)]))
    columns = {"truth": truth, "first": first, "rate": rate, "noise": std / first}
    return losses, {name: values[:, 0] for name, values in columns.items()}


def opponent(losses: Array, horizon: float) -> float:
    """The forecast of AutoLRS: fit a smoothing spline, without outliers, instead of the losses."""
    t = np.arange(len(losses), dtype=np.float64)
    kept = np.arange(len(losses))
    for _ in range(OUTLIER_PASSES):
        residuals = np.abs(UnivariateSpline(kept, losses[kept], k=2)(kept) - losses[kept])
        worst = np.argsort(residuals)[-max(1, int(OUTLIER_SHARE * len(kept))) :]
        kept = np.delete(kept, worst[worst < len(kept) / 2])
    target = UnivariateSpline(kept, losses[kept], k=2)(t)

    def least_squares(log_rate: Array) -> tuple[Array, float]:
        design = np.stack([np.exp(-np.exp(log_rate[0]) * t), np.ones_like(t)], 1)
        solution, squares, *_ = np.linalg.lstsq(design, target, rcond=None)
        return solution, squares[0]  # none if the rank is deficient

    fit = minimize(lambda b: least_squares(b)[1], [0.0], method="Nelder-Mead", tol=TOLERANCE)
    a, c = least_squares(fit.x)[0]
    return float(a * np.exp(-np.exp(fit.x[0]) * horizon) + c)


def opponent_or_nan(losses: Array, horizon: float) -> float:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # scipy's splines warn of their smoothing
        try:
            return opponent(losses, horizon)
        except Exception:  # whatever it is, a server would be dead
            return np.nan


def measure(count: int, seed: int = 0) -> tuple[dict[str, Array], Array]:
    """Returns a column a quantity and an entry a series, and the kinds; errors are of L(0)."""
    rng = np.random.default_rng(seed)
    parts: list[dict[str, Array]] = []
    for kind in (*KINDS, OUTSIDE):
        for n in LENGTHS:
            losses, part = make_series(kind, n, count, rng)
            start = time.perf_counter()
            mean, std = (v.numpy() for v in forecast(torch.from_numpy(losses), HORIZON * n))
            batched = time.perf_counter() - start
            start = time.perf_counter()
            forecast(torch.from_numpy(losses[0]), HORIZON * n)
            alone = time.perf_counter() - start
            start = time.perf_counter()
            theirs = np.array([opponent_or_nan(series, HORIZON * n) for series in losses])
            first, truth = part["first"], part["truth"]
            part["error"], part["std"] = (mean - truth) / first, std / first
            part["their error"] = (theirs - truth) / first
            part["last error"] = (losses[:, -1] - truth) / first
            part["seconds"] = np.full(count, batched / count)
            part["seconds alone"] = np.full(count, alone)
            part["their seconds"] = np.full(count, (time.perf_counter() - start) / count)
            part["length"] = np.full(count, float(n))
            parts.append(part)
    kinds = np.repeat((*KINDS, OUTSIDE), count * len(LENGTHS))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, kinds


def row(name: str, columns: dict[str, Array], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    part = {key: values[chosen] for key, values in columns.items()}
    theirs = part["their error"]
    works = np.isfinite(theirs)
    replaced = np.where(works, theirs, part["last error"])
    errors = {"": part["error"], "their ": theirs[works], "their replaced ": replaced}
    found: dict[str, Any] = {"name": name, "series": int(chosen.sum())}
    for key, values in errors.items():
        found[key + "rmse"] = float(np.sqrt(np.mean(values**2)))
        found[key + "median"] = float(np.median(np.abs(values)))
    found["covered"] = float(np.mean(np.abs(part["error"]) <= INTERVAL * part["std"]))
    found["failures"] = int((~np.isfinite(part["error"] + part["std"])).sum())
    found["their failures"] = float(1.0 - works.mean())
    times = ("seconds", "seconds alone", "their seconds")
    return found | {key: float(np.mean(part[key])) for key in times}


def rows(columns: dict[str, Array], kinds: Array) -> list[dict[str, Any]]:
    total = kinds != OUTSIDE
    falls = total & (kinds != "flat")
    groups = {kind: kinds == kind for kind in KINDS}
    for label, edges, key in (("b n", RATES, "rate"), ("noise", NOISES, "noise")):
        for low, high in itertools.pairwise(edges):
            chosen = falls & (columns[key] >= low) & (columns[key] < high)
            groups[f"{label} {low:g} to {high:g}"] = chosen
    groups |= {f"n = {n}": total & (columns["length"] == n) for n in LENGTHS}
    groups |= {OUTSIDE: ~total, "total": total}
    return [row(name, columns, chosen) for name, chosen in groups.items()]


def checks(total: dict[str, Any]) -> list[tuple[str, bool]]:
    ratio = total["rmse"] / min(total["their rmse"], total["their replaced rmse"])
    low, high = COVERAGE
    return [
        (f"RMSE over theirs: {ratio:.2f}, target <= {MAX_RATIO:g}", ratio <= MAX_RATIO),
        (
            f"90 % intervals hold {total['covered']:.1%}, target {low:.0%} to {high:.0%}",
            low <= total["covered"] <= high,
        ),
        (f"failures: {total['failures']}, target 0", total["failures"] == 0),
    ]


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| series | number | RMSE | theirs | last loss for failures | median error | theirs |"
        " 90 % interval holds | their failures | ms batched | alone | theirs |",
        "|---" * 12 + "|",
    ]
    for r in found:
        errors = ("rmse", "their rmse", "their replaced rmse", "median", "their median")
        cells = [r["name"], str(r["series"]), *(f"{r[key]:.4f}" for key in errors)]
        cells += [f"{r['covered']:.1%}", f"{r['their failures']:.1%}"]
        cells += [f"{1e3 * r[k]:.2f}" for k in ("seconds", "seconds alone", "their seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the series")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a check fails")
    args = parser.parse_args(argv)
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}: create it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = rows(*measure(QUICK_SERIES if args.quick else SERIES))
    finally:
        torch.set_num_threads(threads)
    machine, verdicts = machines.machine(torch.device("cpu")), checks(found[-1])
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print(f"\n{table(found)}\n")
    print("\n".join(f"{'PASS' if passed else 'FAIL'} {what}" for what, passed in verdicts))
    if args.json is not None:
        bench = {"machine": machine, "rows": found, "checks": [list(v) for v in verdicts]}
        args.json.write_text(json.dumps(bench, indent=1) + "\n", encoding="utf-8")
    return 1 if args.check and not all(passed for _, passed in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
