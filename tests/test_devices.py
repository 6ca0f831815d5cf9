"""Parameters on several devices in one optimizer: all goes as with an optimizer for each device."""

import copy
import itertools
import pickle

import cases
import pytest
import torch
from device_twins import (
    ACCELERATORS,
    CPU,
    ELSEWHERE,
    GPU,
    REX,
    Twins,
    gpu,
    make,
    make_params,
    place,
    set_gradients,
    states_of,
)
from moving import with_schedules
from test_no_sync import NoReadingMethods, NoReadingOps

import lrs_ext
from lrs_ext import param_devices
from lrs_ext.backends import select_backend

rows = pytest.mark.parametrize("row", cases.STATE_UPDATES, ids=str)


@rows
def test_steps_equal_those_of_an_optimizer_for_each_device(devices, row):
    twins = Twins(devices, row)
    for k in range(5):
        twins.step(skip=[1, 2] if k < 2 else [])
    assert [int(buffer.step) for buffer in twins.opt.schedule_buffers.values()] == [5, 5]


def test_members_say_what_there_is_on_each_device(devices):
    twins = Twins(devices)
    opt = twins.opt
    assert opt.schedule_buffer is opt.schedule_buffers[devices[0]]
    assert list(opt.backends) == list(devices)
    assert opt.backends == {d: select_backend(None, d) for d in devices}
    assert opt.backend == opt.backends[devices[0]]
    for device, buffer in opt.schedule_buffers.items():
        assert buffer.step.device == buffer.values.device == torch.empty(0, device=device).device
    assert opt.lr_tensor(1).device == opt.schedule_buffer.step.device


@pytest.mark.parametrize("row", cases.MOVING_ALL, ids=str)
def test_numbers_that_move(devices, row):
    twins = Twins(devices, row.update, **with_schedules(row))
    for _ in range(4):
        twins.step()
    twins_of_group = [opt.param_groups[0] for opt in twins.opts]
    for group in twins_of_group:
        group["weight_decay"] = 0.4
    twins.step()
    for group in twins_of_group:
        group["weight_decay"] = lrs_ext.linear(0.3, 30)
    for _ in range(2):
        twins.step()


@pytest.mark.parametrize("number", [0.125, lrs_ext.linear(0.25, 5)])
def test_a_number_put_there_before_a_group_on_another_device_counts(devices, number):
    here, there = (place(torch.ones(3), device) for device in devices)
    opt = lrs_ext.AdamW([here], lr=0.1, weight_decay=lrs_ext.linear(0.5, 5))
    opt.param_groups[0]["weight_decay"] = number
    opt.add_param_group({"params": [there], "weight_decay": 0.0})
    opt.sync_groups()
    shown = number if isinstance(number, float) else number(0)
    assert opt.param_groups[0]["weight_decay"] == shown


def test_a_device_without_gradients_keeps_up(devices):
    twins = Twins(devices)
    twins.step()
    set_gradients(twins.params, 1, skip=range(1, len(twins.params), 2))
    twins.opt.step()
    assert [int(buffer.step) for buffer in twins.opt.schedule_buffers.values()] == [2, 2]
    for index, param in enumerate(twins.params):
        assert torch.equal(param, twins.others[index]) == (index % 2 == 1)
    set_gradients(twins.params, 2, skip=range(len(twins.params)))
    twins.opt.step()
    assert [int(buffer.step) for buffer in twins.opt.schedule_buffers.values()] == [2, 2]


