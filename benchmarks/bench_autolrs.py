"""Claim: AutoLRS reaches the test loss of a cosine schedule whose peak was tuned, at equal cost.

    python benchmarks/bench_autolrs.py --quick           # one seed, 300 updates: under two minutes
    python benchmarks/bench_autolrs.py                   # all of it: hours; goes on if stopped
    python benchmarks/bench_autolrs.py --report          # writes benchmarks/results/autolrs.*
    python benchmarks/bench_autolrs.py --tasks digits,gpt --budgets 500,1000 --seeds 3 \\
        --contestants cosine auto "auto decades=2 search.MARGIN_DECADES=0.2"

Every run trains a model within a budget of updates, trials included, on one thread. Its result is
appended to a file at once; what is there already is not run again. A contestant is a name, or a
name and options; those of AutoLRS are its keywords, `decades` (width of the bounds), `shift`,
`judge=validation` and constants of its modules. cosine, linear and rex without `offset` (decades
from the middle of the range) stand for a grid of 9 peaks. See autolrs_contestants.py.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import autolrs_page
import torch
from autolrs_contestants import CONTESTANTS, GRID, GRIDDED, Options
from autolrs_tasks import TASKS
from job_runner import read_lines, run_jobs

import lrs_ext

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "autolrs.jsonl"
BUDGETS, SEEDS = (500, 1000, 3000), 5
METHODS = (
    *GRIDDED,
    "auto",
    "auto decades=2",
    "auto decades=6",
    "paper",
    "prodigy",
    "dadapt",
    "schedulefree",
    "greedy",
    "onecycle",
)
# Long runs: AutoLRS against the peaks around the best one of the longest budget before.
LONG_TASKS, LONG_BUDGETS, LONG_SEEDS = ("photos", "text"), (10_000, 20_000), 2
QUICK_BUDGETS, QUICK_SEEDS = (300,), 1
QUICK_METHODS = ("cosine offset=-1", "cosine offset=0", "cosine offset=1", "auto", "prodigy")
# A run whose loss is not finite or above this many times the untrained model's has diverged, and
# counts as that much.
DIVERGED = 2.0
WARM_UP_STEPS = 200


@dataclass(frozen=True)
class Job:
    """One run; its result follows from it alone.

    Attributes:
        options: in canonical JSON: defaults filled in, names in order.
    """

    task: str
    contestant: str
    options: str
    total_steps: int
    seed: int

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.astuple(self))


def make_job(task: str, spec: str, total_steps: int, seed: int) -> Job:
    name, options = parse_spec(spec)
    options = CONTESTANTS[name].defaults | options
    return Job(task, name, json.dumps(options, sort_keys=True), total_steps, seed)


def job_of(row: dict[str, Any]) -> Job:
    return Job(**{field.name: row[field.name] for field in dataclasses.fields(Job)})


def parse_spec(spec: str) -> tuple[str, Options]:
    """Returns a contestant's name and options.

    Raises:
        ValueError: there is no such contestant, or an option has no value.

    >>> parse_spec("auto decades=6 timetable.TRIAL_STEPS=(20,150) schedule=cosine")
    ('auto', {'decades': 6.0, 'timetable.TRIAL_STEPS': [20, 150], 'schedule': 'cosine'})
    """
    name, *words = spec.split()
    if name not in CONTESTANTS:
        raise ValueError(f"no contestant {name!r}: it must be one of {', '.join(CONTESTANTS)}")
    options: Options = {}
    for word in words:
        option, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{spec!r}: give {option} a value, such as {option}=0.1")
        try:
            options[option] = json.loads(json.dumps(ast.literal_eval(value)))
        except (ValueError, SyntaxError):
            options[option] = value
        if option in ("decades", "offset", "shift"):
            options[option] = float(options[option])
    return name, options


def with_grids(specs: Iterable[str]) -> list[str]:
    """Returns the contestants with a grid of peaks for each schedule that has none."""
    expanded = []
    for spec in specs:
        name, options = parse_spec(spec)
        is_gridded = name in GRIDDED and "offset" not in options
        expanded += [f"{spec} offset={offset}" for offset in GRID] if is_gridded else [spec]
    return expanded


def plan(
    tasks: Iterable[str], specs: Iterable[str], budgets: Iterable[int], seeds: Iterable[int]
) -> list[Job]:
    """Returns the runs, without duplicates; first all of the first seed."""
    expanded = with_grids(specs)
    jobs = [
        make_job(task, spec, total_steps, seed)
        for seed in seeds
        for total_steps in budgets
        for task in tasks
        for spec in expanded
    ]
    return list(dict.fromkeys(jobs))


def long_plan(rows: Sequence[dict[str, Any]]) -> list[Job]:
    """Returns the long runs: cosine around the best peak so far, and AutoLRS."""
    jobs = []
    for task in LONG_TASKS:
        best = autolrs_page.best_offset(rows, task, max(BUDGETS), "cosine")
        if best is None:
            continue
        near = [offset for offset in GRID if abs(offset - best) <= 0.5]
        specs = [f"cosine offset={offset}" for offset in near] + ["auto"]
        jobs += plan([task], specs, LONG_BUDGETS, range(LONG_SEEDS))
    return jobs


@functools.cache
def code_version() -> str:
    """A fingerprint of AutoLRS: results of different versions should not be mixed."""
    sha = hashlib.sha256()
    for path in sorted((Path(lrs_ext.__file__).parent / "autolrs").glob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:10]


@functools.cache
def untrained_loss(task: str, seed: int) -> float:
    return float(TASKS[task].evaluate(TASKS[task].model(seed), "test"))


@functools.cache
def warm_up(contestant: str) -> None:
    """Runs a contestant once in this process: imports and first calls are not to be measured."""
    method = CONTESTANTS[contestant]
    method.run(TASKS["photos"], WARM_UP_STEPS, 0, method.defaults)


def run_job(job: Job) -> dict[str, Any]:
    """Returns the result of a run, plain numbers; an exception is a result too."""
    task = TASKS[job.task]
    row = dataclasses.asdict(job)
    worst = DIVERGED * untrained_loss(job.task, job.seed)  # loads the data, too
    try:
        warm_up(job.contestant)
        torch.manual_seed(job.seed)
        wall, processor = time.perf_counter(), time.process_time()
        outcome = CONTESTANTS[job.contestant].run(
            task, job.total_steps, job.seed, json.loads(job.options)
        )
    except Exception as error:  # the other runs' results are worth having all the same
        return row | {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    test = float(task.evaluate(outcome.model, "test"))
    validation = float(task.evaluate(outcome.model, "validation"))
    return row | {
        "test_loss": test if test < worst else worst,  # worst, too, if it is NaN
        "validation_loss": validation if validation < worst else worst,
        "diverged": not test < worst,
        "seconds": round(wall, 3),
        "processor_seconds": round(processor, 3),
        "updates": outcome.updates,
        "search_share": round(outcome.search_updates / job.total_steps, 4),
        "lr": outcome.lr,
        "trials": [[finite(value) for value in trial] for trial in outcome.trials],
        "code": code_version(),
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Returns the results in the files; of two for one job, the later."""
    return list({job_of(row).key: row for row in read_lines(paths)}.values())


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers such as 500,1000, got {text}") from None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = functools.partial(str.split, sep=",")
    parser.add_argument("--tasks", type=names, help=f"some of {','.join(TASKS)} (all)")
    parser.add_argument(
        "--budgets",
        type=whole_numbers,
        help="updates, such as 500,1000 (500,1000,3000, and 10000,20000 for some runs)",
    )
    parser.add_argument("--seeds", type=int, help=f"how many ({SEEDS})")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED", help="(0)")
    parser.add_argument(
        "--contestants", nargs="+", metavar="SPEC", help=f"some of {', '.join(METHODS)} (all)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (one a core)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="appended to (%(default)s)"
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="other results to use, not written to",
    )
    parser.add_argument("--again", action="store_true", help="run what has a result already, too")
    parser.add_argument("--quick", action="store_true", help="one seed, 300 updates, few methods")
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write the page, the numbers, the plot"
    )
    parser.add_argument(
        "--folder", type=Path, default=autolrs_page.FOLDER, help="for --report (%(default)s)"
    )
    args = parser.parse_args(argv)
    for task in args.tasks or ():
        if task not in TASKS:
            parser.error(f"--tasks: no task {task!r}: it must be one of {', '.join(TASKS)}")
    try:
        for spec in args.contestants or ():
            parse_spec(spec)
    except ValueError as error:
        parser.error(f"--contestants: {error}")
    for name, least in (("seeds", 1), ("workers", 1), ("first_seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.budgets is not None and min(args.budgets) < 1:
        parser.error(f"--budgets must be positive, got {min(args.budgets)}")
    return args


def is_available(spec: str) -> bool:
    """Says so where a contestant's package is missing."""
    contestant = CONTESTANTS[parse_spec(spec)[0]]
    if not contestant.is_available:
        print(f"{spec}: left out, pip install {contestant.package}", file=sys.stderr)
    return contestant.is_available


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    files = [*args.baseline, args.results]
    if args.report:
        written = autolrs_page.write(read_rows(files), args.folder)
        print("written: " + ", ".join(map(str, written)))
        return 0
    budgets, count, specs = BUDGETS, SEEDS, METHODS
    if args.quick:
        budgets, count, specs = QUICK_BUDGETS, QUICK_SEEDS, QUICK_METHODS
    tasks = args.tasks or tuple(TASKS)
    seeds = range(args.first_seed, args.first_seed + (args.seeds or count))
    specs = [spec for spec in args.contestants or specs if is_available(spec)]
    jobs = plan(tasks, specs, args.budgets or budgets, seeds)
    try:
        run_missing(jobs, files, args)
        if not (args.quick or args.tasks or args.budgets or args.seeds or args.contestants):
            long_jobs = long_plan(read_rows(files))
            run_missing(long_jobs, files, args)
            jobs += long_jobs
    except KeyboardInterrupt:
        print(f"\nstopped: the same command goes on from {args.results}", file=sys.stderr)
        return 130
    wanted = {job.key for job in jobs}
    budgets = {job.total_steps for job in jobs}
    rows = read_rows(files)  # what is there for the same budgets belongs in the picture
    print(autolrs_page.summary([row for row in rows if row["total_steps"] in budgets]))
    errors = [row for row in rows if "error" in row and job_of(row).key in wanted]
    for row in errors:
        print(f"{row['task']} {row['contestant']} {row['options']}: {row['error']}")
    return 1 if errors else 0


def run_missing(jobs: Sequence[Job], files: Sequence[Path], args: argparse.Namespace) -> None:
    """Runs the jobs that have no result yet; those that ended with an error run again."""
    done = {job_of(row).key for row in read_rows(files) if "error" not in row}
    missing = [job for job in jobs if args.again or job.key not in done]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done", file=sys.stderr)
    if missing:
        run_jobs(run_job, missing, lambda job: job.total_steps, args.results, args.workers)


if __name__ == "__main__":
    sys.exit(main())
