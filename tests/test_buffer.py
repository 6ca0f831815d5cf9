"""The schedule buffer and who is in charge of a group's learning rate."""

import copy

import cases
import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import lrs_ext


def float32(value):
    return float(np.float32(value))


def make(row):
    budget = () if row.total_steps is None else (row.total_steps,)
    return getattr(lrs_ext, row.name)(row.lr, *budget, **row.options)


REX = lrs_ext.rex(0.3, 8, warmup_steps=2, min_lr=0.01)
LINEAR = lrs_ext.linear(0.7, 5)


# The buffer.


@pytest.mark.parametrize("row", cases.SCHEDULES, ids=str)
def test_values_are_the_schedule_in_float32_and_the_last_slot_is_its_end(probe, row):
    schedule = make(row)
    values = probe(schedule).buffer.values
    assert values.shape[1] == schedule.capacity
    assert values.dtype == torch.float32
    capacity = values.shape[1]
    expected = torch.from_numpy(schedule.values(0, capacity).astype(np.float32))
    assert torch.equal(values[0].cpu(), expected)
    if row.name != "inverse_sqrt":
        assert values[0, -1].item() == float32(schedule(10**9))


def test_each_group_has_its_row(probe, backend):
    p = probe(REX, LINEAR, lrs_ext.constant(0.2))
    values = p.buffer.values
    assert values.shape[0] == 3
    assert values.device.type == p.buffer.step.device.type == backend.device
    for row, schedule in enumerate([REX, LINEAR, lrs_ext.constant(0.2)]):
        expected = schedule.values(0, values.shape[1]).astype(np.float32)
        assert values[row].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "row", [r for r in cases.SCHEDULES if (r.total_steps or 0) <= 113], ids=str
)
def test_update_k_uses_value_k_and_the_end_holds(probe, backend, row):
    schedule = make(row)
    steps = min(row.total_steps or 6, 12 if backend.interpreted else 113) + 3
    p = probe(schedule)
    for k in range(steps):
        assert p.groups[0]["lr"] == schedule(k)
        assert type(p.groups[0]["lr"]) is float
        assert p.opt.current_lr() == [float32(schedule(k))]
        assert p.used() == [float32(schedule(k))]


def test_step_counts_updates(probe):
    p = probe(REX)
    for k in range(11):
        assert p.buffer.step.dtype == torch.int64
        assert p.buffer.step.shape == ()
        assert p.buffer.step.item() == k
        p.used()


def test_groups_follow_their_own_schedules(probe):
    p = probe(REX, LINEAR, 0.125, torch.tensor(0.25))
    for k in range(10):
        assert p.opt.current_lr() == [float32(REX(k)), float32(LINEAR(k)), 0.125, 0.25]
        assert p.used() == [float32(REX(k)), float32(LINEAR(k)), 0.125, 0.25]


def test_a_schedule_for_the_whole_optimizer_serves_every_group(backend):
    params = [torch.zeros((), device=backend.device, requires_grad=True) for _ in range(2)]
    opt = lrs_ext.SGD([{"params": [p]} for p in params], lr=REX, backend=backend.name)
    for k in range(3):
        for param in params:
            param.data.zero_()
            param.grad = torch.full_like(param, -1.0)
        opt.step()
        assert [p.item() for p in params] == [float32(REX(k))] * 2


def test_a_group_without_gradients_keeps_pace_with_the_others(probe):
    p = probe(REX, LINEAR)
    p.opt.step()
    assert p.buffer.step.item() == 0
    p.params[1].grad = torch.ones_like(p.params[1])
    p.opt.step()
    assert p.params[0].item() == 0.0
    assert [group["lr"] for group in p.groups] == [REX(1), LINEAR(1)]
    assert p.used() == [float32(REX(1)), float32(LINEAR(1))]


def test_the_device_reads_its_own_step(probe):
    p = probe(REX, LINEAR)
    p.buffer.step.fill_(4)
    assert p.used() == [float32(REX(4)), float32(LINEAR(4))]
    assert p.buffer.step.item() == 5


