"""Schedules against exact arithmetic, the paper's numbers and known bugs of REX elsewhere."""

import copy
import dataclasses
import inspect
import io
import json
import pickle

import cases
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrs_ext
from lrs_ext import _C
from lrs_ext.profiles import parameter_names

rows = pytest.mark.parametrize("row", cases.SCHEDULES, ids=str)


def make(row):
    budget = () if row.total_steps is None else (row.total_steps,)
    return getattr(lrs_ext, row.name)(row.lr, *budget, **row.options)


def oracle(row, step):
    options = {"lr": row.lr, "total_steps": row.total_steps, **row.options}
    options.pop("capacity", None)  # matters in a buffer only
    return reference.schedule(row.name, step, **options)


def close(actual, expected):
    tolerance = cases.SCHEDULE
    return actual == pytest.approx(expected, rel=tolerance.rtol, abs=tolerance.atol)


def public_constructors():
    """Names of the public functions that return a Schedule."""
    functions = {name: getattr(lrs_ext, name) for name in lrs_ext.__all__}
    return {
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and inspect.signature(function).return_annotation == "Schedule"
    }


def test_every_public_and_every_native_schedule_has_rows_and_an_oracle():
    profiles = {row.name for row in cases.SCHEDULES}
    assert profiles == set(_C.profiles) == {*reference.PROFILES, "inverse_sqrt"}
    assert public_constructors() == profiles | {"from_values", "from_function", "join"}
    for profile in profiles:
        options = [row.options for row in cases.SCHEDULES if row.name == profile]
        assert set(parameter_names(profile)) - {"d"} <= set().union(*options), profile


def test_every_cooldown_has_a_row():
    assert {row.options.get("cooldown", "sqrt") for row in cases.SCHEDULES} == set(_C.cooldowns)


@rows
def test_every_step_matches_the_oracle_to_the_end_and_far_beyond(row):
    schedule, total = make(row), row.total_steps or 50
    steps = [*range(total + 3), 2 * total, 10**6, 2**31, 2**53]
    for step in steps:
        assert close(schedule(step), oracle(row, step)), step


@rows
def test_values_are_the_calls(row):
    schedule = make(row)
    for start, stop in [(0, 120), (3, 4), (95, 105), (7, 7), (10**9, 10**9 + 2)]:
        values = schedule.values(start, stop)
        assert values.dtype == np.float64
        assert values.shape == (stop - start,)
        assert values.tolist() == [schedule(step) for step in range(start, stop)]


@rows
def test_calls_return_python_floats_and_accept_numpy_integers(row):
    schedule = make(row)
    assert type(schedule(5)) is float
    assert schedule(np.int64(5)) == schedule(5)


@rows
def test_the_schedule_is_a_pure_function_of_the_step(row):
    schedule = make(row)
    forwards = [schedule(step) for step in range(110)]
    backwards = [schedule(step) for step in reversed(range(110))]
    assert forwards == backwards[::-1]


@rows
def test_copies_are_equal_and_interchangeable(row):
    schedule = make(row)
    as_json = json.loads(json.dumps(schedule.to_dict()))
    buffer = io.BytesIO()
    torch.save(schedule.to_dict(), buffer)
    buffer.seek(0)
    copies = [
        make(row),
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        lrs_ext.Schedule.from_dict(schedule.to_dict()),
        lrs_ext.Schedule.from_dict(as_json),
        lrs_ext.Schedule.from_dict(torch.load(buffer, weights_only=True)),
    ]
    for other in copies:
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)
        assert [other(step) for step in range(50)] == [schedule(step) for step in range(50)]


def test_different_schedules_differ_in_equality_dict_and_repr():
    schedules = [make(row) for row in cases.SCHEDULES]
    assert len(set(schedules)) == len(schedules)
    assert len({json.dumps(s.to_dict()) for s in schedules}) == len(schedules)
    assert len({repr(s) for s in schedules}) == len(schedules)


def test_repr_names_the_schedule_and_its_numbers():
    text = repr(lrs_ext.rex(3e-4, 12345, warmup_steps=77, d=0.625))
    for part in ("rex", "0.0003", "12345", "77", "0.625"):
        assert part in text


