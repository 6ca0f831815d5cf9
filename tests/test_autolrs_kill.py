"""kill -9 at any point: what was checkpointed is not lost, and the decisions stay the same."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from autolrs_runs import PRESETS, Training

SERVER = Path(__file__).with_name("autolrs_job.py")
KILLS, TIMEOUT = 3, 120.0
NEVER = ("never", 1)
# Where a process dies, and the how manyth time it comes there.
DEATHS = [("save", 2), ("save", 20), ("trial", 13), ("restore", 3), ("load", 1)]


class Jobs:
    """Processes that train, forked from one that has imported everything."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, folder, preset, death=NEVER, rank=0, size=1, attempt=0, **options):
        job = {
            "folder": str(folder),
            "preset": preset,
            "rank": rank,
            "size": size,
            "attempt": attempt,
            "death": death,
            "options": options,
        }
        self._ask({"job": job, "errors": str(folder / f"errors-{rank}")})
        return int(self._answer())

    def finish(self, folder, *processes):
        """Returns how each has ended and what it has written; none is left behind."""
        deadline, codes = time.monotonic() + TIMEOUT, []
        for process in processes:
            self._ask({"wait": process})
            ready, _, _ = select.select([self._server.stdout], [], [], deadline - time.monotonic())
            if not ready:
                os.kill(process, signal.SIGABRT)  # writes where it is
            codes.append(int(self._answer()))
        ranks = range(len(processes))
        return codes, [(folder / f"errors-{rank}").read_text() for rank in ranks]

    def run(self, folder, preset, death=NEVER, **options):
        """Runs one process; returns how it has ended and what it has written."""
        codes, errors = self.finish(folder, self.start(folder, preset, death, **options))
        return codes[0], errors[0]

    def run_two(self, folder, preset, death=NEVER, **options):
        """Runs two ranks, the second of which dies."""
        first = self.start(folder, preset, NEVER, 0, 2, **options)
        second = self.start(folder, preset, death, 1, 2, **options)
        return self.finish(folder, first, second)

    def stop(self):
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()

    def _ask(self, request):
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()

    def _answer(self):
        return self._server.stdout.readline()


@pytest.fixture(scope="module")
def jobs():
    jobs = Jobs()
    yield jobs
    jobs.stop()


@pytest.fixture(scope="module")
def whole(jobs, tmp_path_factory):
    """The end of a run that nothing has happened to, by preset, ranks and options."""
    ends = {}

    def end(preset, size=1, **options):
        key = (preset, size, *options)
        if key not in ends and size == 1:
            run = Training("sgd", **PRESETS[preset]).run()
            rates = run.auto.history.learning_rates.tolist()
            ends[key] = {"weights": run.weights(), "rates": rates}
        elif key not in ends:
            folder = tmp_path_factory.mktemp("whole")
            codes, errors = jobs.run_two(folder, preset, **options)
            assert codes == [0, 0], errors
            ends[key] = torch.load(folder / "end-0.pt")
        return ends[key]

    return end


def assert_ends(folder, rank, whole):
    end = torch.load(folder / f"end-{rank}.pt")
    assert torch.equal(end["weights"], whole["weights"])
    assert end["rates"] == whole["rates"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_killed_run_ends_as_if_nothing_had_happened(preset, jobs, whole, tmp_path):
    rng, last = random.Random(preset), tmp_path / "last"
    for _ in range(KILLS):
        reached = int(last.read_text()) if last.exists() else 0
        job = jobs.start(tmp_path, preset)
        # Checkpoints come every few updates: a random number of them, then in the midst of things.
        target, deadline = reached + rng.randrange(3, 40), time.monotonic() + TIMEOUT
        while not (last.exists() and int(last.read_text()) >= target):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(job, signal.SIGKILL)
        assert jobs.finish(tmp_path, job)[0] == [-9]
    code, error = jobs.run(tmp_path, preset)
    assert code == 0, error
    assert_ends(tmp_path, 0, whole(preset))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("death", DEATHS, ids=str)
def test_a_run_that_dies_at_a_point_goes_on_from_its_last_whole_checkpoint(
    preset, death, jobs, whole, tmp_path
):
    if death[0] == "load":  # there must be something to load
        assert jobs.run(tmp_path, preset, ("trial", 13))[0] == -9
    code, error = jobs.run(tmp_path, preset, death)
    assert code == -9, error
    assert (tmp_path / "last").exists()
    code, error = jobs.run(tmp_path, preset)
    assert code == 0, error
    assert_ends(tmp_path, 0, whole(preset))


@pytest.mark.parametrize(
    ("preset", "death", "options"),
    [
        *(("peak", death, {}) for death in DEATHS),
        ("paper", ("restore", 3), {}),
        *(("peak", death, {"parallel_trials": True}) for death in DEATHS),
    ],
    ids=str,
)
def test_when_one_rank_dies_the_other_says_so_and_both_go_on(
    preset, death, options, jobs, whole, tmp_path
):
    if death[0] == "load":
        assert jobs.run_two(tmp_path, preset, ("trial", 13), attempt=1, **options)[0] == [1, -9]
    codes, errors = jobs.run_two(tmp_path, preset, death, attempt=2, **options)
    assert codes == [1, -9], errors
    assert "Connection" in errors[0], errors[0]
    assert not list(tmp_path.glob("end-*"))
    codes, errors = jobs.run_two(tmp_path, preset, attempt=3, **options)
    assert codes == [0, 0], errors
    for rank in range(2):
        assert_ends(tmp_path, rank, whole(preset, 2, **options))
