"""Independent runs in processes of one thread each, their results as JSON lines in a file.

A run that was stopped costs itself only: what the file has is not run again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

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
    with (
        appending(results) as file,
        tqdm(total=sum(map(size, jobs)), unit="update", unit_scale=True, smoothing=0.05) as bar,
    ):
        waiting = list(jobs)
        for job, row in finished(run, lambda: waiting, workers):
            waiting.remove(job)
            write_line(file, row)
            bar.update(size(job))


@contextlib.contextmanager
def appending(results: Path) -> Iterator[TextIO]:
    """Opens a file of JSON lines for more of them."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        if file.tell() > 0:
            file.write("\n")  # ends a line that a killed run has left
        yield file


def write_line(file: TextIO, row: Row) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def finished(
    run: Callable[[Job], Row], missing: Callable[[], Sequence[Job]], workers: int
) -> Iterator[tuple[Job, Row]]:
    """Yields the results as they come, until no job is missing; one worker is this process.

    Args:
        missing: returns the jobs that can be run and have no result yet, the most urgent first.
            Results may bring forth jobs: it is asked again after each.
    """
    if workers == 1:
        torch.set_num_threads(1)
        while jobs := missing():
            yield jobs[0], run(jobs[0])
        return
    os.environ.update(ONE_THREAD)  # read when a worker starts
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start_worker)
    futures: dict[concurrent.futures.Future[Row], Job] = {}
    try:
        while True:
            idle = [job for job in missing() if job not in futures.values()]
            for job in idle[: workers - len(futures)]:
                futures[pool.submit(run, job)] = job
            if not futures:
                return
            done, _ = concurrent.futures.wait(futures, return_when="FIRST_COMPLETED")
            for future in done:
                yield futures.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this worker, in the middle of a run, where the process that started it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
