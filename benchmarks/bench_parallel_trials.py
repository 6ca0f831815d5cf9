"""Claim: trials at once find as good a peak in 1/ranks of the time of trials one after another.

    python benchmarks/bench_parallel_trials.py                     # 2 ranks, one thread each
    python benchmarks/bench_parallel_trials.py --ranks 4 --seeds 1 --json waves.json

Every rank is a process of one thread under DistributedDataParallel with gloo. A run searches with
as many candidates, one after another or a rank's each at once, and trains within the same budget of
updates, in which a wave of trials counts once. The two take turns, seed by seed. Trials at once see
the batches of one rank, so their gradients are noisier than those of training.

- search: seconds from the first update to the end of the last trial, median over seeds.
- peak: learning rate found; its ratio is the geometric mean over seeds.
- loss: test loss at the end, mean over seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from autolrs_contestants import DECADES, rate_bounds
from autolrs_tasks import TASKS
from job_runner import ONE_THREAD
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import lrs_ext

TIMEOUT = datetime.timedelta(minutes=10)
OTHER_DATA = 1000  # between the seeds of two ranks' batches

Row = dict[str, Any]


def run(name: str, seed: int, at_once: bool, options: argparse.Namespace) -> Row:
    """Returns what one run of all ranks has found, on each of them."""
    task = TASKS[name]
    torch.manual_seed(seed)
    model = DistributedDataParallel(task.model(seed))
    optimizer = task.optimizer(model.parameters(), task.centre)
    auto = lrs_ext.AutoLRS(
        optimizer,
        model,
        rate_bounds(task, DECADES),
        options.steps,
        num_trials=options.trials,
        trial_steps=options.trial_steps,
        parallel_trials=at_once,
    )
    searched = None
    distributed.barrier()
    begin = time.perf_counter()
    for batch in auto.batches(task.batches(seed + OTHER_DATA * distributed.get_rank())):
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        auto.step(loss.detach())
        if searched is None and auto.phase == "train":
            searched = time.perf_counter() - begin
    return {
        "task": name,
        "seed": seed,
        "at_once": at_once,
        "search": searched,
        "peak": auto.history.stages[0].best_lr,
        "loss": float(task.evaluate(model.module, "test")),
    }


def work(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=options.ranks,
        timeout=TIMEOUT,
    )
    run(options.tasks[0], 0, True, options)  # imports and first calls are not to be measured
    rows = [
        run(name, seed, at_once, options)
        for name in options.tasks
        for seed in range(options.seeds)
        for at_once in (False, True)
    ]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()


def summary(rows: list[Row]) -> list[Row]:
    """Returns a line for each task.

    >>> rows = [
    ...     {"task": "t", "at_once": False, "search": 2.0, "peak": 0.1, "loss": 1.0},
    ...     {"task": "t", "at_once": True, "search": 1.0, "peak": 0.2, "loss": 1.1},
    ... ]
    >>> summary(rows)[0]["faster"], round(summary(rows)[0]["peak_ratio"], 9)
    (2.0, 2.0)
    """
    lines = []
    for name in dict.fromkeys(row["task"] for row in rows):
        turns, waves = (
            [row for row in rows if row["task"] == name and row["at_once"] == at_once]
            for at_once in (False, True)
        )
        search = [statistics.median(row["search"] for row in part) for part in (turns, waves)]
        peaks = [statistics.geometric_mean(row["peak"] for row in part) for part in (turns, waves)]
        losses = [statistics.mean(row["loss"] for row in part) for part in (turns, waves)]
        lines.append(
            {
                "task": name,
                "search_in_turn": search[0],
                "search_at_once": search[1],
                "faster": search[0] / search[1],
                "peak_in_turn": peaks[0],
                "peak_ratio": peaks[1] / peaks[0],
                "loss_in_turn": losses[0],
                "loss_ratio": losses[1] / losses[0],
            }
        )
    return lines


def report(rows: list[Row], options: argparse.Namespace) -> str:
    lines = [
        f"{options.ranks} ranks, {options.trials} trials of {options.trial_steps} updates, "
        f"{options.steps} updates in all, {options.seeds} seeds",
        "",
        "| task | search in turn | at once | faster | peak in turn | at once, ratio | test loss in "
        "turn | at once, ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {line['task']} | {line['search_in_turn']:.2f} s | {line['search_at_once']:.2f} s | "
        f"{line['faster']:.2f} | {line['peak_in_turn']:.2g} | {line['peak_ratio']:.2f} | "
        f"{line['loss_in_turn']:.3g} | {line['loss_ratio']:.3f} |"
        for line in summary(rows)
    ]
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits", "text", "photos"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--trial-steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the single runs to a file")
    options = parser.parse_args(argv)
    for name, least in (("ranks", 1), ("seeds", 1), ("trials", 3), ("trial_steps", 1)):
        value = getattr(options, name)
        if value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    search = options.trials * options.trial_steps
    if options.steps <= 2 * search:
        parser.error(
            f"{options.trials} trials of {options.trial_steps} updates need --steps above "
            f"{2 * search}, got {options.steps}"
        )
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}: create it")
    return options


def main() -> None:
    options = parse_args()
    os.environ.update(ONE_THREAD)  # read when a process starts
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, options), nprocs=options.ranks)
        rows = json.loads(Path(folder, "rows.json").read_text())
    print(report(rows, options))
    if options.json:
        options.json.write_text(
            json.dumps({"options": vars(options) | {"json": None}, "rows": rows})
        )


if __name__ == "__main__":
    main()