def test_addresses_never_change(probe):
    p = probe(REX, LINEAR)
    tensors = [p.buffer.values, p.buffer.step]
    addresses = [t.data_ptr() for t in tensors]
    checkpoint = copy.deepcopy(p.opt.state_dict())
    actions = [
        p.used,
        lambda: p.groups[0].update(lr=0.5),
        p.used,
        lambda: p.buffer.fill_(0, LINEAR),
        lambda: p.buffer.write_(1, 0.25, 2),
        p.used,
        p.opt.zero_grad,
        lambda: p.opt.load_state_dict(checkpoint),
        p.used,
    ]
    for action in actions:
        action()
        assert p.opt.schedule_buffer is p.buffer
        assert [p.buffer.values.data_ptr(), p.buffer.step.data_ptr()] == addresses


def test_lr_tensor_is_what_the_next_update_uses(probe, backend):
    p = probe(REX, 0.1, torch.tensor(0.25))
    for k in range(10):
        if k == 5:
            p.groups[1]["lr"] = 0.75
        tensors = [p.opt.lr_tensor(group) for group in range(3)]
        assert {t.device.type for t in tensors} == {backend.device}
        assert {t.shape for t in tensors} == {()}
        expected = [t.item() for t in tensors]
        assert p.opt.lr_tensor().item() == expected[0] == float32(REX(k))
        assert p.opt.current_lr() == expected == p.used()


# Filling and writing rows.


def test_fill_puts_another_schedule_in_charge_from_the_current_step(probe):
    p = probe(REX, LINEAR)
    used = [p.used() for _ in range(3)]
    p.buffer.fill_(0, lrs_ext.cosine(0.5, 6))
    assert p.opt.current_lr() == [float32(lrs_ext.cosine(0.5, 6)(3)), float32(LINEAR(3))]
    used += [p.used() for _ in range(6)]
    expected = [REX(k) for k in range(3)] + [lrs_ext.cosine(0.5, 6)(k) for k in range(3, 9)]
    assert [row[0] for row in used] == [float32(value) for value in expected]
    assert [row[1] for row in used] == [float32(LINEAR(k)) for k in range(9)]
    assert p.groups[0]["lr"] == lrs_ext.cosine(0.5, 6)(9)


@pytest.mark.parametrize("schedule", [lrs_ext.rex, 0.1, None])
def test_fill_refuses_what_is_no_schedule(probe, schedule):
    p = probe(REX)
    with pytest.raises(TypeError, match="fill_ takes a Schedule, got"):
        p.buffer.fill_(0, schedule)
    assert p.used() == [float32(REX(0))]


def test_fill_refuses_a_schedule_that_is_too_long(probe):
    p = probe(REX)
    with pytest.raises(ValueError, match="total_steps=1000"):
        p.buffer.fill_(0, lrs_ext.rex(0.3, 1000))
    assert p.used() == [float32(REX(0))]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_write_sets_the_next_updates_and_then_the_schedule_goes_on(probe, backend, as_tensor):
    p = probe(REX, LINEAR)
    p.used()
    value = torch.tensor(0.375, device=backend.device) if as_tensor else 0.375
    p.buffer.write_(1, value, 3)
    used = [p.used() for _ in range(6)]
    expected = [0.375, 0.375, 0.375, *(float32(LINEAR(k)) for k in (4, 5, 6))]
    assert [row[1] for row in used] == expected
    assert [row[0] for row in used] == [float32(REX(k)) for k in range(1, 7)]


@pytest.mark.parametrize("start", [6, 30])
def test_write_beyond_the_end_writes_the_value_that_holds(probe, start):
    p = probe(LINEAR)
    p.buffer.step.fill_(start)
    p.buffer.write_(0, 0.375, 4)
    assert [p.used() for _ in range(6)] == [[0.375]] * 6


def test_write_reads_a_tensor_when_called_not_later(probe, backend):
    p, value = probe(REX), torch.tensor(0.5, device=backend.device)
    p.buffer.write_(0, value, 2)
    value.fill_(9.0)
    assert [p.used(), p.used()] == [[0.5], [0.5]]


