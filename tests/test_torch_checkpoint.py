"""Checkpoints that go to the optimizers of torch and come from there."""

import copy

import cases
import pytest
import torch
from test_checkpoint import REX, copies, make, make_params, params_of, rows, through_file, update


def assert_close_runs(opt, torch_opt, start, stop):
    for k in range(start, stop):
        update(params_of(opt), opt, k)
        update(params_of(torch_opt), torch_opt, k)
        for param, other in zip(params_of(opt), params_of(torch_opt), strict=True):
            close = {"rtol": cases.TORCH.rtol, "atol": cases.TORCH.atol}
            torch.testing.assert_close(param, other, **close)


@rows
def test_our_checkpoint_goes_on_in_torch(backend, row):
    opt = make(row, make_params(backend), backend, lr=0.05)
    for k in range(4):
        update(params_of(opt), opt, k)
    torch_opt = make(row, copies(params_of(opt)))
    torch_opt.load_state_dict(through_file(opt.state_dict()))
    assert torch_opt.param_groups[0]["lr"] == 0.05
    assert_close_runs(opt, torch_opt, 4, 8)


@rows
@pytest.mark.parametrize("loaded_after", [0, 2])
def test_a_checkpoint_of_torch_goes_on_here(backend, row, loaded_after):
    torch_opt = make(row, make_params(backend), lr=0.05)
    for k in range(4):
        update(params_of(torch_opt), torch_opt, k)
    opt = make(row, copies(params_of(torch_opt)), backend, lr=0.7, weight_decay=0.9)
    for k in range(loaded_after):
        update(params_of(opt), opt, k)
    for param, other in zip(params_of(opt), params_of(torch_opt), strict=True):
        param.data.copy_(other.data)
    opt.load_state_dict(through_file(torch_opt.state_dict()))
    assert opt.param_groups[0]["lr"] == 0.05
    for param in params_of(opt):
        for tensor in opt.state.get(param, {}).values():
            assert (tensor.dtype, tensor.device) == (torch.float32, param.device)
    assert_close_runs(opt, torch_opt, 4, 8)


@pytest.mark.parametrize("row", ["Adam", "AdamW"])
def test_after_a_checkpoint_of_torch_the_schedule_goes_on_from_its_step(backend, row):
    torch_opt = make(row, make_params(backend), lr=0.05)
    for k in range(4):
        update(params_of(torch_opt), torch_opt, k)
    opt = make(row, copies(params_of(torch_opt)), backend, lr=REX)
    opt.load_state_dict(through_file(torch_opt.state_dict()))
    for k in range(4, 11):
        assert opt.schedule_buffer.step.item() == k
        assert opt.param_groups[0]["lr"] == REX(k)
        assert opt.current_lr() == [float(torch.tensor(REX(k)))]
        torch_opt.param_groups[0]["lr"] = REX(k)
        assert_close_runs(opt, torch_opt, k, k + 1)


@pytest.mark.parametrize("row", ["SGD", "SGD momentum"])
def test_after_a_checkpoint_of_torchs_sgd_the_step_can_be_set(backend, row):
    torch_opt = make(row, make_params(backend), lr=0.05)
    for k in range(4):
        update(params_of(torch_opt), torch_opt, k)
    opt = make(row, copies(params_of(torch_opt)), backend, lr=REX, weight_decay=REX)
    opt.load_state_dict(through_file(torch_opt.state_dict()))
    assert opt.current_lr() == [pytest.approx(REX(0))]
    opt.schedule_buffer.set_step_(4)
    assert opt.current_lr() == [pytest.approx(REX(4))]
    for k in range(4, 11):
        assert [opt.param_groups[0][key] for key in ("lr", "weight_decay")] == [REX(k)] * 2
        torch_opt.param_groups[0].update(lr=REX(k), weight_decay=REX(k))
        assert_close_runs(opt, torch_opt, k, k + 1)


@pytest.mark.parametrize("has_new_group", [False, True])
def test_a_checkpoint_of_torchs_sgd_leaves_the_step_where_the_device_is(backend, has_new_group):
    """The host does not know of updates that were skipped, or replayed from a CUDA graph."""
    params = make_params(backend)
    torch_opt = make("SGD", copies(params), lr=0.05)
    opt = make("SGD", params, backend, lr=REX)
    opt.schedule_buffer.set_step_(4)
    if has_new_group:
        new = [torch.zeros(2, device=backend.device, requires_grad=True)]
        opt.param_groups.append({"params": new, "lr": 0.5})
        torch_opt.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    opt.load_state_dict(torch_opt.state_dict())
    assert opt.schedule_buffer.step.item() == 4
    assert opt.param_groups[0]["lr"] == REX(4)


@pytest.mark.parametrize("row", ["Adam", "AdamW"])
@pytest.mark.parametrize("kind", [float, int, torch.tensor])
def test_old_checkpoints_with_steps_of_any_kind_and_fewer_options_load(backend, row, kind):
    torch_opt = make(row, make_params(backend), lr=0.05)
    for k in range(4):
        update(params_of(torch_opt), torch_opt, k)
    checkpoint = copy.deepcopy(torch_opt.state_dict())
    for state in checkpoint["state"].values():
        state["step"] = kind(int(state["step"]))
    for group in checkpoint["param_groups"]:
        for option in ("maximize", "foreach", "capturable", "differentiable", "fused"):
            del group[option]
    opt = make(row, copies(params_of(torch_opt)), backend, lr=0.05)
    opt.load_state_dict(checkpoint)
    for param in params_of(opt):
        step = opt.state[param]["step"]
        assert (step.dtype, step.device, step.shape) == (torch.float32, param.device, ())
    assert_close_runs(opt, torch_opt, 4, 6)


def test_a_checkpoint_without_step_counts_goes_on_here(backend):
    """Most implementations of Lion keep none."""
    plain = make("Lion", make_params(backend), lr=0.05)
    for k in range(4):
        update(params_of(plain), plain, k)
    checkpoint = copy.deepcopy(plain.state_dict())
    for state in checkpoint["state"].values():
        del state["step"]
    opt = make("Lion", copies(params_of(plain)), backend, lr=0.05)
    opt.load_state_dict(checkpoint)
    assert_close_runs(opt, plain, 4, 8)