@pytest.mark.parametrize("home", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("skip", [(), range(1, 16, 2)], ids=["all", "gradients on one device"])
def test_an_overflow_skips_the_update_everywhere(devices, home, skip):
    twins = Twins(devices)
    twins.step()
    kept = [t.clone() for t in (*twins.params, *states_of(twins.opt))]
    twins.set_gradients(skip)
    scale, overflow = (torch.tensor(x, device=devices[home]) for x in (8.0, 1.0))
    twins.opt.grad_scale, twins.opt.found_inf = scale, overflow
    twins.opt.step()
    present = (*twins.params, *states_of(twins.opt))
    assert all(torch.equal(a, b) for a, b in zip(kept, present, strict=True))
    assert [int(buffer.step) for buffer in twins.opt.schedule_buffers.values()] == [1, 1]
    overflow.zero_()
    for opt in twins.opts:
        opt.grad_scale, opt.found_inf = scale, overflow
    twins.step()


@pytest.mark.parametrize("scale", [None, 4.0])
def test_the_norm_is_that_of_all_gradients(devices, scale):
    twins = Twins(devices)
    for _ in range(3):
        twins.set_gradients()
        stored = torch.cat([p.grad.double().cpu().flatten() for p in twins.params]).norm()
        max_norm = 0.25 * float(stored)
        norm = lrs_ext.clip_grad_norm_(twins.opt, max_norm)
        assert norm.device == twins.params[0].device
        assert float(norm) == pytest.approx(float(stored), rel=1e-6)
        for opt, device in zip(twins.apart, devices, strict=True):
            opt._steps._scaling.clip(norm.to(device), max_norm, is_captured=False)
        if scale is not None:
            for opt in twins.opts:
                opt.grad_scale = torch.tensor(scale, device=devices[1])
                opt.found_inf = torch.zeros((), device=devices[1])
        before = [param.detach().clone() for param in twins.params]
        twins.step()
        assert not any(map(torch.equal, before, twins.params))


def test_a_tensor_limits_the_norm_everywhere(devices):
    params = [place(torch.zeros(2), device) for device in devices]
    opt = lrs_ext.SGD(params, lr=1.0)
    for param, gradient in zip(params, ([3.0, 0.0], [0.0, 4.0]), strict=True):
        param.grad = torch.tensor(gradient, device=param.device)
    assert float(lrs_ext.clip_grad_norm_(opt, torch.ones(1, device=devices[1]))) == 5.0
    opt.step()
    moved = torch.stack([param.detach().cpu() for param in params])
    torch.testing.assert_close(moved, torch.tensor([[-0.6, 0.0], [0.0, -0.8]]))


@rows
def test_a_checkpoint_goes_on_to_the_bit(devices, row, tmp_path):
    twins = Twins(devices, row)
    for _ in range(3):
        twins.step()
    torch.save(twins.opt.state_dict(), tmp_path / "checkpoint")
    params = [place(param, d) for param, d in zip(twins.params, itertools.cycle(devices))]
    half = len(params) // 2
    opt = make(row, [{"params": params[:half]}, {"params": params[half:]}])
    opt.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))
    twins.opt, twins.params = opt, params
    for _ in range(3):
        twins.step()