@pytest.mark.parametrize(("value", "steps"), [(0.5, 0), (0.5, -1), (torch.ones(2), 1)])
def test_write_refuses_what_it_cannot_write(probe, value, steps):
    p = probe(REX)
    with pytest.raises(ValueError, match=r"steps|element"):
        p.buffer.write_(0, value, steps)
    assert p.used() == [float32(REX(0))]


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (2.5, TypeError)])
def test_a_step_that_no_update_can_have_is_refused(probe, step, error):
    p = probe(REX)
    with pytest.raises(error, match="step must"):
        p.buffer.set_step_(step)
    assert p.used() == [float32(REX(0))]


@pytest.mark.parametrize("row", [2, 100])
def test_rows_that_do_not_exist_are_refused(probe, row):
    p = probe(REX, LINEAR)
    before = p.buffer.values.clone()
    with pytest.raises((IndexError, ValueError)):
        p.buffer.write_(row, 0.5, 1)
    with pytest.raises((IndexError, ValueError)):
        p.buffer.fill_(row, REX)
    assert torch.equal(p.buffer.values, before)


# A float written to group["lr"].


def test_a_float_takes_over_from_the_next_update_until_the_next_float(probe):
    p = probe(REX, LINEAR)
    used = [p.used()]
    for value in (0.5, 0.25, 0.25):
        p.groups[0]["lr"] = value
        assert p.opt.current_lr()[0] == value
        used += [p.used(), p.used()]
        assert p.groups[0]["lr"] == value
    expected = [float32(REX(0)), *[0.5] * 2, *[0.25] * 4]
    assert [row[0] for row in used] == expected
    assert [row[1] for row in used] == [float32(LINEAR(k)) for k in range(7)]


@pytest.mark.parametrize("value", [1, 0, 0.0, np.float64(0.375), np.float32(0.375)], ids=repr)
def test_every_kind_of_number_takes_over(probe, value):
    p = probe(REX)
    p.used()
    p.groups[0]["lr"] = value
    assert [p.used(), p.used()] == [[float(value)]] * 2


def test_an_equal_float_is_a_new_decision(probe):
    p = probe(REX)
    p.used()
    p.groups[0]["lr"] = float(repr(REX(1)))
    assert [p.used() for _ in range(4)] == [[float32(REX(1))]] * 4


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_putting_the_found_float_back_returns_control_to_the_schedule(probe, updates):
    p = probe(REX, 0.125)
    p.used()
    saved = [group["lr"] for group in p.groups]
    for group in p.groups:
        group["lr"] = 0.5
    assert [p.used() for _ in range(updates)] == [[0.5, 0.5]] * updates
    for group, lr in zip(p.groups, saved, strict=True):
        group["lr"] = lr
    for k in range(1 + updates, 11):
        assert p.used() == [float32(REX(k)), 0.125]
        assert p.groups[0]["lr"] == REX(k + 1)


def test_a_float_takes_over_a_group_that_began_with_a_float(probe):
    p = probe(0.125)
    assert p.groups[0]["lr"] == 0.125
    assert p.used() == [0.125]
    p.groups[0]["lr"] *= 0.5
    assert p.used() == [0.0625]


# A tensor as the learning rate.

