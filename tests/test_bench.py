"""The command that times steps: what it measures, prints and refuses."""

import json

import pytest
import torch

from lrs_ext import bench
from lrs_ext.__main__ import main
from lrs_ext.timing import Spread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "TENSORS", ((3, 16), (1, 5)))


@pytest.mark.parametrize("optimizer", bench.OPTIMIZERS)
def test_both_are_measured(optimizer):
    row = bench.measure(optimizer, CPU, 2, 7, rounds=3)
    assert (row.tensors, row.elements, row.backend) == (2, 7, "cpu")
    assert 0.0 < row.ours.lower <= row.ours.median <= row.ours.upper
    assert row.theirs.median > 0.0
    assert (row.host_ours, row.host_theirs) == (row.ours, row.theirs)


@pytest.mark.gpu
def test_both_are_measured_on_a_gpu():
    row = bench.measure("AdamW", torch.device("cuda"), 2, 7, rounds=3)
    assert row.ours.median > 0.0
    assert row.theirs.median > 0.0
    assert row.host_ours is not row.ours


def test_the_ratio_is_theirs_over_ours():
    ours, theirs, host = (Spread(median, median, median) for median in (2e-6, 5e-3, 4e-6))
    text = bench.table([bench.Row(300, 10_000, "cuda", ours, theirs, host, theirs)])
    _, device, on_host = text.splitlines()
    assert device.split() == ["300", "x", "10,000", "2.0", "us", "5.000", "ms", "2500.00x"]
    assert on_host.split() == ["host", "4.0", "us", "5.000", "ms", "1250.00x"]


def test_the_command_prints_a_row_for_each_case(capsys):
    arguments = ["bench", "--rounds", "1", "--device", "cpu", "--optimizer", "SGD"]
    assert main(arguments) == 0
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert "SGD" in first
    assert "backend cpu" in first
    assert [row.split()[:3] for row in rows] == [["3", "x", "16"], ["1", "x", "5"]]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["elements"] for row in found] == [16, 5]
    assert found[0]["ours"]["median"] > 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "must be a positive whole number, got 0"),
        (["--optimizer", "Lion"], "invalid choice: 'Lion'"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 1
    assert "torch sees no GPU: take --device cpu" in capsys.readouterr().err
