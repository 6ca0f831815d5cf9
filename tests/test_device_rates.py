"""Learning rates of an optimizer on several devices: every write reaches all of them."""

import pytest
import torch
from device_twins import REX, place

import lrs_ext


def make_sgd(devices, *lrs, **options):
    """From 0 and with gradient -1, an update leaves the learning rate in each parameter."""
    groups = [
        {"params": [place(torch.zeros(()), device) for device in devices], "lr": lr} for lr in lrs
    ]
    opt = lrs_ext.SGD(groups, **options)
    return opt, lambda: used(opt)


def used(opt):
    params = [param for group in opt.param_groups for param in group["params"]]
    for param in params:
        param.data.zero_()
        param.grad = torch.full_like(param, -1.0)
    opt.step()
    return [param.item() for param in params]


def test_floats_and_schedules_reach_every_device(devices):
    opt, used = make_sgd(devices, 0.5, REX)
    assert used() == pytest.approx([0.5] * 2 + [REX(0)] * 2)
    opt.param_groups[0]["lr"] = 0.25
    opt.param_groups[1]["lr"] = 0.125
    assert used() == [0.25] * 2 + [0.125] * 2
    opt.set_schedule(lrs_ext.linear(1.0, 8))
    assert used() == [0.75] * 4
    values = [buffer.values.data_ptr() for buffer in opt.schedule_buffers.values()]
    opt.set_schedule(lrs_ext.linear(1.0, 6), group=1)
    assert values == [buffer.values.data_ptr() for buffer in opt.schedule_buffers.values()]
    assert used() == [0.625] * 2 + [0.5] * 2
    opt.set_schedule(lrs_ext.linear(1.0, 16))
    assert all(buffer.capacity == 17 for buffer in opt.schedule_buffers.values())
    assert used() == [0.75] * 4
    assert opt.current_lr() == [11 / 16] * 2


@pytest.mark.parametrize("which", [0, 1])
def test_what_one_buffer_is_given_all_get(devices, which):
    opt, used = make_sgd(devices, 0.5, lrs_ext.linear(1.0, 8))
    buffer = opt.schedule_buffers[devices[which]]
    buffer.write_(1, 0.25, steps=2)
    assert used() == [0.5] * 2 + [0.25] * 2
    buffer.write_(1, torch.tensor(0.125, dtype=torch.float64, device=devices[1 - which]), steps=1)
    assert used() == [0.5] * 2 + [0.125] * 2
    assert used() == [0.5] * 2 + [0.75] * 2
    buffer.fill_(1, lrs_ext.linear(0.5, 8))
    assert used() == [0.5] * 2 + [0.3125] * 2
    assert opt.param_groups[1]["lr"] == 0.25
    with pytest.raises(IndexError, match="row 2"):
        buffer.write_(2, 0.5, steps=1)


@pytest.mark.parametrize("home", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_is_read_at_every_update(devices, home, dtype):
    lr = torch.tensor(0.5, dtype=dtype, device=devices[home])
    opt, used = make_sgd(devices, lr)
    assert used() == [0.5] * 2
    lr.fill_(0.25)
    assert used() == [0.25] * 2
    opt.param_groups[0]["lr"] = torch.tensor(0.125, device=devices[1 - home])
    assert used() == [0.125] * 2


def test_a_group_on_a_new_device(devices):
    first, second = (place(torch.zeros(()), device) for device in devices)
    schedule = lrs_ext.linear(1.0, 8)
    opt = lrs_ext.SGD([first], lr=schedule, weight_decay=lrs_ext.linear(0.5, 8))
    assert used(opt) == [1.0]
    opt.add_param_group({"params": [second], "lr": 0.5})
    assert list(opt.schedule_buffers) == list(devices)
    assert used(opt) == [0.875, 0.5]
    opt.param_groups[1]["lr"] = schedule
    assert used(opt) == [0.75, 0.75]
    assert opt.param_groups[0]["weight_decay"] == opt.param_groups[1]["weight_decay"] == 0.3125


def test_a_refused_group_on_a_new_device_leaves_everything_as_it_was(devices):
    params = [place(torch.zeros(()), device) for device in devices]
    opt = lrs_ext.SGD(params, lr=0.5)
    with pytest.raises(RuntimeError, match="parameters on meta"):
        opt.add_param_group({"params": [torch.zeros((), device="meta", requires_grad=True)]})
    assert used(opt) == [0.5, 0.5]


def test_a_plateau_reduces_every_device(devices):
    opt, used = make_sgd(devices, 0.5, 0.25)
    plateau = lrs_ext.ReduceOnPlateau(opt, factor=0.5, patience=0)
    used()
    for _ in range(2):
        plateau.step(torch.ones((), device=devices[0]))
    assert used() == [0.25] * 2 + [0.125] * 2