def test_to_dict_holds_plain_values_only():
    for row in cases.SCHEDULES:
        for key, value in make(row).to_dict().items():
            values = value if isinstance(value, list | tuple) else [value]
            assert type(key) is str
            assert {type(v) for v in values} <= {int, float, str, type(None)}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda n: lrs_ext.rex(0.1, 100)(n), "step"),
        (lambda n: lrs_ext.rex(0.1, 100).values(n - 2, n), "stop"),
        (lambda n: lrs_ext.rex(0.1, n), "total_steps"),
        (lambda n: lrs_ext.rex(0.1, 100, sampling=n), "sampling"),
        (lambda n: lrs_ext.constant(0.1, warmup_steps=n), "warmup_steps"),
        (lambda n: lrs_ext.from_function(lambda k: 0.1, n), "total_steps"),
    ],
)
@pytest.mark.parametrize("count", [2**63, 2**70])
def test_counts_of_more_than_63_bits_are_refused(call, name, count):
    with pytest.raises(ValueError, match=rf"(start|{name}) must be less than 2\*\*63, got"):
        call(count)


def test_the_largest_step_is_one_after_the_end():
    assert lrs_ext.linear(0.1, 100, min_lr=0.01)(2**63 - 1) == 0.01


def test_a_sample_that_holds_beyond_the_largest_step_fills_no_more_than_asked_for():
    schedule = lrs_ext.linear(0.1, 2**63 - 1, sampling=2**62 + 2**40)
    assert schedule.values(2**63 - 3, 2**63 - 1).tolist() == [schedule(2**63 - 3)] * 2


def test_schedules_are_frozen():
    schedule = lrs_ext.rex(0.1, 10)
    for name in [f.name for f in dataclasses.fields(schedule)]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, name, 1)


@rows
@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0])
def test_scaled_keeps_the_shape(row, factor):
    schedule, scaled = make(row), make(row).scaled(factor)
    assert scaled.total_steps == schedule.total_steps
    for step in range(0, 120, 3):
        assert close(scaled(step), factor * schedule(step))


@rows
def test_another_budget_is_the_schedule_made_with_it(row):
    if row.name == "inverse_sqrt":
        with pytest.raises(
            ValueError, match="inverse_sqrt has no end, so no total_steps, got 1234"
        ):
            make(row).with_total_steps(1234)
        return
    longer = dataclasses.replace(row, total_steps=1234)
    assert make(row).with_total_steps(1234) == make(longer)
    assert make(row).total_steps == row.total_steps
    assert make(row).with_total_steps(1234).total_steps == 1234


@pytest.mark.parametrize("budget", [0, -3, 1.5])
def test_another_budget_is_checked(budget):
    with pytest.raises((TypeError, ValueError), match=f"total_steps.*{budget}"):
        lrs_ext.rex(0.1, 10).with_total_steps(budget)
    with pytest.raises(ValueError, match="warmup_steps"):
        lrs_ext.rex(0.1, 10, warmup_steps=5).with_total_steps(4)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_scaled_refuses_what_gives_no_learning_rate(factor):
    with pytest.raises(ValueError, match=r"-0\.1|-1\.0|nan|inf"):
        lrs_ext.rex(0.1, 10).scaled(factor)


# The paper's numbers: values of the profile and of updates, means and last values by sampling.

