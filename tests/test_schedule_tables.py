"""Schedules made of values, of a Python function, of other schedules."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrs_ext

TABLE = lrs_ext.from_values([0.3, 0.0, 0.25, 0.1])
FUNCTION = lrs_ext.from_function(lambda k: 0.1 / (k + 1), total_steps=6)
JOIN = lrs_ext.join([lrs_ext.rex(0.1, 5), lrs_ext.constant(0.2), lrs_ext.linear(0.4, 8)], [3, 7])
NESTED = lrs_ext.join([JOIN, TABLE, lrs_ext.constant(0.5, warmup_steps=2)], [12, 14])
ENDLESS = lrs_ext.join(
    [lrs_ext.inverse_sqrt(0.1, warmup_steps=1, capacity=3), lrs_ext.constant(0.2)], [5]
)
SCHEDULES = {
    "table": TABLE,
    "one value": lrs_ext.from_values([0.5]),
    "function": FUNCTION,
    "join": JOIN,
    "nested": NESTED,
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


def oracle(name, step):
    """The same schedules in plain Python."""
    if name == "table":
        return [0.3, 0.0, 0.25, 0.1][min(step, 3)]
    if name == "one value":
        return 0.5
    if name == "function":
        return 0.1 / (min(step, 6) + 1)
    if name == "join":
        if step < 3:
            return 0.1 * (1 - step / 5) / (1 - step / 10)
        return 0.2 if step < 7 else 0.4 * max(1 - (step - 7) / 8, 0.0)
    if step < 12:
        return oracle("join", step)
    return oracle("table", step - 12) if step < 14 else 0.5 * min((step - 13) / 2, 1.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_matches_the_oracle(name):
    for step in [*range(30), 10**6, 2**53]:
        value = SCHEDULES[name](step)
        assert type(value) is float
        assert value == pytest.approx(oracle(name, step), rel=1e-14, abs=1e-17), step


def test_budgets():
    found = {name: schedule.total_steps for name, schedule in SCHEDULES.items()}
    assert found == {"table": 4, "one value": 1, "function": 6, "join": 15, "nested": None}
    assert [schedule.lr for schedule in SCHEDULES.values()] == [0.3, 0.5, 0.1, 0.4, 0.5]


@schedules
def test_values_are_the_calls(schedule):
    for start, stop in [(0, 30), (2, 3), (3, 9), (5, 5), (8, 40), (10**6, 10**6 + 2)]:
        values = schedule.values(start, stop)
        assert values.dtype == np.float64
        assert values.tolist() == [schedule(step) for step in range(start, stop)]


@schedules
def test_rows_hold_the_schedule(schedule):
    for extra in (0, 1, 40):
        buffer = lrs_ext.ScheduleBuffer(2, schedule.capacity + extra)
        row = buffer.fill_(1, schedule).values[1]
        expected = schedule.values(0, buffer.capacity).astype(np.float32)
        assert row.tolist() == expected.tolist()
        assert row[-1].item() == np.float32(schedule(10**9))
        assert not buffer.values[0].any()


@schedules
def test_too_short_a_row_stays_as_it_is(schedule):
    if schedule.capacity == 1:
        return
    buffer = lrs_ext.ScheduleBuffer(1, schedule.capacity - 1)
    with pytest.raises(ValueError, match=f"needs a capacity of {schedule.capacity}, got"):
        buffer.fill_(0, schedule)
    assert not buffer.values.any()
    assert buffer.schedules == [None]


@schedules
def test_an_optimizer_runs_it_and_shows_it(probe, schedule):
    p = probe(schedule)
    for k in range(20):
        assert p.groups[0]["lr"] == schedule(k)
        assert p.used() == [np.float32(schedule(k))]


def test_a_part_without_an_end_holds_its_last_value_in_a_row(probe):
    p = probe(ENDLESS)
    expected = [0.1, 0.1 / 2**0.5, 0.1 / 3**0.5, 0.1 / 3**0.5, 0.1 / 3**0.5, 0.2, 0.2]
    for value in expected:
        shown = p.groups[0]["lr"]
        assert shown == pytest.approx(value, rel=1e-14)
        assert p.used() == [np.float32(shown)]


@schedules
def test_copies_are_equal_and_interchangeable(schedule):
    file = io.BytesIO()
    torch.save(schedule.to_dict(), file)
    file.seek(0)
    copies = [
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        lrs_ext.Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))),
        lrs_ext.Schedule.from_dict(torch.load(file, weights_only=True)),
    ]
    for other in copies:
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)
        assert other.values(0, 40).tolist() == schedule.values(0, 40).tolist()


def test_different_schedules_differ():
    distinct = [*SCHEDULES.values(), TABLE.scaled(2.0), JOIN.scaled(2.0), lrs_ext.constant(0.5)]
    assert len(set(distinct)) == len({repr(s) for s in distinct}) == len(distinct)
    assert lrs_ext.from_values([0.0, 1.0]) == lrs_ext.from_values(np.array([-0.0, 1.0]))


@schedules
def test_a_checkpoint_keeps_it(schedule):
    opt = lrs_ext.SGD([torch.zeros(2, requires_grad=True)], lr=schedule)
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    for _ in range(4):
        opt.step()
    other = lrs_ext.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    other.load_state_dict(opt.state_dict())
    assert other.schedule_buffer.schedules == [schedule]
    assert other.param_groups[0]["lr"] == schedule(4)


@schedules
def test_scaled_keeps_the_shape(schedule):
    scaled = schedule.scaled(0.25)
    assert scaled.total_steps == schedule.total_steps
    assert scaled.lr == 0.25 * schedule.lr
    assert scaled.values(0, 30) == pytest.approx(0.25 * schedule.values(0, 30), rel=1e-14)
    with pytest.raises(ValueError, match=r"Invalid learning rate: -|factor must be finite"):
        schedule.scaled(-1.0)


def test_another_budget_stretches_a_table():
    assert TABLE.with_total_steps(8).values(0, 9).tolist() == [
        *(0.3, 0.3, 0.0, 0.0, 0.25, 0.25, 0.1, 0.1, 0.1)
    ]
    assert TABLE.with_total_steps(2).values(0, 4).tolist() == [0.3, 0.25, 0.1, 0.1]
    assert TABLE.with_total_steps(4) == TABLE
    assert TABLE.with_total_steps(8).total_steps == 8


def test_another_budget_moves_the_end_of_a_join():
    longer = JOIN.with_total_steps(27)
    assert longer.boundaries == (3, 7)
    assert longer.total_steps == 27
    assert longer(17) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="must be more than the last boundary 7, got 7"):
        JOIN.with_total_steps(7)


@schedules
@pytest.mark.parametrize("budget", [0, -3, 1.5])
def test_another_budget_is_checked(schedule, budget):
    with pytest.raises((TypeError, ValueError), match=f"total_steps.*{budget}"):
        schedule.with_total_steps(budget)


# Errors.


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], ValueError, r"1-d and not empty, got shape \(0,\)"),
        ([[0.1, 0.2]], ValueError, r"1-d and not empty, got shape \(1, 2\)"),
        (0.1, ValueError, r"1-d and not empty, got shape \(\)"),
        ([0.1, float("nan")], ValueError, r"Invalid learning rate: nan in values\[1\]"),
        ([0.1, 0.2, -0.5], ValueError, r"Invalid learning rate: -0.5 in values\[2\]"),
        ([float("inf")], ValueError, r"Invalid learning rate: inf in values\[0\]"),
        (["0.1"], TypeError, r"values\[0\] must be a number"),
        ([0.1, None], TypeError, r"values\[1\] must be a number, got None"),
        ([True, False], TypeError, r"values\[0\] must be a number"),
        ([1j], TypeError, r"values\[0\] must be a number"),
        ([0.1, [0.2]], TypeError, "values must be an array or a list of numbers: .*sequence"),
        (torch.ones(2, dtype=torch.bfloat16), TypeError, "values must be an array .*BFloat16"),
    ],
)
def test_values_that_are_no_learning_rates(values, error, message):
    with pytest.raises(error, match=message):
        lrs_ext.from_values(values)


@pytest.mark.parametrize("values", [(0.1, 0.2), np.float32([0.1, 0.2]), torch.tensor([0.1, 0.2])])
def test_values_of_every_kind(values):
    assert lrs_ext.from_values(values).values(0, 3) == pytest.approx([0.1, 0.2, 0.2])
    assert lrs_ext.from_values([1, 0])(0) == 1.0


def test_a_table_does_not_follow_its_source():
    source = np.array([0.1, 0.2])
    table = lrs_ext.from_values(source)
    source[0] = 9.0
    assert table(0) == 0.1


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda k: "0.1", TypeError, r"f\(0\) must be a number, got '0.1'"),
        (lambda k: None if k == 3 else 0.1, TypeError, r"f\(3\) must be a number, got None"),
        (lambda k: float("nan"), ValueError, r"Invalid learning rate: nan in f\(0\)"),
        (lambda k: 2.0 - k, ValueError, r"Invalid learning rate: -1.0 in f\(3\)"),
        (None, TypeError, "f must be a function of the step, got None"),
        (lambda k: True, TypeError, r"f\(0\) must be a number, got True"),
    ],
)
def test_a_function_that_returns_no_learning_rate(function, error, message):
    with pytest.raises(error, match=message):
        lrs_ext.from_function(function, 5)


@pytest.mark.parametrize("total_steps", [0, -1, 1.5])
def test_a_function_needs_a_budget(total_steps):
    with pytest.raises((TypeError, ValueError), match=f"total_steps.*{total_steps}"):
        lrs_ext.from_function(lambda k: 0.1, total_steps)


@pytest.mark.parametrize("total_steps", [2**50, 2**62, 2**63 - 1])
def test_a_function_of_more_steps_than_memory_holds_is_refused_at_once(total_steps):
    with pytest.raises(ValueError, match="values do not fit into memory"):
        lrs_ext.from_function(lambda k: 0.1, total_steps)


def test_a_function_is_called_once_a_step_when_it_is_made():
    calls = []
    schedule = lrs_ext.from_function(lambda k: calls.append(k) or 0.1, 4)
    schedule.values(0, 9)
    assert calls == [0, 1, 2, 3, 4]


C = lrs_ext.constant(0.1)


@pytest.mark.parametrize(
    ("parts", "boundaries", "error", "message"),
    [
        ([C, C], [], ValueError, "one fewer than schedules, got 0 boundaries for 2 schedules"),
        ([C], [3], ValueError, "one fewer than schedules, got 1 boundaries for 1 schedules"),
        ([], [], ValueError, "one fewer than schedules, got 0 boundaries for 0 schedules"),
        ([C, C, C], [5, 5], ValueError, r"positive and increase, got \(5, 5\)"),
        ([C, C, C], [5, 3], ValueError, r"positive and increase, got \(5, 3\)"),
        ([C, C], [0], ValueError, r"positive and increase, got \(0,\)"),
        ([C, C], [-1], ValueError, r"positive and increase, got \(-1,\)"),
        ([C, C], [0.5], TypeError, "boundaries must be an integer, got 0.5"),
        ([C, 0.1], [5], TypeError, r"schedules\[1\] must be a Schedule, got 0.1"),
        ([C, C], 5, TypeError, "join takes two lists, got .* and 5"),
        (C, [5], TypeError, "join takes two lists, got constant.* and "),
    ],
)
def test_joins_that_do_not_fit(parts, boundaries, error, message):
    with pytest.raises(error, match=message):
        lrs_ext.join(parts, boundaries)


# Properties.

rates = st.floats(0, 10, allow_nan=False)


@given(st.lists(rates, min_size=1, max_size=20), st.integers(1, 60))
def test_any_table_keeps_its_values(values, budget):
    table = lrs_ext.from_values(values)
    assert table.values(0, len(values) + 3).tolist() == [*values, *[values[-1]] * 3]
    stretched = table.with_total_steps(budget)
    at = [min(k * len(values) // budget, len(values) - 1) for k in range(budget + 1)]
    assert stretched.values(0, budget + 1).tolist() == [values[k] for k in at]


@given(st.lists(st.lists(rates, min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_any_join_counts_each_part_from_its_own_start(tables, data):
    starts, at = [0], 0
    for _ in tables[1:]:
        at += data.draw(st.integers(1, 8))
        starts.append(at)
    joined = lrs_ext.join([lrs_ext.from_values(values) for values in tables], starts[1:])
    for step in range(starts[-1] + 8):
        part = max(i for i, start in enumerate(starts) if start <= step)
        values = tables[part]
        assert joined(step) == values[min(step - starts[part], len(values) - 1)]
