"""Independent runs in processes of one thread each, their results as JSON lines in a file.

A run that was stopped costs itself only: what the file has is not run again.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Job = TypeVar("Job")
Row = dict[str, Any]


def read_lines(paths: Iterable[Path]) -> Iterator[Row]:
    """Yields the results in those of the files that exist."""
    for path in paths:
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:  # the run was killed while it wrote
                    continue


def run_jobs(
    run: Callable[[Job], Row],
    jobs: Sequence[Job],
    size: Callable[[Job], int],
    results: Path,
    workers: int,
) -> None:
    """Runs the jobs and appends each result when it is there.

    Args:
        run: at the top level of a module, so that other processes find it.
        size: the updates of a job, for the progress bar.
    """
    total = sum(map(size, jobs))
    with tqdm(total=total, unit="update", unit_scale=True, smoothing=0.05) as bar:
        append_results(run, jobs, size, results, workers, bar)


def append_results(
    run: Callable[[Job], Row],
    jobs: Sequence[Job],
    size: Callable[[Job], int],
    results: Path,
    workers: int,
    bar: tqdm[Any],
) -> None:
    """Does what `run_jobs` does under a progress bar that has begun before or goes on after."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        if file.tell() > 0:
            file.write("\n")  # ends a line that a killed run has left
        for job, row in finished(run, jobs, workers):
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update(size(job))


def finished(
    run: Callable[[Job], Row], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Row]]:
    """Yields the results as they come; one worker is this process."""
    if workers == 1:
        torch.set_num_threads(1)
        yield from ((job, run(job)) for job in jobs)
        return
    os.environ.update(ONE_THREAD)  # read when a worker starts
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start_worker)
    try:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback
