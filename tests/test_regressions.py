"""Faults found once: memory that goes away, checkpoints that travel, groups that change."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

import lrs_ext
from lrs_ext.table_set import TableSet


def make(name="AdamW", lr=0.1, numel=5, **options):
    param = torch.nn.Parameter(torch.ones(numel))
    return param, getattr(lrs_ext, name)([param], lr=lr, **options)


def update(param, opt, steps=1):
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        opt.step()


REX = lrs_ext.rex(0.1, total_steps=100)


def test_a_checkpoint_survives_a_stay_in_torch():
    param, opt = make("Adam", REX)
    update(param, opt, 10)
    theirs = torch.optim.Adam([param], lr=0.5)
    theirs.load_state_dict(opt.state_dict())
    update(param, theirs, 40)
    _, ours = make("Adam", REX)
    ours.load_state_dict(theirs.state_dict())
    assert ours.schedule_buffer.step.item() == 50
    assert ours.param_groups[0]["lr"] == REX(50)
    theirs.param_groups[0]["lr"] = 0.007
    _, ours = make("Adam", 0.5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.current_lr() == [pytest.approx(0.007)]


def test_a_refused_schedule_in_a_checkpoint_changes_nothing():
    param, opt = make("Adam", REX)
    update(param, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    update(param, opt)
    state = {name: value.clone() for name, value in opt.state[param].items()}
    saved["param_groups"][0]["schedule"] = saved["param_groups"][0]["schedule"].replace(
        "rex", "sine"
    )
    with pytest.raises(ValueError, match="sine"):
        opt.load_state_dict(saved)
    assert all(torch.equal(opt.state[param][name], value) for name, value in state.items())
    assert opt.schedule_buffer.step.item() == 4


# One thread drops the gradient once the other one's kernel has begun to write. Two threads that
# reach for `grad` at the same time crash in torch itself.
DROP_DURING_STEP = """
import threading, torch, lrs_ext
param = torch.nn.Parameter(torch.ones(1 << 24))
opt = lrs_ext.SGD([param], lr=0.125)
written = param.detach().numpy()
def drop():
    before = written[0]
    started.set()
    while written[0] == before:
        pass
    param.grad = None
for _ in range(10):
    param.grad = torch.ones_like(param)
    started = threading.Event()
    thread = threading.Thread(target=drop)
    thread.start()
    started.wait()
    opt.step()
    thread.join()
    assert param.grad is None
assert param.eq(-0.25).all()
"""


def test_a_gradient_may_be_dropped_while_the_kernel_reads_it():
    run = [sys.executable, "-c", DROP_DURING_STEP]
    subprocess.run(run, check=True, timeout=120)


# The next thread's gradient takes the place of one that a kernel may still read. None instead of it
# would crash in torch itself, as above.
STEPS_IN_THREADS = """
import threading, torch, lrs_ext
param = torch.nn.Parameter(torch.zeros(10_000_000))
opt = lrs_ext.SGD([param], lr=0.5)
def train():
    for _ in range(10):
        param.grad = torch.full_like(param, -1.0)
        opt.step()
