"""The benchmark of trials at once: its numbers by hand, and a whole small run."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_parallel_trials

BENCHMARKS = Path(bench_parallel_trials.__file__).parent


def row(at_once, search, peak, loss):
    return {"task": "t", "at_once": at_once, "search": search, "peak": peak, "loss": loss}


def test_a_line_for_each_task():
    rows = [
        row(False, 2.0, 0.1, 1.0),
        row(False, 4.0, 0.1, 3.0),
        row(False, 3.0, 0.1, 2.0),
        row(True, 1.0, 0.2, 1.0),
        row(True, 1.5, 0.4, 1.0),
        row(True, 9.0, 0.1, 1.0),
    ]
    (line,) = bench_parallel_trials.summary(rows)
    assert line["faster"] == pytest.approx(3.0 / 1.5)
    assert line["peak_ratio"] == pytest.approx(2.0)
    assert line["loss_ratio"] == pytest.approx(0.5)
    options = Namespace(ranks=2, trials=8, trial_steps=10, steps=500, seeds=3)
    assert "| t | 3.00 s | 1.50 s | 2.00 | 0.1 | 2.00 | 2 | 0.500 |" in (
        bench_parallel_trials.report(rows, options)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 0", "--ranks must be at least 1, got 0"),
        ("--trials 2", "--trials must be at least 3, got 2"),
        ("--trial-steps 0", "--trial-steps must be at least 1, got 0"),
        ("--steps 160", "8 trials of 10 updates need --steps above 160, got 160"),
        ("--json nowhere/x.json", "there is no folder nowhere"),
    ],
)
def test_arguments_are_checked(options, message, capsys):
    with pytest.raises(SystemExit):
        bench_parallel_trials.parse_args(options.split())
    assert message in capsys.readouterr().err


def test_a_small_run(tmp_path):
    path = tmp_path / "waves.json"
    command = [sys.executable, "bench_parallel_trials.py", "--tasks", "photos", "--seeds", "1"]
    command += ["--steps", "60", "--trials", "4", "--trial-steps", "4", "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    subprocess.run(command, cwd=BENCHMARKS, env=environment, check=True, timeout=300)
    first, second = json.loads(path.read_text())["rows"]
    assert (first["at_once"], second["at_once"]) == (False, True)
    assert first["search"] > 0.0
    assert second["search"] > 0.0
