"""Claim: with stochastic rounding or a split master, small storage trains as well as float32.

    python benchmarks/bench_storage.py --quick     # one seed, 30 updates: under two minutes
    python benchmarks/bench_storage.py             # all of it; goes on if stopped
    python benchmarks/bench_storage.py --report    # writes benchmarks/results/storage.*

Every run trains the GPT of the main job with AdamW and REX, on one thread; only the storage
differs. Parameters of 16 bits are cast to float32 for the forward and backward pass: their
gradients are rounded to the same type, but a CPU's slow arithmetic on it plays no role. A result is
appended to a file at once; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results_page
import storage_page
import torch
from gpt_config import Config, new_config
from gpt_data import Corpus, load_corpus, sample_batch, validation_batches
from gpt_model import GPT
from gpt_training import MAX_NORM, VALIDATION_BATCHES, build_optimizer
from job_runner import read_lines, run_jobs
from storages import KINDS, measured_bytes
from torch import Tensor

import lrs_ext

RESULTS = Path(__file__).resolve().parent.parent / "runs" / "storage.jsonl"
STEPS, SEEDS = 600, 3
QUICK_STEPS, QUICK_SEEDS = 30, 1
BATCH_SIZE = 8  # half of the main job's
# How far apart float32 runs of one seed end up after the smallest of disturbances.
CONTROL = storage_page.CONTROL


@dataclass(frozen=True)
class Job:
    """One run; its result follows from it alone."""

    kind: str
    steps: int
    seed: int


def job_of(row: dict[str, Any]) -> Job:
    return Job(**{field.name: row[field.name] for field in dataclasses.fields(Job)})


def plan(kinds: Iterable[str], steps: int, seeds: Iterable[int]) -> list[Job]:
    """Returns the runs, first all of the first seed."""
    kinds = list(kinds)
    return [Job(kind, steps, seed) for seed in seeds for kind in kinds]


@functools.cache
def corpus() -> Corpus:
    return load_corpus()


def configuration(job: Job) -> Config:
    given = {"device": "cpu", "steps": job.steps, "seed": job.seed, "batch_size": BATCH_SIZE}
    return new_config(given)


def loss_in_float32(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss with the parameters cast to float32; gradients get the parameters' dtype."""
    params = {name: param.float() for name, param in model.named_parameters()}
    logits = torch.func.functional_call(model, params, (inputs,))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def validation_loss(model: GPT, config: Config) -> float:
    sizes = {"batches": VALIDATION_BATCHES, "batch_size": 16, "context": config.context}
    with torch.no_grad():
        losses = [
            loss_in_float32(model, inputs, targets).item()
            for inputs, targets in validation_batches(corpus().validation, **sizes)
        ]
    return sum(losses) / len(losses)


def run_job(job: Job) -> dict[str, Any]:
    """Trains one model; the result is plain numbers, or an exception's text."""
    row = dataclasses.asdict(job)
    started = time.perf_counter(), time.process_time()
    try:
        numbers = train(job)
    except Exception as error:  # the other runs' results are worth having all the same
        return row | {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    return row | numbers | {"seconds": round(wall, 2), "processor_seconds": round(processor, 2)}


def train(job: Job) -> dict[str, Any]:
    config = configuration(job)
    kind = KINDS["float32" if job.kind == CONTROL else job.kind]
    torch.manual_seed(job.seed)
    model = GPT(layers=config.layers, width=config.width, context=config.context)
    for param in model.parameters():
        if job.kind == CONTROL:
            param.data = param.data.bfloat16().float()
        param.data = param.data.to(kind.param_dtype)
    optimizer = build_optimizer(model, "rex", config, kind.options)
    losses, held, moved = [], math.nan, math.nan
    for step in range(job.steps):
        batch = sample_batch(
            corpus().train,
            seed=job.seed,
            step=step,
            batch_size=config.batch_size,
            context=config.context,
        )
        loss = loss_in_float32(model, *batch)
        loss.backward()
        lrs_ext.clip_grad_norm_(optimizer, MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
        if step == 0:
            held, moved = measured_bytes(optimizer)
        optimizer.zero_grad()
    last = losses[-max(1, job.steps // 20) :]
    numbers = {
        "validation_loss": validation_loss(model, config),
        "training_loss": sum(last) / len(last),
    }
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ArithmeticError(f"the {name} is {value}")
    return numbers | {"bytes_held": held, "bytes_moved": moved}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the results in a file; of two for one job, the later."""
    return list({job_of(row): row for row in read_lines([path])}.values())


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help=f"updates of a run ({STEPS})")
    parser.add_argument("--seeds", type=int, help=f"how many ({SEEDS})")
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND", default=[CONTROL, *KINDS], help="some of them (all)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (one a core)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="appended to (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 30 updates")
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write the page, the numbers, the plot"
    )
    parser.add_argument(
        "--folder", type=Path, default=results_page.FOLDER, help="for --report (%(default)s)"
    )
    args = parser.parse_args(argv)
    args.steps = args.steps if args.steps is not None else QUICK_STEPS if args.quick else STEPS
    args.seeds = args.seeds if args.seeds is not None else QUICK_SEEDS if args.quick else SEEDS
    for kind in args.kinds:
        if kind not in (CONTROL, *KINDS):
            parser.error(f"--kinds: no storage {kind!r}: it must be one of {[CONTROL, *KINDS]}")
    for name in ("steps", "seeds", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    jobs = plan(args.kinds, args.steps, range(args.seeds))
    if not args.report:
        done = {job_of(row) for row in read_rows(args.results) if "error" not in row}
        missing = [job for job in jobs if job not in done]
        print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done", file=sys.stderr)
        try:
            if missing:
                run_jobs(run_job, missing, lambda job: job.steps, args.results, args.workers)
        except KeyboardInterrupt:
            print(f"\nstopped: the same command goes on from {args.results}", file=sys.stderr)
            return 130
    rows = [row for row in read_rows(args.results) if job_of(row) in set(jobs)]
    if not rows:
        print(f"{args.results} has no results: run this without --report", file=sys.stderr)
        return 1
    if args.report:
        config = json.loads(json.dumps(configuration(jobs[0]).to_dict()))
        written = storage_page.write(rows, config, args.folder)
        print("written: " + ", ".join(map(str, written)))
    print(storage_page.main_table(rows))
    errors = [row for row in rows if "error" in row]
    for row in errors:
        print(f"{row['kind']}, seed {row['seed']}: {row['error']}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