PROFILE_POINTS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
PROFILE_VALUES = {
    0.0: (0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01),
    0.1: (0.9091, 0.7692, 0.5263, 0.2703, 0.1099, 0.0552, 0.0111),
    0.5: (0.9474, 0.8571, 0.6667, 0.4000, 0.1818, 0.0952, 0.0198),
    0.9: (0.9890, 0.9677, 0.9091, 0.7692, 0.5263, 0.3448, 0.0917),
}
HUNDRED_UPDATES = {
    0.5: ({0: 1.0, 1: 0.994975, 50: 0.666667, 98: 0.039216, 99: 0.019802}, 0.618693),
    0.9: ({0: 1.0, 1: 0.998991, 50: 0.909091, 98: 0.169492, 99: 0.091743}, 0.831759),
}
MEANS_AND_LASTS = {
    ("rex", 0.5): (
        (0.7667, 0.7673, 0.7310, 0.6625, 0.6384, 0.6187, 0.6137),
        (0.4000, 0.5075, 0.4000, 0.1818, 0.0952, 0.0198, 0.0),
    ),
    ("rex", 0.9): (
        (0.9196, 0.9292, 0.9115, 0.8691, 0.8498, 0.8318, 0.8268),
        (0.7692, 0.8374, 0.7692, 0.5263, 0.3448, 0.0917, 0.0),
    ),
    ("linear", None): (
        (0.6875, 0.6667, 0.6250, 0.5500, 0.5250, 0.5050, 0.5000),
        (0.2500, 0.3400, 0.2500, 0.1000, 0.0500, 0.0100, 0.0),
    ),
    ("exponential", None): (
        (0.5821, 0.4996, 0.4502, 0.3666, 0.3411, 0.3215, 0.3167),
        (0.1054, 0.1381, 0.1054, 0.0672, 0.0578, 0.0513, 0.0498),
    ),
    ("cosine", None): (
        (0.6616, 0.6671, 0.6250, 0.5500, 0.5250, 0.5050, 0.5000),
        (0.1464, 0.2591, 0.1464, 0.0245, 0.0062, 0.0002, 0.0),
    ),
}


@pytest.mark.parametrize("d", PROFILE_VALUES)
def test_rex_profile_values(d):
    schedule = lrs_ext.rex(1.0, 100, d=d)
    actual = tuple(round(schedule(round(100 * p)), 4) for p in PROFILE_POINTS)
    assert actual == PROFILE_VALUES[d]


@pytest.mark.parametrize("d", HUNDRED_UPDATES)
def test_rex_over_one_hundred_updates(d):
    values, mean = HUNDRED_UPDATES[d]
    schedule = lrs_ext.rex(1.0, 100, d=d)
    assert {step: round(schedule(step), 6) for step in values} == values
    assert round(schedule.values(0, 100).mean(), 6) == mean
    assert lrs_ext.rex(1.0, 100) == lrs_ext.rex(1.0, 100, d=0.5)


@pytest.mark.parametrize(("name", "d"), MEANS_AND_LASTS)
def test_means_and_last_values_of_every_sampling(name, d):
    total, own = 200_000, {} if d is None else {"d": d}
    runs = [
        getattr(lrs_ext, name)(1.0, total, sampling=sampling, **own).values(0, total)
        for sampling in lrs_ext.SAMPLING
    ]
    means, lasts = MEANS_AND_LASTS[name, d]
    assert [run.mean() for run in runs] == pytest.approx(means, rel=0, abs=6e-5)
    assert [run[-1] for run in runs] == pytest.approx(lasts, rel=0, abs=6e-5)


# What other implementations of REX get wrong.


def test_the_end_holds_and_never_wraps_rises_or_goes_negative():
    for row in cases.SCHEDULES:
        if row.total_steps is not None:
            schedule, total = make(row), row.total_steps
            floor = schedule(total)
            assert close(floor, oracle(row, total))
            assert 0.0 <= floor <= row.lr
            assert set(schedule.values(total, 3 * total + 2).tolist()) == {floor}


def test_the_first_update_runs_at_the_peak_and_the_last_is_not_wasted():
    for name in ("rex", "linear", "cosine", "exponential", "polynomial"):
        schedule = getattr(lrs_ext, name)(0.3, 100)
        assert schedule(0) == 0.3
        assert 0 < schedule(99) < schedule(98)


def test_the_warm_up_is_a_monotone_ramp_that_meets_the_peak_without_a_spike():
    schedule = lrs_ext.rex(1.0, 100, warmup_steps=10, d=0.9)
    ramp = schedule.values(0, 10)
    assert ramp.tolist() == pytest.approx([(k + 1) / 10 for k in range(10)], rel=1e-15)
    assert schedule(9) == schedule(10) == 1.0
    assert (np.diff(schedule.values(10, 101)) < 0).all()


