"""What a step is called in a profile."""

import cases
import pytest
import torch
from test_optimizers import leaf
from torch.profiler import ProfilerActivity, profile

import lrs_ext


def names_of(profiler):
    return [event.name for event in profiler.events() if event.name.startswith("lrs_ext::")]


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_launches_have_names(backend, name):
    params = [leaf(torch.ones(3), backend), leaf(torch.ones(4), backend)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}]
    opt = getattr(lrs_ext, name)(groups, lr=lrs_ext.rex(0.1, 8), backend=backend.name)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        lrs_ext.clip_grad_norm_(opt, 1.0)
        opt.step()
    step = f"lrs_ext::{name.lower()}_step[{backend.name}]"
    assert names_of(profiler) == [f"lrs_ext::grad_norm[{backend.name}]", step]
    ranges = {event.name: event.time_range for event in profiler.events()}
    outer = ranges[f"Optimizer.step#{name}.step"]
    assert outer.start <= ranges[step].start <= ranges[step].end <= outer.end


def test_released_gradients_and_gaps_have_them_too():
    dense, gaps = torch.ones(3).requires_grad_(), torch.ones(3, 4)[:, ::2].requires_grad_()
    opt = lrs_ext.AdamW([dense, gaps], lr=0.1, backend="cpu")
    opt.step_in_backward()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        (dense.sum() + gaps.sum()).backward()
        opt.step()
    assert names_of(profiler) == ["lrs_ext::adamw_step[cpu]"] * 2


def test_a_class_of_ones_own_has_its_name():
    class Mine(lrs_ext.SGD):
        pass

    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    opt = Mine([param], lr=0.1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        opt.step()
    assert names_of(profiler) == [f"lrs_ext::mine_step[{opt.backend}]"]
