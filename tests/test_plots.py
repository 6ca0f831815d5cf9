"""Curves of schedules: the method, the command, and what they say without matplotlib."""

import sys

import numpy as np
import pytest

import lrs_ext
from lrs_ext.__main__ import main
from lrs_ext.plots import plot_samplings

figure_module = pytest.importorskip("matplotlib.figure")
PNG = b"\x89PNG"


def curve(line):
    """The steps at which a curve changes, by its values there."""
    return dict(zip(*(data.tolist() for data in line.get_data()), strict=True))


@pytest.mark.parametrize(
    "schedule",
    [
        lrs_ext.rex(0.1, 100, warmup_steps=5),
        lrs_ext.from_values([0.3, 0.1]),
        lrs_ext.join([lrs_ext.constant(0.1), lrs_ext.rex(0.2, 30)], [10]),
        lrs_ext.inverse_sqrt(0.1, warmup_steps=10),
        lrs_ext.constant(0.1),
    ],
    ids=str,
)
def test_a_schedule_draws_its_own_values(schedule):
    figure = schedule.plot()
    assert isinstance(figure, figure_module.Figure)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("update", "learning rate")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [schedule._name]
    points = curve(axes.lines[0])
    assert len(points) >= 3
    assert all(value == schedule(step) for step, value in points.items())
    assert max(points) == (schedule.total_steps or max(points))


def test_a_schedule_draws_into_given_axes():
    figure = figure_module.Figure()
    axes = figure.add_subplot()
    for schedule in (lrs_ext.rex(0.1, 9), lrs_ext.linear(0.1, 9)):
        assert schedule.plot(axes) is figure
    assert len(axes.lines) == 2


def test_a_long_schedule_is_drawn_in_few_points():
    line = lrs_ext.linear(1.0, 10**7).plot().axes[0].lines[0]
    assert len(line.get_xdata()) < 5000
    assert np.allclose(line.get_ydata(), 1 - line.get_xdata() / 1e7)


def test_samplings_stand_side_by_side():
    figure = plot_samplings(["rex", "constant"], ["50-75", 100], total_steps=1000)
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("50-75", "every 100 updates")
    assert curve(left.lines[0])[600] == pytest.approx(2 / 3)
    assert curve(right.lines[0])[600] == pytest.approx(0.4 / 0.7)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["rex", "constant"]


def test_the_command_writes_a_picture(tmp_path, capsys):
    out = tmp_path / "lr.png"
    names = ["rex", "linear", "cosine", "wsd", "one_cycle", "step_decay", "delayed_linear"]
    options = ["--sampling", "50-75", "every iteration", "10", "--steps", "200"]
    assert main(["plot", *names, *options, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(PNG)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sine"], r"schedule must be one of ['constant', 'cosine'"),
        (["rex", "--sampling", "10-10"], "sampling must be one of ['50-75'"),
        (["rex", "--steps", "0"], "total_steps must be positive, got 0"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, capsys, arguments, message):
    out = tmp_path / "lr.png"
    assert main(["plot", *arguments, "--out", str(out)]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_without_matplotlib_the_way_out_is_named(monkeypatch, tmp_path, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install lrs_ext\[plot\]"):
        lrs_ext.rex(0.1, 10).plot()
    assert main(["plot", "rex", "--out", str(tmp_path / "lr.png")]) == 1
    assert "pip install lrs_ext[plot]" in capsys.readouterr().err
