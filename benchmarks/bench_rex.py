"""Claim: REX is the best schedule in most settings and budgets (arXiv 2107.04197). Does it hold?

    python benchmarks/bench_rex.py --quick     # a fifth of the updates, one seed: three minutes
    python benchmarks/bench_rex.py             # all of it; goes on if stopped
    python benchmarks/bench_rex.py --speed     # stacks of models against single ones
    python benchmarks/bench_rex.py --report    # writes benchmarks/results/rex.*

Five settings, six budgets, twelve schedules. The learning rate of each is tuned on validation data
in multiples of 3, with a seed of its own; then three seeds are trained and tested once. A job is a
stack of many models; its result is appended to a file at once, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import rex_page
import rex_speed
from job_runner import appending, finished, write_line
from rex_outcome import gather
from rex_runs import (
    FULL,
    QUICK,
    Job,
    Row,
    Scale,
    done_work,
    expected_work,
    missing_jobs,
    places,
    read_results,
    run_job,
)
from tqdm import tqdm

RUNS = Path(__file__).resolve().parent.parent / "runs"
SPEED = RUNS / "rex-speed.json"
NEEDED = ("sklearn", "scipy", "matplotlib")  # for digits, Nemenyi's test and the plot


def run_missing(scale: Scale, args: argparse.Namespace) -> dict[Job, Row]:
    """Runs jobs until nothing is missing and returns all results."""
    results = read_results([*args.start_from, args.results])
    work = {"initial": done_work(scale, results), "total": expected_work(scale, results)}
    bar_format = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} core-s [{elapsed}<{remaining}]"
    with (
        appending(args.results) as file,
        tqdm(**work, smoothing=0.05, bar_format=bar_format) as bar,
    ):

        def missing() -> list[Job]:
            # What is expected grows where a grid is widened.
            bar.total = bar.n + expected_work(scale, results) - done_work(scale, results)
            return missing_jobs(places(scale, results), results)

        for job, row in finished(run_job, missing, args.workers):
            results[job] = row
            write_line(file, row)
            bar.update(job.work)
    return results


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
    parser.add_argument("--speed", action="store_true", help="measure stacks and single models")
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write the page, the numbers, the plot"
    )
    parser.add_argument(
        "--folder", type=Path, default=rex_page.FOLDER, help="for --report (%(default)s)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.results is None:
        args.results = RUNS / ("rex-quick.jsonl" if args.quick else "rex.jsonl")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        print(f"{', '.join(absent)} missing: pip install 'lrs_ext[bench]'", file=sys.stderr)
        return 1
    scale = QUICK if args.quick else FULL
    if args.speed:
        speed = rex_speed.measure()
        SPEED.parent.mkdir(exist_ok=True)
        SPEED.write_text(json.dumps(speed), encoding="utf-8")
        print(rex_page.speed_table(speed))
        return 0
    if args.report:
        return report(scale, args)
    try:
        results = run_missing(scale, args)
    except KeyboardInterrupt:
        print(f"\nstopped: the same command goes on from {args.results}", file=sys.stderr)
        return 130
    print(rex_page.short_summary(gather(scale, results)))
    return 0


def report(scale: Scale, args: argparse.Namespace) -> int:
    results = read_results([*args.start_from, args.results])
    outcome = gather(scale, results)
    if not outcome.tested:
        print(f"{args.results} has no finished place: run this without --report", file=sys.stderr)
        return 1
    speed = json.loads(SPEED.read_text(encoding="utf-8")) if SPEED.is_file() else []
    written = rex_page.write(outcome, results, speed, args.folder)
    print("written: " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