@pytest.mark.parametrize("name", cases.TORCH_OPTIMIZERS)
def test_checkpoints_of_torch_move_both_ways(devices, name):
    options = {"lr": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    params = make_params(devices, [torch.float32])
    theirs = getattr(torch.optim, name)(params, **options)
    set_gradients(params, 0)
    theirs.step()
    ours = getattr(lrs_ext, name)(params, **options)
    ours.load_state_dict(theirs.state_dict())
    assert all(s.device == p.device for p in params for s in ours.state[p].values())
    assert all(int(b.step) == (name != "SGD") for b in ours.schedule_buffers.values())
    set_gradients(params, 1)
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    theirs.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_to_the_bit(devices, copied):
    twins = Twins(devices)
    for _ in range(2):
        twins.step()
    twins.opt = copied(twins.opt)
    twins.params = [param for group in twins.opt.param_groups for param in group["params"]]
    for _ in range(2):
        twins.step()


def test_parameters_that_move_are_followed(devices):
    twins = Twins(devices, lr=REX)
    twins.step()
    home = devices[0]
    for param in twins.params:
        param.grad = None
        param.data = param.data.to(home, copy=True)
        param.is_elsewhere = home == ELSEWHERE
    twins.set_gradients()
    twins.opt.step()
    assert list(twins.opt.schedule_buffers) == [home]
    assert int(twins.opt.schedule_buffer.step) == 2
    assert all(s.device == p.device for p in twins.params for s in twins.opt.state[p].values())
    for opt in twins.apart:
        opt.step()
    for ours, theirs in zip(twins.params, twins.others, strict=True):
        # Backends round alike, but a device's own division and root may not.
        torch.testing.assert_close(ours.cpu(), theirs.cpu())


@rows
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_parameter_moves_to_the_other_device(devices, row, in_backward):
    params, others = (
        [place(torch.full((3,), 2.0), device) for device in (*devices, devices[1])]
        for _ in range(2)
    )
    opt, expected = make(row, params, lr=REX), make(row, others, lr=REX)
    handle = opt.step_in_backward() if in_backward else None
    for k in range(4):
        if k == 2:
            params[2].grad = None
            params[2].data = params[2].data.to(devices[0], copy=True)
            params[2].is_elsewhere = devices[0] == ELSEWHERE
        for param, other in zip(params, others, strict=True):
            other.grad = torch.linspace(-1.0, 1.0, 3, device=other.device)
            (param * other.grad.to(param.device)).sum().backward()
        opt.step()
        expected.step()
        for param, other in zip(params, others, strict=True):
            torch.testing.assert_close(param.cpu(), other.cpu())
        if k < 3 and not in_backward:
            opt.zero_grad()
    assert opt.state.get(params[2], {}).keys() == expected.state.get(others[2], {}).keys()
    assert all(value.device == params[2].device for value in opt.state.get(params[2], {}).values())
    assert [int(buffer.step) for buffer in opt.schedule_buffers.values()] == [4, 4]
    if handle is not None:
        handle.remove()


@pytest.mark.parametrize("row", cases.STATE_UPDATES[2:4], ids=str)
def test_gradients_are_released_on_every_device(devices, row):
    twins = Twins(devices, row)
    handle = twins.opt.step_in_backward()
    for k in range(4):
        twins.set_gradients()
        for param in twins.params:
            gradient, param.grad = param.grad, None
            (param * gradient).sum().backward()
            assert param.grad is None
        if k == 2:
            handle.remove()
        for opt in twins.opts:
            opt.step()
        twins.steps += 1
        twins.compare()
        if k == 2:
            break


@rows
def test_parameters_with_gaps_and_frozen_ones(devices, row):
    bases = [place(torch.randn(6, 4), device) for device in devices for _ in range(2)]
    views = [base.detach()[:, ::2].requires_grad_() for base in bases]
    for view, base in zip(views, bases, strict=True):
        view.is_elsewhere = base.is_elsewhere
    plain = [place(view, base.device) for view, base in zip(views, bases, strict=True)]
    frozen = [place(torch.ones(2), device).requires_grad_(False) for device in devices]
    for copy_, base in zip(plain, bases, strict=True):
        copy_.is_elsewhere = base.is_elsewhere
    opts = [make(row, [*params, *frozen], lr=REX) for params in (views, plain)]
    for k in range(3):
        for opt, params in zip(opts, (views, plain), strict=True):
            set_gradients(params, k)
            opt.step()
        assert all(map(torch.equal, views, plain))
    assert all((param == 1.0).all() for param in frozen)


def test_random_bits_are_those_of_the_position_in_the_optimizer():
    """On the CPU, where the same parameters can be on one device or on two."""
    results = []
    for split in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if split:
                patch.setattr(
                    param_devices,
                    "device_of",
                    lambda param: ELSEWHERE if param.is_elsewhere else CPU,
                )
            params = make_params([CPU, ELSEWHERE], [torch.bfloat16])
            opt = lrs_ext.AdamW(
                params, lr=REX, stochastic_rounding=True, state_dtype=torch.bfloat16
            )
            for k in range(3):
                set_gradients(params, k)
                opt.step()
            assert len(opt.schedule_buffers) == 1 + split
            results.append([*params, *states_of(opt)])
    assert all(map(torch.equal, *results))


def test_autolrs_drives_and_rolls_back_every_device(devices):
    torch.manual_seed(0)
    parts = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
    for part, device in zip(parts, devices, strict=True):
        part.to(torch.empty(0, device=device).device)
        for param in part.parameters():
            param.is_elsewhere = device == ELSEWHERE
    model = torch.nn.Sequential(*parts)
    opt = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    auto = lrs_ext.AutoLRS(opt, model, (1e-4, 1e-1), total_steps=120, num_trials=3, seed=0)
    x, homes = torch.randn(16, 4), [part.weight.device for part in parts]
    for _ in range(60):
        hidden = parts[0](x.to(homes[0])).tanh()
        loss = (parts[1](hidden.to(homes[1])) - 1.0).square().mean().to(homes[0])
        loss.backward()
        opt.step()
        opt.zero_grad()
        auto.step(loss.detach())
        first, second = opt.schedule_buffers.values()
        assert int(first.step) == int(second.step)
        assert torch.equal(first.values.cpu(), second.values.cpu())
    assert auto.phase == "train"
    assert auto.history.stages[-1].best_lr > 0.0
    assert int(first.step) < 60  # trials have been rolled back


def test_a_capture_of_several_devices_is_refused(devices, monkeypatch):
    twins = Twins(devices)
    twins.step()
    twins.set_gradients()
    twins.opt._preparation._is_on_gpu = True
    before = [param.detach().clone() for param in twins.params]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"2 devices cannot be captured.*one optimizer per"):
        twins.opt.step()
    assert all(map(torch.equal, before, twins.params))


