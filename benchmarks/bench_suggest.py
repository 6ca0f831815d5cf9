"""Claim: the next learning rate costs less than 10 ms on a CPU core, less than 1 ms on a GPU.

    python benchmarks/bench_suggest.py                        # a table for this device
    python benchmarks/bench_suggest.py --quick --check        # few rounds, exit code 1 after a FAIL
    python benchmarks/bench_suggest.py --json suggest.json    # also the numbers

A suggestion is all that AutoLRS does between two trials: posterior over the candidates, expected
improvement, argmax. scikit-optimize gets the same trials: it is told the last one, fits its
Gaussian process and is asked for the next point. Measured is the time until the result is there;
on a GPU, also how long the host and the device are busy. The contenders take turns within one
process, on one thread of the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machines
import torch
from torch import Tensor

from lrs_ext import timing
from lrs_ext.autolrs.acquisition import expected_improvement
from lrs_ext.autolrs.surrogate import gp_posterior

TRIALS = 10
CANDIDATES = 512
BOUNDS = (-5.0, -1.0)  # log10 of the learning rate
NOISE = 0.05
OURS = "lrs_ext"
GRAPH = "lrs_ext, CUDA graph"
PEER = "scikit-optimize"
PEER_SAMPLING = f"scikit-optimize, {CANDIDATES} candidates"
MAX_SECONDS = {"cpu": 10e-3, "cuda": 1e-3}
ROUNDS, QUICK_ROUNDS = 50, 2
WARMUP = 3


def trials() -> tuple[Tensor, Tensor]:
    """Positions and losses of a search half done: a valley with noise, 4 decades wide."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(*BOUNDS, TRIALS, dtype=torch.float64)
    noise = torch.randn(TRIALS, dtype=torch.float64, generator=generator)
    return x, 1.0 + 0.3 * (x + 2.5).square() + NOISE * noise


def suggestion(device: torch.device) -> Callable[[], Tensor]:
    """Returns what suggests a position, 0-d on the device."""
    x, y = (values.to(device) for values in trials())
    candidates = torch.linspace(*BOUNDS, CANDIDATES, dtype=torch.float64).to(device)

    def suggest() -> Tensor:
        mean, std = gp_posterior(x, y, NOISE, candidates)
        gain = expected_improvement(mean, std, y.amin())
        return candidates.index_select(0, gain.argmax().reshape(1))

    return suggest


def captured(suggest: Callable[[], Tensor], device: torch.device) -> tuple[timing.Call, Tensor]:
    """Returns the replay of a suggestion in a CUDA graph, and where its result lies.

    Replays read the tensors of `suggest`, which must live as long.
    """
    for _ in range(WARMUP):  # libraries and kernels load before the capture
        suggest()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = suggest()
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay, result


class Peer:
    """scikit-optimize between two trials; `prepare` tells it all trials but the last."""

    def __init__(self, **options: Any) -> None:
        self._skopt = importlib.import_module("skopt")
        self._options = options
        x, y = trials()
        self._points = [[10.0**position] for position in x.tolist()]
        self._losses = y.tolist()

    def prepare(self) -> None:
        low, high = (10.0**position for position in BOUNDS)
        self._optimizer = self._skopt.Optimizer(
            [self._skopt.space.Real(low, high, prior="log-uniform")],
            base_estimator="GP",
            acq_func="EI",
            n_initial_points=TRIALS,
            random_state=0,
            **self._options,
        )
        self._optimizer.tell(self._points[:-1], self._losses[:-1], fit=False)

    def suggest(self) -> float:
        with warnings.catch_warnings():  # its fits warn of bounds they touch
            warnings.simplefilter("ignore")
            self._optimizer.tell(self._points[-1], self._losses[-1])
            return float(self._optimizer.ask()[0])


