"""Claim: a row of 10 million steps is filled in at most 0.1 s by two cores, whatever the schedule.

    python benchmarks/bench_fill.py                  # a table for this machine
    python benchmarks/bench_fill.py --steps 1000000 --rounds 3 --check   # exit code 1 after a FAIL

The schedules take turns within one process. Next to each: what it costs to let the torch scheduler
of the same curve walk that far, from the steps that it manages in a fraction of a second.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence

import machines
import torch
from torch.optim import lr_scheduler

import lrs_ext
from lrs_ext import Schedule, timing

STEPS = 10_000_000
ROUNDS = 7
MAX_SECONDS = 0.1  # for STEPS
WALKED = 2_000  # steps of a torch scheduler

Walk = Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]


def schedules(steps: int) -> dict[str, Schedule]:
    """Returns every constructor of a profile, as it is used, by what the table calls it."""
    return {
        "rex": lrs_ext.rex(0.1, steps, warmup_steps=steps // 100),
        "linear": lrs_ext.linear(0.1, steps),
        "cosine": lrs_ext.cosine(0.1, steps),
        "exponential": lrs_ext.exponential(0.1, steps),
        "step_decay": lrs_ext.step_decay(0.1, steps),
        "delayed_linear": lrs_ext.delayed_linear(0.1, steps),
        "polynomial, power 2": lrs_ext.polynomial(0.1, steps, power=2.0),
        "polynomial, power 0.9": lrs_ext.polynomial(0.1, steps, power=0.9),
        "one_cycle": lrs_ext.one_cycle(0.1, steps),
        "wsd": lrs_ext.wsd(0.1, steps),
        "inverse_sqrt": lrs_ext.inverse_sqrt(0.1, warmup_steps=1000, capacity=steps),
        "rex, every 1 %": lrs_ext.rex(0.1, steps, sampling="every 1 %"),
        "rex, every 100": lrs_ext.rex(0.1, steps, sampling=100),
    }


# The same curve, where torch has one.
PEERS: dict[str, Walk] = {
    "linear": lambda opt, steps: lr_scheduler.LinearLR(opt, 1.0, 0.0, steps),
    "cosine": lambda opt, steps: lr_scheduler.CosineAnnealingLR(opt, steps),
    "exponential": lambda opt, steps: lr_scheduler.ExponentialLR(opt, math.exp(-3 / steps)),
    "step_decay": lambda opt, steps: lr_scheduler.MultiStepLR(opt, [steps // 2, steps // 4 * 3]),
    "polynomial, power 2": lambda opt, steps: lr_scheduler.PolynomialLR(opt, steps, 2.0),
    "polynomial, power 0.9": lambda opt, steps: lr_scheduler.PolynomialLR(opt, steps, 0.9),
    "one_cycle": lambda opt, steps: lr_scheduler.OneCycleLR(
        opt,
        max_lr=0.1,
        total_steps=steps + 1,
        pct_start=0.5,
        anneal_strategy="linear",
        div_factor=10.0,
        final_div_factor=1.0,
    ),
}


def walk_seconds(walk: Walk, steps: int) -> float:
    """Returns the seconds that `steps` steps of a torch scheduler take, from WALKED of them."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = walk(opt, max(steps, 2 * WALKED))
    opt.step()  # torch warns about a scheduler that is stepped first
    start = time.perf_counter()
    for _ in range(WALKED):
        scheduler.step()
    return (time.perf_counter() - start) / WALKED * steps


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--check", action="store_true", help="exit code 1 where the claim fails")
    options = parser.parse_args(argv)
    for name, least in (("steps", 2_000), ("rounds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    row = torch.empty(options.steps)
    calls = {
        name: lambda schedule=schedule: schedule.fill_(row)
        for name, schedule in schedules(options.steps).items()
    }
    measured = timing.host_seconds(calls, options.rounds, row.device)
    limit = MAX_SECONDS * options.steps / STEPS
    facts = machines.machine(row.device)
    print(f"{options.steps:,} steps on {facts['device']}, {facts['threads']} threads")
    print(f"{'schedule':<24}{'median':>10}{'quartiles':>20}{'torch':>10}  {limit * 1e3:g} ms")
    met = True
    for name, spread in measured.items():
        meets = spread.median <= limit
        met &= meets
        quartiles = f"{spread.lower * 1e3:.1f} to {spread.upper * 1e3:.1f}"
        peer = PEERS.get(name)
        walked = "-" if peer is None else f"{walk_seconds(peer, options.steps):.0f} s"
        print(
            f"{name:<24}{spread.median * 1e3:>7.1f} ms{quartiles:>17} ms{walked:>10}"
            f"  {'ok' if meets else 'FAIL'}"
        )
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
