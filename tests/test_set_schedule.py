"""A schedule set in mid-run: from the present step on, in place, with room for a longer budget."""

import copy

import numpy as np
import pytest
import torch
from test_no_sync import no_sync

import lrs_ext

REX = lrs_ext.rex(0.3, 8, warmup_steps=2)
LINEAR = lrs_ext.linear(0.7, 8)
LONGER = lrs_ext.rex(0.3, 20, warmup_steps=2)


def float32(value):
    return float(np.float32(value))


def test_it_goes_on_at_the_present_step_in_every_group(probe):
    p = probe(REX, LINEAR, 0.1)
    for _ in range(3):
        p.used()
    cosine = lrs_ext.cosine(0.5, 7)
    p.opt.set_schedule(cosine)
    for k in range(3, 10):
        assert [group["lr"] for group in p.groups] == [cosine(k)] * 3
        assert p.used() == [float32(cosine(k))] * 3


def test_one_group_is_left_to_itself(probe):
    p = probe(REX, LINEAR)
    p.used()
    p.opt.set_schedule(lrs_ext.constant(0.25), group=1)
    assert p.groups[0]["lr"] == REX(1)
    assert p.used() == [float32(REX(1)), 0.25]


def test_groups_added_later_follow_what_was_set_in_all(probe):
    p = probe(REX)
    p.used()
    p.opt.set_schedule(LONGER)
    p.opt.set_schedule(LINEAR, group=0)
    p.opt.add_param_group({"params": [torch.zeros_like(p.params[0], requires_grad=True)]})
    assert [group["lr"] for group in p.opt.param_groups] == [LINEAR(1), LONGER(1)]


def test_a_schedule_that_fits_is_written_in_place_without_a_wait(probe, backend):
    p = probe(REX, LINEAR)
    p.used()
    addresses = [p.buffer.values.data_ptr(), p.buffer.step.data_ptr()]
    p.opt._preparation.was_captured = True
    with no_sync(backend):
        p.opt.set_schedule(lrs_ext.cosine(0.5, 8))
    assert p.opt.schedule_buffer is p.buffer
    assert [p.buffer.values.data_ptr(), p.buffer.step.data_ptr()] == addresses
    assert p.used() == [float32(lrs_ext.cosine(0.5, 8)(1))] * 2


def test_a_longer_schedule_gets_a_longer_buffer_at_the_same_step(probe):
    p = probe(REX, LINEAR)
    for _ in range(5):
        p.used()
    p.opt.set_schedule(LONGER, group=0)
    assert p.opt.schedule_buffer.values.shape == (2, 21)
    assert p.opt.schedule_buffer.step.item() == 5
    for k in range(5, 24):
        assert [group["lr"] for group in p.groups] == [LONGER(k), LINEAR(k)]
        assert p.used() == [float32(LONGER(k)), float32(LINEAR(k))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_float_and_a_tensor_give_way(probe, backend, dtype):
    tensor = torch.tensor(0.5, dtype=dtype, device=backend.device)
    p = probe(0.1, tensor)
    p.used()
    p.opt.set_schedule(LONGER)
    assert p.used() == [float32(LONGER(1))] * 2
    p.groups[1]["lr"] = 0.25  # and takes over again
    assert p.used() == [float32(LONGER(2)), 0.25]


def test_rows_that_a_graph_reads_do_not_grow(probe):
    p = probe(REX, LINEAR)
    p.used()
    before = p.buffer.values.clone()
    p.opt._preparation.was_captured = True
    message = r"needs rows of 21 values.*of 9: .*lrs_ext.constant\(lr, total_steps=20\)"
    with pytest.raises(RuntimeError, match=message):
        p.opt.set_schedule(LONGER)
    assert p.opt.schedule_buffer is p.buffer
    assert torch.equal(p.buffer.values, before)
    assert p.used() == [float32(REX(1)), float32(LINEAR(1))]


def test_what_cannot_be_set_changes_nothing(probe):
    p = probe(REX, LINEAR)
    with pytest.raises(TypeError, match=r"got 0\.1: write a number into group"):
        p.opt.set_schedule(0.1)
    for group in (2, -1, "head"):
        with pytest.raises(IndexError, match=f"group {group} is not one of 2 groups"):
            p.opt.set_schedule(LONGER, group=group)
        with pytest.raises(IndexError, match=f"group {group} is not one of 2 groups"):
            p.opt.lr_tensor(group)
    assert p.opt.schedule_buffer is p.buffer
    assert p.used() == [float32(REX(0)), float32(LINEAR(0))]


def test_a_run_resumes_with_a_longer_budget(probe):
    """The documented way: load the checkpoint, then set the longer schedule."""
    first = probe(REX)
    for _ in range(8):
        first.used()
    checkpoint = copy.deepcopy(first.opt.state_dict())
    resumed = probe(REX)
    resumed.opt.load_state_dict(checkpoint)
    resumed.opt.set_schedule(REX.with_total_steps(20))
    assert REX.with_total_steps(20) == LONGER
    assert [resumed.used()[0] for _ in range(14)] == [float32(LONGER(k)) for k in range(8, 22)]


def test_what_is_set_is_saved(probe):
    p = probe(REX)
    p.opt.set_schedule(LONGER)
    p.used()
    other = probe(0.1)
    other.opt.load_state_dict(p.opt.state_dict())
    assert other.used() == [float32(LONGER(1))]


@pytest.mark.gpu
def test_replays_of_a_captured_step_follow_what_is_set():
    param = torch.zeros((), device="cuda", requires_grad=True)
    param.grad = torch.full_like(param, -1.0)
    opt = lrs_ext.SGD([param], lr=LONGER)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    cosine = lrs_ext.cosine(0.5, 12)
    used = []
    for k in range(1, 6):
        if k == 3:
            opt.set_schedule(cosine)
        with torch.no_grad():
            param.zero_()
        graph.replay()
        used.append(param.item())
    expected = [LONGER(1), LONGER(2), cosine(3), cosine(4), cosine(5)]
    assert used == [float32(value) for value in expected]
    with pytest.raises(RuntimeError, match="a CUDA graph reads"):
        opt.set_schedule(lrs_ext.rex(0.1, 100))


def test_a_printed_optimizer_shows_what_is_in_charge():
    params = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    opt = lrs_ext.SGD(groups, lr=lrs_ext.rex(0.3, total_steps=100))
    theirs = torch.optim.SGD(groups, lr=0.3)
    shown = {line for line in repr(opt).splitlines() if "schedule" in line}
    rex = repr(lrs_ext.rex(0.3, total_steps=100))
    assert shown == {f"    schedule: {{'lr': {rex}}}", "    schedule: {}"}
    assert repr(opt).splitlines()[:2] == repr(theirs).splitlines()[:2]
    opt.set_schedule(lrs_ext.linear(0.2, total_steps=10), group=1)
    assert "schedule: {'lr': linear(lr=0.2" in repr(opt)


def test_an_optimizer_whose_groups_were_replaced_for_a_load_can_be_printed():
    params = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    opt = lrs_ext.SGD(params[:1], lr=lrs_ext.rex(0.3, total_steps=100))
    saved = lrs_ext.SGD([{"params": [p]} for p in params], lr=0.5).state_dict()
    opt.param_groups = [{**opt.param_groups[0], "params": [p]} for p in params]
    assert [line for line in repr(opt).splitlines() if "schedule" in line] == [
        "    schedule: {'lr': rex(lr=0.3, total_steps=100, d=0.5)}",
        "    schedule: {}",
    ]
    opt.load_state_dict(saved)
    assert repr(opt).count("    lr: 0.5\n    maximize") == 2
