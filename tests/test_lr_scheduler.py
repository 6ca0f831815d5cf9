"""ScheduleLR on optimizers of torch, and what other implementations of REX get wrong there."""

import io
import itertools
import warnings

import cases
import pytest
import reference
import torch
from torch.optim import lr_scheduler

import lrs_ext

REX = lrs_ext.rex(0.1, 10)


def make(*lrs, cls=torch.optim.SGD, **options):
    params = [torch.zeros(2, requires_grad=True) for _ in lrs]
    for param in params:
        param.grad = torch.ones(2)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)]
    return cls(groups, **options)


def used(optimizer, scheduler, steps):
    """The learning rates of the next updates, one list an update."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "row", [row for row in cases.SCHEDULES if (row.total_steps or 0) < 200], ids=str
)
def test_every_update_runs_at_the_value_of_the_oracle(row):
    budget = () if row.total_steps is None else (row.total_steps,)
    schedule = getattr(lrs_ext, row.name)(row.lr, *budget, **row.options)
    optimizer = make(row.lr)
    rates = used(optimizer, lrs_ext.ScheduleLR(optimizer, schedule), (row.total_steps or 20) + 3)
    options = {k: v for k, v in row.options.items() if k != "capacity"}
    for step, (rate,) in enumerate(rates):
        expected = reference.schedule(
            row.name, step, lr=row.lr, total_steps=row.total_steps, **options
        )
        assert rate == pytest.approx(expected, rel=1e-13, abs=1e-16)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.RMSprop, lrs_ext.SGD])
def test_any_optimizer_can_be_driven(cls):
    optimizer = make(0.1, cls=cls)
    rates = used(optimizer, lrs_ext.ScheduleLR(optimizer, REX), 12)
    assert rates == [[REX(k)] for k in range(12)]


# Groups.


@pytest.mark.parametrize("height", [0.1, 1.0])
def test_groups_keep_their_own_heights_in_warm_up_and_decay(height):
    schedule = lrs_ext.rex(height, 10, warmup_steps=3, min_lr=0.01 * height)
    optimizer = make(0.1, 0.4, 0.02)
    rates = used(optimizer, lrs_ext.ScheduleLR(optimizer, schedule), 12)
    for k, rate in enumerate(rates):
        shape = lrs_ext.rex(1.0, 10, warmup_steps=3, min_lr=0.01)(k)
        assert rate == pytest.approx([0.1 * shape, 0.4 * shape, 0.02 * shape], rel=1e-14)


def test_a_list_has_a_schedule_for_each_group_as_it_is():
    optimizer = make(0.5, 0.5)
    schedules = [REX, lrs_ext.linear(0.3, 5)]
    scheduler = lrs_ext.ScheduleLR(optimizer, schedules)
    assert used(optimizer, scheduler, 7) == [[s(k) for s in schedules] for k in range(7)]


def test_a_height_that_is_that_of_no_group_is_pointed_out():
    with pytest.warns(UserWarning, match=r"\[0.5\] set the heights, not that of rex\(lr=0.1"):
        scheduler = lrs_ext.ScheduleLR(make(0.5), REX)
    assert scheduler.get_last_lr() == [0.5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrs_ext.ScheduleLR(make(0.5, 0.1), REX)
        lrs_ext.ScheduleLR(make(0.5), lrs_ext.rex(1.0, 10))
        lrs_ext.ScheduleLR(make(torch.tensor(0.1)), REX)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (0.1, TypeError, "schedule must be a Schedule, got 0.1"),
        ("rex", TypeError, "schedule must be a Schedule, got 'rex'"),
        ([REX, 0.1], TypeError, "must be a Schedule, got 0.1 for group 1"),
        ([REX], ValueError, "expected 2 schedules, got 1"),
        (lrs_ext.constant(0.0), ValueError, "must have a positive lr"),
    ],
)
def test_bad_schedules_are_refused_before_anything_changes(schedule, error, message):
    optimizer = make(0.5, 0.25)
    with pytest.raises(error, match=message):
        lrs_ext.ScheduleLR(optimizer, schedule)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        lrs_ext.ScheduleLR(3, REX)


def test_a_group_that_comes_later_is_refused():
    optimizer = make(0.1)
    scheduler = lrs_ext.ScheduleLR(optimizer, REX)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    optimizer.step()
    with pytest.raises(RuntimeError, match="make ScheduleLR after add_param_group"):
        scheduler.step()


# The contract of torch.


def test_it_is_a_scheduler_of_torch():
    scheduler = lrs_ext.ScheduleLR(make(0.1), REX)
    assert isinstance(scheduler, lr_scheduler.LRScheduler)


def test_looking_changes_nothing():
    optimizer = make(0.1, 0.05)
    scheduler = lrs_ext.ScheduleLR(optimizer, REX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(12):
            for _ in range(3):
                assert scheduler.get_lr() == scheduler.get_last_lr()
            assert scheduler.get_last_lr() == pytest.approx([REX(k), REX(k) / 2], rel=1e-15)
            assert {type(lr) for lr in scheduler.get_last_lr()} == {float}
            optimizer.step()
            scheduler.step()


def test_a_tensor_is_filled_in_place():
    tensor = torch.tensor(0.1)
    optimizer = make(tensor, cls=torch.optim.Adam, capturable=False)
    scheduler = lrs_ext.ScheduleLR(optimizer, REX)
    for k in range(12):
        assert optimizer.param_groups[0]["lr"] is tensor
        assert tensor.item() == pytest.approx(REX(k), rel=1e-7)
        assert type(scheduler.get_last_lr()[0]) is float
        optimizer.step()
        scheduler.step()


def test_an_explicit_epoch_is_heeded():
    optimizer = make(0.1)
    scheduler = lrs_ext.ScheduleLR(optimizer, REX)
    optimizer.step()
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(7)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == REX(7)


def test_it_takes_its_turn_in_a_sequence():
    optimizer = make(0.1)
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3),
        lrs_ext.ScheduleLR(optimizer, REX),
        lr_scheduler.ConstantLR(optimizer, 1.0),
    ]
    sequence = lr_scheduler.SequentialLR(optimizer, parts, [3, 8])
    rates = [rate for (rate,) in used(optimizer, sequence, 10)]
    assert rates[3:8] == [REX(k) for k in range(5)]
    assert rates[:3] == pytest.approx([0.05, 0.1 * 2 / 3, 0.1 * 5 / 6])
    first = make(0.1)
    sequence = lr_scheduler.SequentialLR(
        first, [lrs_ext.ScheduleLR(first, REX), lr_scheduler.ConstantLR(first, 0.5)], [4]
    )
    assert sequence.get_last_lr() == [0.1]
    assert used(first, sequence, 4) == [[REX(k)] for k in range(4)]


# Checkpoints.


def saved(*parts):
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("order", ["optimizer first", "scheduler first", "made last"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_resumed_run_goes_on_where_it_was(order, as_tensor):
    def start():
        return make(*(torch.tensor(lr) if as_tensor else lr for lr in (0.1, 0.4)))

    optimizer = start()
    scheduler = lrs_ext.ScheduleLR(optimizer, REX)
    used(optimizer, scheduler, 4)
    optimizer_state, scheduler_state = saved(optimizer, scheduler)
    expected = used(optimizer, scheduler, 8)

    resumed = start()
    if order == "made last":
        resumed.load_state_dict(optimizer_state)
    other = lrs_ext.ScheduleLR(resumed, REX)
    if order == "optimizer first":
        resumed.load_state_dict(optimizer_state)
    other.load_state_dict(scheduler_state)
    if order == "scheduler first":
        resumed.load_state_dict(optimizer_state)
    assert used(resumed, other, 8) == expected


def test_a_longer_budget_is_not_overwritten_by_the_checkpoint():
    optimizer = make(0.1)
    scheduler = lrs_ext.ScheduleLR(optimizer, REX)
    used(optimizer, scheduler, 4)
    (state,) = saved(scheduler)
    assert state["schedules"] == [REX.to_dict()]
    longer = REX.with_total_steps(20)
    other = make(0.1)
    scheduler = lrs_ext.ScheduleLR(other, longer)
    scheduler.load_state_dict(state)
    assert used(other, scheduler, 18) == [[longer(k)] for k in range(4, 22)]


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_a_sequence_resumes_in_every_part(steps):
    def start():
        optimizer = make(0.1)
        parts = [
            lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3),
            lrs_ext.ScheduleLR(optimizer, REX),
            lr_scheduler.ConstantLR(optimizer, 0.25),
        ]
        return optimizer, lr_scheduler.SequentialLR(optimizer, parts, [3, 8])

    optimizer, sequence = start()
    used(optimizer, sequence, steps)
    states = saved(optimizer, sequence)
    expected = used(optimizer, sequence, 6)
    resumed, other = start()
    resumed.load_state_dict(states[0])
    other.load_state_dict(states[1])
    assert used(resumed, other, 6) == expected


# What other implementations get wrong; the numbers are those of the list of known bugs.


def rates_of(schedule, steps, lr=1.0):
    optimizer = make(lr)
    return [rate for (rate,) in used(optimizer, lrs_ext.ScheduleLR(optimizer, schedule), steps)]


def test_1_11_20_the_end_holds_without_a_wrap_a_negative_value_or_an_error():
    rates = rates_of(lrs_ext.rex(1.0, 100, d=0.9), 320)
    assert rates[99] == pytest.approx(0.091743, abs=1e-6)
    assert set(rates[100:]) == {0.0}


def test_3_4_13_the_first_update_runs_at_the_optimizers_peak_and_the_last_is_not_wasted():
    rates = rates_of(lrs_ext.rex(1.0, 100), 100, lr=0.3)
    assert rates[0] == 0.3
    assert max(rates) == 0.3
    assert rates[99] == pytest.approx(0.3 * 0.019802, rel=1e-4)


def test_6_the_default_floor_is_zero():
    assert rates_of(lrs_ext.rex(1.0, 10), 11)[-1] == 0.0


def test_7_8_the_warm_up_is_a_ramp_from_above_zero_to_the_peak_without_a_spike():
    rates = rates_of(lrs_ext.rex(1.0, 100, warmup_steps=10), 100)
    assert rates[:11] == pytest.approx([*(k / 10 for k in range(1, 11)), 1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_12_no_warm_up_is_no_division_by_zero():
    assert rates_of(lrs_ext.rex(1.0, 10, warmup_steps=0), 1) == [1.0]


def test_15_only_the_peak_and_the_budget_are_positional():
    with pytest.raises(TypeError, match="positional"):
        lrs_ext.rex(1.0, 10, 0.1)


def test_16_progress_has_no_offset():
    rates = rates_of(lrs_ext.rex(1.0, 100), 100)
    assert [round(rates[k], 6) for k in (0, 1, 50, 98)] == [1.0, 0.994975, 0.666667, 0.039216]


def test_21_the_saved_state_names_the_schedule_that_runs():
    scheduler = lrs_ext.ScheduleLR(make(0.2), lrs_ext.rex(1.0, 10, d=0.9))
    (fields,) = scheduler.state_dict()["schedules"]
    assert lrs_ext.Schedule.from_dict(fields) == lrs_ext.rex(0.2, 10, d=0.9)