def peers() -> tuple[dict[str, Peer], dict[str, str]]:
    """Returns scikit-optimize, by default and with as many candidates as ours, or why not."""
    try:
        sampling = {
            "acq_optimizer": "sampling",
            "acq_optimizer_kwargs": {"n_points": CANDIDATES},
        }
        return {PEER: Peer(), PEER_SAMPLING: Peer(**sampling)}, {}
    except ImportError as error:
        return {}, {PEER: f"{error}: pip install scikit-optimize to compare with it"}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch, and the BLAS of what is imported by now, to one thread of the CPU."""
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            limits = importlib.import_module("threadpoolctl").threadpool_limits
            stack.enter_context(limits(1))
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        yield


def measure(device: torch.device, rounds: int, opponents: dict[str, Peer]) -> dict[str, Any]:
    """Returns plain numbers for JSON, times in seconds."""
    missing: dict[str, str] = {}
    suggest = suggestion(device)
    calls: dict[str, timing.Call] = {OURS: suggest}
    suggested = {OURS: suggest()}
    if device.type == "cuda":
        try:
            calls[GRAPH], suggested[GRAPH] = captured(suggest, device)
        except Exception as error:  # the others' numbers are worth having all the same
            missing[GRAPH] = f"{type(error).__name__}: {error}".splitlines()[0]

    def prepare(name: str) -> None:
        if name in opponents:
            opponents[name].prepare()

    def until_there(call: timing.Call) -> timing.Call:
        def wait() -> None:
            call()
            timing.synchronize(device)

        return wait

    elapsed_calls = {name: until_there(call) for name, call in calls.items()}
    elapsed_calls |= {name: opponent.suggest for name, opponent in opponents.items()}
    timing.host_seconds(elapsed_calls, WARMUP, device, prepare)
    elapsed = timing.host_seconds(elapsed_calls, rounds, device, prepare)
    rows: dict[str, dict[str, Any]] = {
        name: {"name": name, "seconds": dataclasses.asdict(spread), "host": None, "device": None}
        for name, spread in elapsed.items()
    }
    if device.type == "cuda":
        host = timing.host_seconds(calls, rounds, device)
        busy = timing.device_seconds(calls, rounds, device, host)
        for name, call in calls.items():
            rows[name]["host"] = dataclasses.asdict(host[name])
            rows[name]["device"] = dataclasses.asdict(busy[name])
            rows[name]["launches"] = machines.launches(call)
    for name, opponent in opponents.items():
        opponent.prepare()
        rows[name]["suggested_lr"] = opponent.suggest()
    for name, position in suggested.items():
        rows[name]["suggested_lr"] = 10.0 ** position.item()
    return {"rows": list(rows.values()), "missing": missing}


def checks(bench: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Compares what was measured with what it must reach."""
    limit = MAX_SECONDS[device.type]
    found = [
        {
            "what": f"{row['name']}: until the result is there",
            "measured": milliseconds(row["seconds"]),
            "target": f"< {limit * 1e3:g} ms",
            "passed": row["seconds"]["median"] < limit,
        }
        for row in bench["rows"]
        if row["name"] in (OURS, GRAPH)
    ]
    lrs = {row["name"]: row["suggested_lr"] for row in bench["rows"]}
    if GRAPH in lrs:
        found.append(
            {
                "what": f"{GRAPH}: suggested lr",
                "measured": f"{lrs[GRAPH]:.3g}",
                "target": f"{lrs[OURS]:.3g}",
                "passed": math.isclose(lrs[GRAPH], lrs[OURS], rel_tol=1e-6),
            }
        )
    if GRAPH in bench["missing"]:
        found.append(
            {
                "what": GRAPH,
                "measured": bench["missing"][GRAPH],
                "target": "captures",
                "passed": False,
            }
        )
    return found


def milliseconds(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    return "{median:.3f} ({lower:.3f} to {upper:.3f}) ms".format(
        **{name: value * 1e3 for name, value in spread.items()}
    )


def table(bench: dict[str, Any]) -> str:
    """Medians with quartiles, a row a contender."""
    lines = [
        f"One suggestion: {TRIALS} trials, {CANDIDATES} candidates; median (quartiles)",
        "",
        "| contender | until the result is there | host | device | launches | suggested lr |",
        "|---|---|---|---|---|---|",
    ]
    for row in bench["rows"]:
        times = " | ".join(milliseconds(row[key]) for key in ("seconds", "host", "device"))
        launches = row.get("launches") or "-"
        lines.append(f"| {row['name']} | {times} | {launches} | {row['suggested_lr']:.3g} |")
    lines += ["", *(f"Not measured: {name}: {why}" for name, why in bench["missing"].items())]
    for check in bench["checks"]:
        verdict = "PASS" if check["passed"] else "FAIL"
        lines.append(f"{verdict} {check['what']}: {check['measured']}, target {check['target']}")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu, cuda or cuda:N ({default})")
    parser.add_argument("--quick", action="store_true", help="a few rounds")
    parser.add_argument("--rounds", type=int, help=f"of each measurement ({ROUNDS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a check fails")
    args = parser.parse_args(argv)
    if args.device.partition(":")[0] not in MAX_SECONDS:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {args.device}")
    args.device = torch.device(args.device)
    devices = torch.cuda.device_count()
    if args.device.type == "cuda" and (args.device.index or 0) >= devices:
        parser.error(f"{args.device} is not here (CUDA devices: {devices}): use --device cpu")
    if args.rounds is None:
        args.rounds = QUICK_ROUNDS if args.quick else ROUNDS
    if args.rounds < 1:
        parser.error(f"--rounds must be positive, got {args.rounds}")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}: create it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device.index or 0)
    opponents, missing = peers()
    with one_thread():
        bench: dict[str, Any] = {"machine": machines.machine(args.device)}
        bench |= measure(args.device, args.rounds, opponents)
    bench["missing"] |= missing
    bench["checks"] = checks(bench, args.device)
    print("\n".join(f"{name}: {value}" for name, value in bench["machine"].items()))
    print(f"\n{table(bench)}")
    if args.json is not None:
        args.json.write_text(json.dumps(bench, indent=1) + "\n", encoding="utf-8")
    return 1 if args.check and not all(check["passed"] for check in bench["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