def test_the_warm_up_is_part_of_the_budget():
    warm, cold = lrs_ext.rex(1.0, 110, warmup_steps=10), lrs_ext.rex(1.0, 100)
    assert warm.values(10, 130).tolist() == cold.values(0, 120).tolist()


def test_coarse_sampling_still_ends_at_the_floor():
    for sampling in (30, (0.5,)):
        schedule = lrs_ext.linear(1.0, 100, sampling=sampling, min_lr=0.125)
        assert schedule(99) > schedule(100) == 0.125


def test_sample_points_land_on_the_meant_update():
    schedule = lrs_ext.linear(1.0, 100, sampling=(0.07, 0.29, 0.58))
    changes = np.flatnonzero(np.diff(schedule.values(0, 100))) + 1
    assert changes.tolist() == [7, 29, 58]
    schedule = lrs_ext.linear(1.0, 1000, sampling=tuple(k / 1000 for k in range(1, 1000)))
    assert schedule.values(0, 1000).tolist() == lrs_ext.linear(1.0, 1000).values(0, 1000).tolist()


# Errors.

BUDGETED = [name for name in reference.PROFILES if name != "constant"]
BAD_LR = [-1e-3, float("nan"), float("inf"), float("-inf")]
ERRORS = [
    (ValueError, "total_steps must be positive, got -3", (0.1, -3), {}),
    (ValueError, "total_steps must be positive, got 0", (0.1, 0), {}),
    (TypeError, r"total_steps .*got 100.0: convert it by int\(\)", (0.1, 100.0), {}),
    (TypeError, r"total_steps .*got '100': convert it by int\(\)", (0.1, "100"), {}),
    (TypeError, r"lr must be a number, got '0.1': convert it by float\(\)", ("0.1", 10), {}),
    *[(ValueError, f"Invalid learning rate: {lr}", (lr, 10), {}) for lr in BAD_LR],
    (ValueError, "min_lr.*-0.01", (0.1, 10), {"min_lr": -0.01}),
    (ValueError, "min_lr.*0.2", (0.1, 10), {"min_lr": 0.2}),
    (ValueError, "min_lr.*nan", (0.1, 10), {"min_lr": float("nan")}),
    (ValueError, "warmup_steps.*11", (0.1, 10), {"warmup_steps": 11}),
    (ValueError, "warmup_steps.*-1", (0.1, 10), {"warmup_steps": -1}),
    (TypeError, "warmup_steps must be an integer, got 1.5$", (0.1, 10), {"warmup_steps": 1.5}),
    (ValueError, "sampling.*0", (0.1, 10), {"sampling": 0}),
    (ValueError, "sampling.*-2", (0.1, 10), {"sampling": -2}),
    (ValueError, "sampling.*0.75", (0.1, 10), {"sampling": (0.75, 0.5)}),
    (ValueError, "sampling.*0.0", (0.1, 10), {"sampling": (0.0, 0.5)}),
    (ValueError, "sampling.*1.0", (0.1, 10), {"sampling": (0.5, 1.0)}),
    (ValueError, "sampling.*nan", (0.1, 10), {"sampling": (0.5, float("nan"))}),
    (ValueError, "sampling must be one of .*'50-75'.*got '50'", (0.1, 10), {"sampling": "50"}),
    (TypeError, "sampling must be an integer.*'50-75'.*got None", (0.1, 10), {"sampling": None}),
    (TypeError, "sampling must be an integer.*got 1.5", (0.1, 10), {"sampling": 1.5}),
]


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize(("error", "message", "args", "options"), ERRORS)
def test_bad_arguments_are_refused_by_name_and_value(name, error, message, args, options):
    if name == "one_cycle" and "warmup_steps" in options:
        error, message = TypeError, "warmup_steps"
    with pytest.raises(error, match=message):
        getattr(lrs_ext, name)(*args, **options)