TENSORS = [
    torch.tensor(0.25),
    torch.tensor([0.25]),
    torch.tensor([[0.25]]),
    torch.tensor(0.25, dtype=torch.float64),
    torch.tensor(0.25, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}{list(t.shape)}")
def test_a_tensor_is_read_live(probe, backend, tensor):
    tensor = tensor.clone().to(backend.device)
    p = probe(tensor)
    assert p.used() == [0.25]
    tensor.fill_(0.5)
    assert p.used() == [0.5]
    p.groups[0]["lr"].mul_(0.5)
    assert p.used() == [0.25]
    assert p.opt.current_lr() == [0.25]


def test_a_tensor_on_the_cpu_is_read_live_too(probe):
    tensor = torch.tensor(0.25)
    p = probe(tensor)
    assert p.used() == [0.25]
    tensor.fill_(0.5)
    assert p.used() == [0.5]


def test_one_tensor_for_two_groups_does_not_tie_them(backend):
    lr = torch.tensor(0.25, device=backend.device)
    params = [torch.zeros((), device=backend.device, requires_grad=True) for _ in range(3)]
    groups = [{"params": [p]} for p in params[:2]]
    opt = lrs_ext.SGD(groups, lr=lr, backend=backend.name)
    opt.add_param_group({"params": params[2:]})
    opt.param_groups[1]["lr"].fill_(0.5)
    for param in params:
        param.grad = torch.full_like(param, -1.0)
    opt.step()
    assert [p.item() for p in params] == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("looked_at", [False, True])
def test_tensors_and_floats_take_over_from_each_other(probe, backend, looked_at):
    p = probe(REX)
    p.used()
    for lr in (
        torch.tensor(0.25, device=backend.device),
        torch.tensor(0.5, device=backend.device),
        0.125,
        torch.tensor(0.75),
        torch.tensor(0.0),
        0.375,
    ):
        p.groups[0]["lr"] = lr
        if looked_at:
            assert p.opt.current_lr() == [float(lr)]
            p.opt.state_dict()
        assert [p.used(), p.used()] == [[float(lr)]] * 2


# The schedulers of torch.optim.

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda k: 0.8**k),
    "LambdaLR from zero": lambda opt: lr_scheduler.LambdaLR(opt, lambda k: k / 4),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, gamma=0.5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 7, eta_min=1e-4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=12),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, 5)],
        [3],
    ),
}
SCHEDULED = [("SGD", {"momentum": 0.9}), ("AdamW", {})]


def trajectory(optimizer, device, lr, scheduler, options):
    """Parameters and learning rates over 10 updates of two groups under a scheduler."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(5, generator=generator).to(device).requires_grad_() for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": lr / 2}]
    opt = optimizer(groups, lr=lr, **options)
    scheduler = scheduler(opt)
    values, rates = [], []
    for _ in range(10):
        rates.append([float(group["lr"]) for group in opt.param_groups])
        for param in params:
            param.grad = torch.randn(5, generator=generator).to(device)
        opt.step()
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))
        values.append(torch.stack([param.detach().cpu().clone() for param in params]))
    return torch.stack(values), rates


@pytest.mark.parametrize(("name", "options"), SCHEDULED, ids=str)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_of_torch_drive_a_float(backend, name, options, scheduler):
    scheduler, ours, theirs = (
        SCHEDULERS[scheduler],
        getattr(lrs_ext, name),
        getattr(torch.optim, name),
    )
    own = options | {"backend": backend.name}
    values, rates = trajectory(ours, backend.device, 0.1, scheduler, own)
    expected, expected_rates = trajectory(
        theirs, backend.device, 0.1, scheduler, options | {"foreach": False}
    )
    assert rates == expected_rates
    torch.testing.assert_close(values, expected, rtol=cases.TORCH.rtol, atol=cases.TORCH.atol)


@pytest.mark.parametrize("scheduler", ["LambdaLR", "StepLR", "CosineAnnealingLR"])
def test_schedulers_of_torch_drive_a_tensor(backend, scheduler):
    scheduler, lr = SCHEDULERS[scheduler], torch.tensor(0.1, device=backend.device)
    own = {"backend": backend.name}
    values, rates = trajectory(lrs_ext.AdamW, backend.device, lr, scheduler, own)
    expected, expected_rates = trajectory(
        torch.optim.AdamW, backend.device, 0.1, scheduler, {"foreach": False}
    )
    np.testing.assert_allclose(rates, expected_rates, rtol=1e-6)
    torch.testing.assert_close(values, expected, rtol=cases.TORCH.rtol, atol=cases.TORCH.atol)


def test_a_scheduler_of_torch_takes_over_from_a_schedule(probe):
    p = probe(REX, LINEAR)
    lr_scheduler.LambdaLR(p.opt, lambda k: 0.5)
    expected = [float32(0.5 * REX(0)), float32(0.5 * LINEAR(0))]
    assert [p.used(), p.used()] == [expected, expected]