threads = [threading.Thread(target=train) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
updates = int(opt.schedule_buffer.step)
assert updates <= 30
assert param.eq(0.5 * updates).all()
"""


def test_threads_that_share_an_optimizer_wait_for_each_other():
    run = [sys.executable, "-c", STEPS_IN_THREADS]
    subprocess.run(run, check=True, timeout=120)


# torch's own operators would hang in the child, so it does nothing but steps.
STEP_AFTER_FORK = """
import os, signal, torch, lrs_ext
torch.set_num_threads(2)
param = torch.nn.Parameter(torch.zeros(100_000))
opt = lrs_ext.SGD([param], lr=0.5)
param.grad = torch.full_like(param, -1.0)
values = param.detach().numpy()
opt.step()
schedule = lrs_ext.linear(1.0, 1_000_000)
halves = schedule.values(0, 1_000_000) == 0.5
child = os.fork()
if child == 0:
    signal.alarm(60)
    opt.step()
    is_same = ((schedule.values(0, 1_000_000) == 0.5) == halves).all()
    os._exit(0 if is_same and (values == 1.0).all() else 1)
assert os.waitpid(child, 0)[1] == 0
opt.step()
assert (values == 1.0).all()
"""


def test_a_step_with_threads_leaves_steps_to_forked_processes():
    run = [sys.executable, "-c", STEP_AFTER_FORK]
    subprocess.run(run, check=True, timeout=120)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("is_done", [True, False])
def test_an_interrupted_step_leaves_the_host_where_the_device_is(monkeypatch, name, is_done):
    param, opt = make(name, REX)
    update(param, opt, 2)
    run = TableSet.run

    def interrupted(tables, *arguments):  # an interrupt that comes in a kernel waits for its end
        if is_done:
            run(tables, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TableSet, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    updates = 2 + is_done
    assert opt.schedule_buffer.step.item() == opt.committed_steps == updates
    assert opt.param_groups[0]["lr"] == REX(updates)
    update(param, opt)
    assert opt.committed_steps == updates + 1
    assert opt.param_groups[0]["lr"] == REX(updates + 1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tensors_without_memory_are_refused(backend):
    param, opt = make(backend=backend)
    update(param, opt)
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    param.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"gradient .* has no memory"):
        opt.step()
    assert torch.equal(param, before)
    param.grad = torch.ones_like(param)
    param.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"parameter .* has no memory"):
        opt.step()


@pytest.mark.parametrize("step", [3, torch.tensor(3), torch.tensor([3.0], dtype=torch.float64)])
def test_a_step_count_set_by_hand_is_converted(step):
    runs = [make("Adam"), make("Adam")]
    for param, opt in runs:
        update(param, opt)
    for (param, opt), value in zip(runs, (step, torch.tensor(3.0)), strict=True):
        opt.state[param]["step"] = value
        update(param, opt)
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1].state[runs[0][0]]["step"].item() == 4.0


def test_zero_gradients_count_where_the_schedule_itself_is_zero():
    param, opt = make("SGD", lrs_ext.linear(0.1, total_steps=2))
    update(param, opt, 2)
    param.grad = torch.zeros_like(param)
    opt.step()
    assert opt.schedule_buffer.step.item() == 3


def test_empty_groups_are_accepted():
    param = torch.nn.Parameter(torch.ones(2))
    opt = lrs_ext.SGD([{"params": []}, {"params": [param]}], lr=0.5)
    update(param, opt)
    assert param.tolist() == [0.5, 0.5]
    lrs_ext.SGD([{"params": []}], lr=0.5).step()


def test_a_schedule_too_long_for_the_buffer_leaves_the_old_one():
    param, opt = make("SGD", lrs_ext.linear(0.1, total_steps=2))
    opt.param_groups[0]["lr"] = REX
    with pytest.raises(ValueError, match="total_steps=100"):
        opt.step()
    update(param, opt)
    assert opt.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("lr", [float("nan"), -1.0, float("inf")])
def test_invalid_numbers_written_later_are_refused(lr):
    param, opt = make("SGD", REX)
    for value in (lr, torch.tensor(lr)):
        opt.param_groups[0]["lr"] = value
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match="Invalid learning rate"):
            opt.step()
    with pytest.raises(ValueError, match="Invalid learning rate"):
        opt.schedule_buffer.write_(0, lr, 1)
    opt.param_groups[0]["lr"] = 0.1
    opt.param_groups[0]["weight_decay"] = lr if lr != -1.0 else "much"
    with pytest.raises((ValueError, TypeError), match="weight_decay must be"):
        opt.step()
    assert torch.equal(param, torch.ones_like(param))


def test_written_values_survive_copies_and_new_groups():
    param, opt = make("SGD", REX)
    opt.schedule_buffer.write_(0, 0.5, 2)
    twin = copy.deepcopy(opt)
    assert twin.current_lr() == [0.5]
    new = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [new], "lr": lrs_ext.linear(0.3, total_steps=200)})
    assert opt.current_lr() == pytest.approx([0.5, 0.3])
    update(param, opt, 2)
    assert opt.current_lr() == pytest.approx([REX(2), 0.297])


@pytest.mark.parametrize("lr", [REX, 0.1], ids=["schedule", "float"])
def test_a_float_written_before_a_new_group_counts(lr):
    param, opt = make("SGD", lr)
    opt.param_groups[0]["lr"] = 0.25
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert opt.current_lr()[0] == 0.25
    update(param, opt)
    assert param[0].item() == 0.75


def test_a_checkpoint_does_not_keep_the_schedule_from_taking_over_again():
    param, opt = make("SGD", REX)
    update(param, opt, 2)
    found = opt.param_groups[0]["lr"]
    opt.state_dict()
    opt.param_groups[0]["lr"] = 0.5
    update(param, opt)
    opt.param_groups[0]["lr"] = found
    assert opt.current_lr() == [pytest.approx(REX(3))]


def test_a_checkpoint_follows_the_device():
    param, opt = make("SGD", REX)
    opt.schedule_buffer.step.fill_(7)  # as replays of a graph would leave it
    opt.state_dict()
    assert opt.param_groups[0]["lr"] == REX(7)
    update(param, opt)
    assert opt.param_groups[0]["lr"] == REX(8)


def test_a_learning_rate_tensor_may_get_another_memory():
    lr = torch.tensor(1.0)
    param, opt = make("SGD", lr)
    update(param, opt)
    lr.data = torch.tensor(100.0)
    update(param, opt)
    assert param[0].item() == -100.0


def test_a_negative_view_is_no_plain_gradient():
    param, opt = make("SGD", 1.0)
    param.grad = torch._neg_view(torch.ones(5))
    opt.step()
    assert param.tolist() == [2.0] * 5


def test_a_checkpoint_with_a_longer_schedule_is_followed_by_an_optimizer_in_use():
    """Its rows need another buffer, whose step the next update must read and advance."""
    (param, opt), (other, resumed) = make("SGD", REX, momentum=0.5), make("SGD", 0.5, momentum=0.5)
    update(param, opt, 3)
    update(other, resumed)
    other.data.copy_(param)
    resumed.load_state_dict(opt.state_dict())
    for _ in range(3):
        update(param, opt)
        update(other, resumed)
        assert torch.equal(param, other)
        assert torch.equal(opt.schedule_buffer.step, resumed.schedule_buffer.step)


def test_a_learning_rate_put_aside_and_back_before_a_checkpoint_is_in_charge():
    param, opt = make("AdamW", REX)
    update(param, opt, 3)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["schedule"]  # as torchtitan rebuilds groups, from keys that it knows
    _, other = make("AdamW", REX)
    found, other.param_groups[0]["lr"] = other.param_groups[0]["lr"], 0.0
    other.sync_groups()
    other.param_groups[0]["lr"] = found
    other.load_state_dict(saved)
    assert other.current_lr() == [pytest.approx(REX(3))]
    assert other.param_groups[0]["lr"] == REX(3)


SHORTER = {
    "float": lambda opt: opt.param_groups[0].update(lr=0.01),
    "schedule": lambda opt: opt.set_schedule(lrs_ext.constant(0.01)),
    "scheduler": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 0.1),
}


@pytest.mark.parametrize("change", SHORTER)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_an_optimizer_is_copied_whose_rows_are_longer_than_it_needs(change, copied):
    param, opt = make(lr=REX)
    SHORTER[change](opt)
    update(param, opt, 3)
    twin = copied(opt)
    assert twin.current_lr() == opt.current_lr() == [pytest.approx(0.01)]
    [twin_param] = twin.param_groups[0]["params"]
    update(param, opt, 2)
    update(twin_param, twin, 2)
    assert torch.equal(param, twin_param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_default_dtype_changes_nothing(dtype):
    param, opt = make(numel=300, state_dtype=torch.uint8)
    twin, other = make(numel=300, state_dtype=torch.uint8)
    update(twin, other, 2)
    torch.set_default_dtype(dtype)
    try:
        update(param, opt, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(param, twin)


def test_momentum_from_torch_survives_a_second_checkpoint_without_a_step_between():
    def make_pair(kind):
        params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
        return params, kind(params, lr=0.1, momentum=0.9, dampening=0.5)

    params, theirs = make_pair(torch.optim.SGD)
    for param in params:
        param.grad = torch.ones(1)
    theirs.step()
    saved = theirs.state_dict()
    for _ in range(2):
        loaded, ours = make_pair(lrs_ext.SGD)
        ours.load_state_dict(saved)
        saved = ours.state_dict()
    loaded[0].grad = torch.ones(1)
    ours.step()
    buffers = [state["momentum_buffer"].item() for state in ours.state_dict()["state"].values()]
    assert buffers == [pytest.approx(0.9 + 0.5), 1.0]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("is_released", [False, True])
def test_parameters_that_have_been_replaced_go_away(name, is_released):
    param, opt = make(name)
    gone = []
    for _ in range(4):
        handle = opt.step_in_backward() if is_released else None
        param.sum().backward()
        opt.step()
        if handle is not None:
            handle.remove()
        new = torch.nn.Parameter(torch.ones(len(param) + 1))
        opt.state.pop(param, None)
        opt.param_groups[0]["params"][0] = new
        gone.append(weakref.ref(param))
        param = new
        del new
    param.sum().backward()
    handle = opt.step_in_backward() if is_released else None
    opt.step()
    del handle
    gc.collect()
    assert not any(ref() is not None for ref in gone)


@pytest.mark.parametrize(
    ("bad", "message"), [({"lr_scale": 0.0}, "lr_scale"), ({"eps": float("inf")}, "eps")]
)
def test_a_refused_group_is_not_there(bad, message):
    param, opt = make(lr=REX)
    other = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [other], **bad})
    assert len(opt.param_groups) == 1
    update(param, opt)
    opt.add_param_group({"params": [other], "lr_scale": np.float32(0.5)})
    assert opt.current_lr() == [pytest.approx(REX(1)), pytest.approx(REX(1) / 2)]


def test_set_schedule_is_the_last_word():
    _, opt = make(lr=lrs_ext.constant(0.1, total_steps=50))
    opt.param_groups[0]["lr"] = lrs_ext.linear(0.2, 40)
    opt.set_schedule(lrs_ext.constant(0.03))
    assert opt.current_lr() == [pytest.approx(0.03)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_parameter_with_a_master_may_become_float32(backend):
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    opt = lrs_ext.SGD(module.parameters(), lr=0.5, master_weights=True, backend=backend)
    for step in range(3):
        before = [param.detach().float().clone() for param in module.parameters()]
        for param in module.parameters():
            param.grad = torch.ones_like(param)
        opt.step()
        if step == 0:
            module.float()
            for param in module.parameters():
                param.grad = None
    for param, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(param, old - 0.5)


@pytest.mark.parametrize("name", ["Adam", "LAMB"])
def test_a_count_of_more_than_32_bits_is_a_large_one(backend, name):
    def step_at(count):
        param = torch.nn.Parameter(torch.ones(5, device=backend.device))
        opt = getattr(lrs_ext, name)([param], lr=0.1, backend=backend.name)
        update(param, opt)
        opt.state[param]["step"] = torch.tensor(count)
        update(param, opt)
        return param.detach()

    assert torch.equal(step_at(2.0**33), step_at(2.0**24))
