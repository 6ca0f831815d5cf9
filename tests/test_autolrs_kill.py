"""kill -9 at random points: what was checkpointed is not lost, and the decisions stay the same."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from autolrs_runs import PRESETS, Training

JOB = Path(__file__).with_name("autolrs_job.py")
KILLS = 3


@pytest.mark.parametrize("preset", PRESETS)
def test_a_killed_run_ends_as_if_nothing_had_happened(preset, tmp_path):
    rng = random.Random(preset)
    command = [sys.executable, str(JOB), str(tmp_path), preset]
    killed = 0
    while not (tmp_path / "end.pt").exists():
        job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        # Checkpoints come every few updates: a random number of them, then in the midst of things.
        lines = rng.randrange(1, 15) if killed < KILLS else 1_000_000
        for _ in range(lines):
            if not job.stdout.readline():
                break
        else:
            job.kill()
            killed += 1
        job.wait()
        job.stdout.close()
        assert job.returncode in (0, -9)
    assert killed == KILLS
    end = torch.load(tmp_path / "end.pt")
    whole = Training("sgd", **PRESETS[preset]).run()
    assert torch.equal(end["weights"], whole.weights())
    assert end["rates"] == whole.auto.history.learning_rates.tolist()
