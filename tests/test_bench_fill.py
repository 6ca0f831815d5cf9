"""The benchmark of fills on short rows."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_fill

from lrs_ext import ops


def test_every_profile_takes_part():
    filled = {schedule.profile for schedule in bench_fill.schedules(10_000).values()}
    assert filled == set(ops._C.profiles) - {"constant"}


@pytest.mark.parametrize("name", bench_fill.PEERS)
def test_the_schedulers_of_torch_walk_the_same_curves(name):
    steps = 2000
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = bench_fill.PEERS[name](opt, steps)
    opt.step()  # torch warns about a scheduler that is stepped first
    walked = []
    for _ in range(steps):
        walked += scheduler.get_last_lr()
        scheduler.step()
    expected = bench_fill.schedules(steps)[name].values(0, steps)
    # torch's OneCycleLR has its peak half an update earlier.
    assert np.allclose(walked, expected, rtol=0.0, atol=1e-4 if name == "one_cycle" else 1e-12)


@pytest.mark.parametrize(("limit", "code"), [(3600.0, 0), (0.0, 1)])
def test_a_row_over_the_limit_fails_the_check(limit, code, monkeypatch, capsys):
    monkeypatch.setattr(bench_fill, "MAX_SECONDS", limit)
    assert bench_fill.main(["--steps", "2000", "--rounds", "1", "--check"]) == code
    verdicts = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert verdicts == ["FAIL" if code else "ok"] * len(bench_fill.schedules(2000))


def test_a_row_too_short_for_the_samplings_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_fill.main(["--steps", "1999"])
    assert "--steps must be at least 2000, got 1999" in capsys.readouterr().err