def test_a_schedule_is_made_by_a_constructor():
    with pytest.raises(TypeError, match=r"by a constructor, as lrs_ext.rex"):
        lrs_ext.Schedule(lr=0.1, total_steps=10)


def test_fractions_may_be_arrays():
    fractions = np.array([0.25, 0.5])
    assert lrs_ext.rex(0.1, 10, sampling=fractions) == lrs_ext.rex(0.1, 10, sampling=(0.25, 0.5))
    steps = lrs_ext.step_decay(0.1, 10, milestones=fractions)
    assert steps == lrs_ext.step_decay(0.1, 10, milestones=(0.25, 0.5))


def test_only_the_height_and_the_budget_are_positional():
    for name in (*BUDGETED, "constant"):
        with pytest.raises(TypeError):
            getattr(lrs_ext, name)(0.1, 10, 0.0)


def test_constant_checks_its_height_too():
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        lrs_ext.constant(-1.0)
    assert lrs_ext.constant(0.1).total_steps is None
    assert lrs_ext.constant(0.1, 7).total_steps == lrs_ext.constant(0.1, total_steps=7).total_steps


# Properties.


@st.composite
def schedules(draw):
    total = draw(st.integers(1, 10**6))
    warmup = draw(st.integers(0, total))
    lr = draw(st.just(0.0) | st.floats(1e-6, 1e3))
    name = draw(st.sampled_from(["rex", "linear", "cosine", "delayed_linear", "polynomial", "wsd"]))
    fractions = st.lists(st.floats(0.001, 0.999), min_size=1, max_size=5, unique=True)
    sampling = draw(st.one_of(st.integers(1, 2 * total), fractions.map(sorted).map(tuple)))
    options = {"warmup_steps": warmup, "min_lr": lr * draw(st.floats(0, 1)), "sampling": sampling}
    if name == "rex":
        options["d"] = draw(st.floats(0, 1, exclude_max=True))
    return getattr(lrs_ext, name)(lr, total, **options), cases.ScheduleRow(name, lr, total, options)


@given(schedules(), st.data())
def test_any_schedule_rises_to_its_peak_then_falls_within_its_bounds(drawn, data):
    schedule, row = drawn
    warmup, floor = row.options["warmup_steps"], row.options["min_lr"]
    start = data.draw(st.integers(0, row.total_steps))
    values = schedule.values(start, start + 50)
    slack = 1e-12 * row.lr
    assert np.isfinite(values).all()
    assert (values >= -0.0).all()
    assert (values <= row.lr * (1 + 1e-15)).all()
    assert (np.diff(values[: max(warmup - start, 0)]) >= -slack).all()
    decay = values[max(warmup - start, 0) :]
    assert (np.diff(decay) <= slack).all()
    assert (decay >= floor * (1 - 1e-15)).all()
    if warmup > 0:
        assert schedule(warmup - 1) == row.lr
    if warmup < row.total_steps:
        assert schedule(warmup) == row.lr
    assert schedule(row.total_steps) == floor


@given(schedules(), st.data())
def test_any_schedule_matches_the_oracle(drawn, data):
    schedule, row = drawn
    step = data.draw(st.integers(0, 2 * row.total_steps))
    if isinstance(row.options["sampling"], int):
        expected = oracle(row, step)
        assert schedule(step) == pytest.approx(expected, rel=1e-12, abs=1e-15 * row.lr)


@st.composite
def step_decays(draw):
    total = draw(st.integers(1, 10**6))
    options = {"warmup_steps": draw(st.integers(0, total)), "sampling": draw(st.integers(1, 9))}
    return lrs_ext.step_decay(0.1, total, **options), None


@given(schedules() | step_decays(), st.data())
def test_a_stretch_of_values_is_what_each_step_is_worth(drawn, data):
    schedule, _ = drawn
    start = data.draw(st.integers(0, schedule.total_steps + 9))
    values = schedule.values(start, start + 200)
    assert values.tolist() == [schedule(step) for step in range(start, start + 200)]


@given(schedules())
def test_any_schedule_survives_its_dict(drawn):
    schedule, _ = drawn
    assert lrs_ext.Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
