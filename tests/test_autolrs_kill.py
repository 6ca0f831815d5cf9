"""kill -9 at any point: what was checkpointed is not lost, and the decisions stay the same."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from autolrs_runs import PRESETS, Training

JOB = Path(__file__).with_name("autolrs_job.py")
KILLS = 3
# Where a process dies, and the how manyth time it comes there.
DEATHS = [("save", 4), ("save", 20), ("trial", 13), ("restore", 3), ("load", 1)]


def start(folder, preset, rank=0, size=1, attempt=0, death=("never", 1), flags=()):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "ATTEMPT": str(attempt),
    }
    command = [sys.executable, str(JOB), str(folder), preset, death[0], str(death[1]), *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(jobs, timeout=120):
    """The return codes and what was written to stderr; none of the jobs is left behind."""
    try:
        errors = [job.communicate(timeout=timeout)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    return [job.returncode for job in jobs], errors


def assert_is_whole(folder, preset, whole=None):
    end = torch.load(folder / "end-0.pt")
    if whole is None:
        run = Training("sgd", **PRESETS[preset]).run()
        whole = {"weights": run.weights(), "rates": run.auto.history.learning_rates.tolist()}
    assert torch.equal(end["weights"], whole["weights"])
    assert end["rates"] == whole["rates"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_killed_run_ends_as_if_nothing_had_happened(preset, tmp_path):
    rng = random.Random(preset)
    killed = 0
    while not (tmp_path / "end-0.pt").exists():
        job = start(tmp_path, preset)
        # Checkpoints come every few updates: a random number of them, then in the midst of things.
        lines = rng.randrange(1, 15) if killed < KILLS else 1_000_000
        for _ in range(lines):
            if not job.stdout.readline():
                break
        else:
            job.kill()
            killed += 1
        (code,), (error,) = finish([job])
        assert code in (0, -9), error
    assert killed == KILLS
    assert_is_whole(tmp_path, preset)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("death", DEATHS, ids=lambda death: f"{death[0]} {death[1]}")
def test_a_run_that_dies_at_a_point_goes_on_from_the_last_whole_checkpoint(preset, death, tmp_path):
    if death[0] == "load":  # there must be something to load
        assert finish([start(tmp_path, preset, death=("trial", 13))])[0] == [-9]
    (code,), (error,) = finish([start(tmp_path, preset, death=death)])
    assert code == -9, error
    assert not (tmp_path / "end-0.pt").exists()
    (code,), (error,) = finish([start(tmp_path, preset)])
    assert code == 0, error
    assert_is_whole(tmp_path, preset)


def on_two(folder, preset, attempt, death, flags):
    """Runs both ranks, of which the second dies."""
    return finish(
        [
            start(folder, preset, 0, 2, attempt, flags=flags),
            start(folder, preset, 1, 2, attempt, death=death, flags=flags),
        ]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The ends of runs on two ranks that nothing has happened to."""
    ends = {}

    def end(preset, flags):
        if (preset, flags) not in ends:
            folder = tmp_path_factory.mktemp("whole")
            codes, errors = on_two(folder, preset, 0, ("never", 1), flags)
            assert codes == [0, 0], errors
            ends[preset, flags] = torch.load(folder / "end-0.pt")
        return ends[preset, flags]

    return end


@pytest.mark.parametrize(
    ("preset", "death", "flags"),
    [
        *(("peak", death, ()) for death in DEATHS),
        ("paper", ("restore", 3), ()),
        ("peak", ("save", 4), ("parallel",)),
        ("peak", ("trial", 13), ("parallel",)),
    ],
    ids=str,
)
def test_when_one_rank_dies_the_other_says_so_and_both_go_on(preset, death, flags, whole, tmp_path):
    attempt = 0
    if death[0] == "load":
        on_two(tmp_path, preset, attempt, ("trial", 13), flags)
        attempt += 1
    codes, errors = on_two(tmp_path, preset, attempt, death, flags)
    assert codes[1] == -9, errors[1]
    assert codes[0] == 1, errors[0]
    assert "Connection" in errors[0] or "peer" in errors[0], errors[0]
    assert not list(tmp_path.glob("end-*"))
    codes, errors = on_two(tmp_path, preset, attempt + 1, ("never", 1), flags)
    assert codes == [0, 0], errors
    assert_is_whole(tmp_path, preset, whole(preset, flags))
    ends = [torch.load(tmp_path / f"end-{rank}.pt") for rank in range(2)]
    assert torch.equal(ends[0]["weights"], ends[1]["weights"])
    assert ends[0]["rates"] == ends[1]["rates"]