def test_a_backend_must_serve_every_device(monkeypatch):
    monkeypatch.setattr(
        param_devices,
        "device_of",
        lambda param: GPU if param.is_elsewhere else CPU,
    )
    params = [place(torch.ones(2), device) for device in (CPU, ELSEWHERE)]
    with pytest.raises(RuntimeError, match="it updates CPU tensors, not cuda ones"):
        lrs_ext.SGD(params, lr=0.1, backend="cpu")
    opt = lrs_ext.SGD(params[:1], lr=0.1, backend="cpu")
    with pytest.raises(RuntimeError, match="cannot be used for parameters on cuda:0"):
        opt.add_param_group({"params": params[1:]})
    assert len(opt.param_groups) == 1


@gpu
@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
def test_a_backend_by_name_on_cpu_and_cuda(backend):
    params = [place(torch.ones(2), device) for device in (CPU, GPU)]
    if backend == "reference":
        assert lrs_ext.SGD(params, lr=0.1, backend=backend).backends == {
            CPU: "reference",
            GPU: "reference",
        }
        return
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot be used"):
        lrs_ext.SGD(params, lr=0.1, backend=backend)


@pytest.mark.parametrize("pair", ACCELERATORS)
def test_the_host_does_not_wait(pair, mark_elsewhere):
    """On accelerators; a step on a CPU waits for the numbers that it reads from one."""
    twins = Twins(pair)
    twins.step()
    with NoReadingOps(), NoReadingMethods():
        for _ in range(3):
            set_gradients(twins.params, twins.steps)
            twins.opt.found_inf = torch.zeros((), device=pair[0])
            lrs_ext.clip_grad_norm_(twins.opt, 0.5)
            twins.opt.step()
            twins.opt.param_groups[0]["lr"] = 0.25


@pytest.mark.parametrize("pair", ACCELERATORS)
def test_a_gradscaler_skips_and_unscales_everywhere(pair, mark_elsewhere):
    """Not on a CPU and a GPU: the scaler's copies to the CPU do not wait for the GPU."""
    params = [place(torch.ones(3), device) for device in pair]
    opt = lrs_ext.SGD(params, lr=REX)
    scaler = torch.amp.GradScaler(pair[0].type, init_scale=8.0)
    for factor, steps in [(1.0, 1), (float("inf"), 1), (1.0, 2)]:
        loss = sum((param * factor).sum().to(pair[0]) for param in params)
        scaler.scale(loss).backward()
        if steps == 2:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert [int(buffer.step) for buffer in opt.schedule_buffers.values()] == [steps] * 2
    for param in params:
        torch.testing.assert_close(param.cpu(), torch.full((3,), 1.0 - REX(0) - REX(1)))
