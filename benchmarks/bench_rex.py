"""Claim: REX is the best schedule in most settings and budgets (arXiv 2107.04197). Does it hold?

    python benchmarks/bench_rex.py --quick     # a fifth of the updates, one seed: three minutes
    python benchmarks/bench_rex.py             # all of it; goes on if stopped

Five settings, six budgets, twelve schedules. The learning rate of each is tuned on validation data
in multiples of 3, with a seed of its own; then three seeds are trained and tested once. A job is a
stack of many models; its result is appended to a file at once, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from job_runner import append_results
from rex_runs import (
    FULL,
    QUICK,
    Job,
    Row,
    Scale,
    expected_work,
    missing_jobs,
    places,
    read_results,
    run_job,
)
from tqdm import tqdm

RUNS = Path(__file__).resolve().parent.parent / "runs"


def run_missing(scale: Scale, args: argparse.Namespace) -> dict[Job, Row]:
    """Runs jobs until nothing is missing and returns all results."""
    files = [*args.start_from, args.results]
    results = read_results(files)
    bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} core-s [{elapsed}<{remaining}]"
    with tqdm(unit_scale=0.001, smoothing=0.05, bar_format=bar_format) as bar:
        while jobs := missing_jobs(places(scale, results), results):
            bar.total = bar.n + remaining_work(scale, results)
            bar.refresh()
            append_results(run_job, jobs, work_of, args.results, args.workers, bar)
            results = read_results(files)
    return results


def work_of(job: Job) -> int:
    return job.work


def remaining_work(scale: Scale, results: dict[Job, Row]) -> int:
    done = sum(job.work for place in places(scale, results) for job in place.jobs if job in results)
    return expected_work(scale, results) - done


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (one a core)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="appended to (runs/rex.jsonl; rex-quick.jsonl)"
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="other results to use, not written to",
    )
    parser.add_argument("--quick", action="store_true", help="fewer updates, budgets and seeds")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.results is None:
        args.results = RUNS / ("rex-quick.jsonl" if args.quick else "rex.jsonl")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    scale = QUICK if args.quick else FULL
    try:
        run_missing(scale, args)
    except KeyboardInterrupt:
        print(f"\nstopped: the same command goes on from {args.results}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
