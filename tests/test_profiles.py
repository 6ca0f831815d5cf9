"""What is special to a profile: its parameters, momentum, sampling by name, old checkpoints."""

import cases
import numpy as np
import pytest
import reference

import lrs_ext
from lrs_ext.profile_schedule import ProfileSchedule

NAN, INF = float("nan"), float("inf")
ERRORS = [
    ("rex", {"d": -0.1}, ValueError, r"d must be in \[0, 1\), got -0.1"),
    ("rex", {"d": 1.0}, ValueError, r"d must be in \[0, 1\), got 1.0"),
    ("rex", {"d": NAN}, ValueError, "d must be finite, got nan"),
    ("rex", {"d": "0.5"}, TypeError, "d must be a number, got '0.5'"),
    ("exponential", {"gamma": 0.1}, ValueError, "gamma must be 0 or less, got 0.1"),
    ("exponential", {"gamma": -INF}, ValueError, "gamma must be finite, got -inf"),
    ("step_decay", {"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
    ("step_decay", {"milestones": (0.75, 0.5)}, ValueError, "milestones .*increase, got .*0.75"),
    ("step_decay", {"milestones": (0.5, 0.5)}, ValueError, "milestones .*increase"),
    ("step_decay", {"milestones": (0.0, 0.5)}, ValueError, r"milestones .*in \(0, 1\), got .*0.0"),
    ("step_decay", {"milestones": (0.5, 1.0)}, ValueError, r"milestones .*in \(0, 1\), got .*1.0"),
    ("step_decay", {"milestones": (30, 60)}, ValueError, r"milestones .*in \(0, 1\), got .*30"),
    ("step_decay", {"milestones": 0.5}, TypeError, "milestones must be a sequence .*got 0.5"),
    ("step_decay", {"milestones": "50-75"}, TypeError, "milestones must be a .*got '50-75'"),
    ("step_decay", {"milestones": ()}, ValueError, "milestones must have at least one"),
    ("step_decay", {"milestones": (0.5, NAN)}, ValueError, "milestones must be finite, got nan"),
    ("delayed_linear", {"delay": 1.0}, ValueError, r"delay must be in \[0, 1\), got 1.0"),
    ("delayed_linear", {"delay": -0.5}, ValueError, r"delay must be in \[0, 1\), got -0.5"),
    ("polynomial", {"power": 0.0}, ValueError, "power must be positive, got 0.0"),
    ("polynomial", {"power": INF}, ValueError, "power must be finite, got inf"),
    ("one_cycle", {"low": -0.1}, ValueError, "low must be 0 or more, got -0.1"),
    ("one_cycle", {"low": 1.1}, ValueError, r"low must be in \[0, 1\], got 1.1"),
    ("one_cycle", {"momentum": (0.9, 0.8)}, ValueError, r"low <= high < 1, got \(0.9, 0.8\)"),
    ("one_cycle", {"momentum": (0.9, 1.0)}, ValueError, r"low <= high < 1, got \(0.9, 1.0\)"),
    ("one_cycle", {"momentum": 0.9}, TypeError, "momentum must be a pair .*got 0.9"),
    ("wsd", {"decay": 0.0}, ValueError, r"decay must be in \(0, 1\], got 0.0"),
    ("wsd", {"decay": 1.5}, ValueError, r"decay must be in \(0, 1\], got 1.5"),
    ("wsd", {"cooldown": "rex"}, ValueError, "cooldown must be one of .*'sqrt'.*got 'rex'"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), ERRORS)
def test_bad_parameters_are_refused_by_name_and_value(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(lrs_ext, name)(0.1, 10, **options)


def test_inverse_sqrt_checks_its_numbers():
    with pytest.raises(ValueError, match="warmup_steps must be positive for inverse_sqrt, got 0"):
        lrs_ext.inverse_sqrt(0.1, warmup_steps=0)
    with pytest.raises(ValueError, match="capacity must be positive, got 0"):
        lrs_ext.inverse_sqrt(0.1, warmup_steps=1, capacity=0)
    with pytest.raises(ValueError, match=r"capacity must be at least warmup_steps = 4, .*got 3"):
        lrs_ext.inverse_sqrt(0.1, warmup_steps=4, capacity=3)
    assert lrs_ext.inverse_sqrt(0.1, warmup_steps=4, capacity=4).capacity == 4
    with pytest.raises(ValueError, match="sampling at fractions needs total_steps"):
        lrs_ext.inverse_sqrt(0.1, warmup_steps=1, sampling=(0.5,))


def test_a_profile_knows_its_parameters():
    with pytest.raises(ValueError, match=r"rex has the parameters \('d',\), got \(\)"):
        ProfileSchedule(profile="rex", lr=0.1, total_steps=10)
    with pytest.raises(ValueError, match=r"profile must be one of .*got 'sine'"):
        ProfileSchedule(profile="sine", lr=0.1, total_steps=10)
    fields = lrs_ext.one_cycle(0.1, 10).to_dict()
    with pytest.raises(ValueError, match="one_cycle, which rises by itself, got 3"):
        lrs_ext.Schedule.from_dict(fields | {"warmup_steps": 3})


@pytest.mark.parametrize("row", cases.SCHEDULES, ids=str)
def test_the_repr_is_the_call(row):
    budget = () if row.total_steps is None else (row.total_steps,)
    schedule = getattr(lrs_ext, row.name)(row.lr, *budget, **row.options)
    assert eval(repr(schedule), vars(lrs_ext)) == schedule


# Dictionaries.


def test_dicts_of_before_there_were_parameters_can_be_read():
    old = {"lr": 0.1, "total_steps": 9, "warmup_steps": 2, "min_lr": 0.0, "sampling": 1}
    for name, d in (("rex", 0.5), ("rex", 0.9), ("linear", 0.0), ("cosine", 0.0)):
        own = {"d": d} if name == "rex" else {}
        expected = getattr(lrs_ext, name)(0.1, 9, warmup_steps=2, **own)
        assert lrs_ext.Schedule.from_dict({"profile": name, "d": d, **old}) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profile": "rex", "lr": 0.1, "total_steps": 9}, r"missing keys \['d'\]"),
        ({"profile": "linear", "total_steps": 9}, r"missing keys \['lr'\]"),
        ({"lr": 0.1, "total_steps": 9}, r"missing keys \['profile'\]"),
        ({"profile": "linear", "lr": 0.1, "total_steps": 9, "d": 0.5}, r"unknown keys \['d'\]"),
        ({"profile": "linear", "lr": 0.1, "total_steps": 9, "beta": 0}, r"unknown keys \['beta'\]"),
        ({"profile": "sine", "lr": 0.1}, "profile must be one of .*got 'sine'"),
        ({"profile": ["rex"], "lr": 0.1}, r"profile must be one of .*got \['rex'\]"),
        ({"profile": "table"}, r"missing keys \['values'\]"),
        ({"profile": "table", "values": [0.1]}, r"1-d, at least 2 of them, got shape \(1,\)"),
        ({"profile": "join", "schedules": []}, r"missing keys \['boundaries'\]"),
    ],
)
def test_dicts_of_no_schedule_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        lrs_ext.Schedule.from_dict(fields)


@pytest.mark.parametrize("fields", [None, [], lrs_ext.rex(0.1, 10)])
def test_what_is_no_dict_is_refused(fields):
    with pytest.raises(TypeError, match="from_dict takes what to_dict has returned"):
        lrs_ext.Schedule.from_dict(fields)


# Sampling by name.


def test_the_sampling_rates_of_the_paper():
    tens = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert dict(list(lrs_ext.SAMPLING.items())[:4]) == {
        "50-75": (0.5, 0.75),
        "33-66": (0.33, 0.66),
        "25-50-75": (0.25, 0.5, 0.75),
        "every 10 %": tens,
    }
    counts = [len(v) if isinstance(v, tuple) else v for v in lrs_ext.SAMPLING.values()]
    assert counts == [2, 2, 3, 9, 19, 99, 1]
    with pytest.raises(TypeError):
        lrs_ext.SAMPLING["50-75"] = (0.5,)


@pytest.mark.parametrize("name", lrs_ext.SAMPLING)
def test_a_sampling_by_name_is_the_same_schedule(name):
    by_name = lrs_ext.rex(0.1, 1000, sampling=name)
    assert by_name == lrs_ext.rex(0.1, 1000, sampling=lrs_ext.SAMPLING[name])
    every = {"every 10 %": 100, "every 5 %": 50, "every 1 %": 10, "every iteration": 1}
    if name in every:
        by_number = lrs_ext.rex(0.1, 1000, sampling=every[name])
        assert by_name.values(0, 1001).tolist() == by_number.values(0, 1001).tolist()


# One cycle.


def test_one_cycle_moves_momentum_against_the_learning_rate():
    cycle = lrs_ext.one_cycle(0.4, 100)
    assert [cycle(k) for k in (0, 25, 50, 75, 100)] == pytest.approx([0.04, 0.22, 0.4, 0.22, 0.04])
    momentum = cycle.momentum
    assert isinstance(momentum, lrs_ext.Schedule)
    assert [momentum(k) for k in (0, 25, 50, 75, 100)] == pytest.approx(
        [0.95, 0.9, 0.85, 0.9, 0.95]
    )
    assert momentum.total_steps == 100
    for step in range(0, 120, 7):
        rate = reference.schedule("one_cycle", step, lr=0.1, total_steps=100, low=0.0)
        assert momentum(step) == pytest.approx(0.95 - rate, rel=1e-14)
    assert lrs_ext.Schedule.from_dict(momentum.to_dict()) == momentum


def test_momentum_follows_sampling_and_its_own_range():
    cycle = lrs_ext.one_cycle(0.4, 100, momentum=(0.5, 0.9), sampling="50-75")
    assert cycle.momentum.values(0, 101)[[0, 49, 50, 75, 100]] == pytest.approx(
        [0.9, 0.9, 0.5, 0.7, 0.9]
    )
    assert cycle.scaled(3.0).momentum == cycle.momentum


def test_only_one_cycle_has_momentum():
    for schedule in (lrs_ext.rex(0.1, 9), lrs_ext.from_values([0.1])):
        assert not hasattr(schedule, "momentum")
    with pytest.raises(AttributeError, match="only one_cycle moves the momentum, not rex"):
        _ = lrs_ext.rex(0.1, 9).momentum


def test_one_cycle_begins_low_at_every_sampling():
    for sampling in (1, 7, "50-75"):
        assert lrs_ext.one_cycle(0.4, 100, sampling=sampling)(0) == pytest.approx(0.04)


# Without an end.


def test_inverse_sqrt_fills_a_million_values_and_holds_the_last_there():
    schedule = lrs_ext.inverse_sqrt(0.1, warmup_steps=100)
    assert schedule.capacity == 1_000_000
    buffer = lrs_ext.ScheduleBuffer(1, 1_000_003)
    values = buffer.fill_(0, schedule).values[0]
    assert values[999_999].item() == np.float32(schedule(999_999))
    assert values[999_999:].unique().numel() == 1
    assert schedule(10**8) == pytest.approx(0.1 * 1e-3, rel=1e-6)


def test_the_host_shows_what_a_row_without_an_end_holds(probe):
    schedule = lrs_ext.inverse_sqrt(0.1, warmup_steps=2, capacity=4)
    p = probe(schedule, lrs_ext.linear(0.1, 9))
    for k in range(7):
        shown = p.groups[0]["lr"]
        assert shown == schedule(min(k, 3))
        assert p.used()[0] == np.float32(shown)
