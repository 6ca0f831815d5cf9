"""The host never waits: no operation inside a step reads a value from the device."""

import contextlib
import dataclasses

import cases
import pytest
import torch
from moving import put, with_schedules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lrs_ext

READING_OPS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select"}
READING_METHODS = {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__"}


class NoReadingOps(TorchDispatchMode):
    """Fails on operators whose result the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in READING_OPS:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class NoReadingMethods(TorchFunctionMode):
    """Fails on methods that read a CPU tensor without an operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READING_METHODS:
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_sync(backend):
    """Triton's interpreter reads tensors as NumPy arrays, so there only operators are watched."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(NoReadingOps())
        if not backend.interpreted:
            stack.enter_context(NoReadingMethods())
        if backend.device == "cuda":
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
            torch.cuda.set_sync_debug_mode("error")
        yield


READS = {
    "item": lambda t: t.item(),
    "float": float,
    "bool": bool,
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "nonzero": torch.nonzero,
    "equal": lambda t: torch.equal(t, t + 1),
    "mask": lambda t: t[t > 0],
}


@pytest.mark.parametrize("read", READS)
def test_the_guard_notices_every_way_to_read(read):
    tensor = torch.ones(())
    with no_sync(cases.Backend("cpu", "cpu")):
        assert (tensor + 1).shape == ()
        with pytest.raises(AssertionError, match="waits for the device"):
            READS[read](tensor)


def make(row, backend, lr):
    params = [torch.randn(n, device=backend.device).requires_grad_() for n in (5, 300, 7)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": lrs_ext.linear(0.1, 9)}]
    opt = getattr(lrs_ext, row.name)(groups, lr=lr, backend=backend.name, **row.options)
    return params, opt


def set_gradients(params, k):
    for i, param in enumerate(params):
        param.grad = None if k == i else torch.randn_like(param)


LEARNING_RATES = {
    "schedule": lambda device: lrs_ext.rex(0.1, 4, warmup_steps=1),
    "float": lambda device: 0.1,
    "tensor": lambda device: torch.tensor(0.1, device=device),
}


@pytest.mark.parametrize("lr", LEARNING_RATES)
@pytest.mark.parametrize("row", cases.UPDATES, ids=str)
def test_steps_never_wait(backend, row, lr):
    params, opt = make(row, backend, LEARNING_RATES[lr](backend.device))
    for k in range(6):
        set_gradients(params, k)
        with no_sync(backend):
            opt.step()
            opt.zero_grad()
    assert opt.schedule_buffer.step.item() == 6


@pytest.mark.parametrize("row", cases.MOVING, ids=str)
def test_steps_with_numbers_that_move_never_wait(backend, row):
    update = dataclasses.replace(row.update, options=with_schedules(row))
    params, opt = make(update, backend, lrs_ext.rex(0.1, 4, warmup_steps=1))
    group, found = opt.param_groups[0], {}
    for k in range(9):
        set_gradients(params, k)
        with no_sync(backend):
            if k == 3:
                found = {
                    name: group["betas"][0] if name == "beta1" else group[name]
                    for name in row.numbers
                }
                for name in row.numbers:
                    put(group, name, 0.125)
            if k == 5:
                for name in row.numbers:
                    put(group, name, found[name])
            if k == 6:
                group["weight_decay"] = lrs_ext.linear(0.5, 20)
            if k == 7:
                opt.sync_groups()
            opt.step()
            opt.zero_grad()
    assert opt.schedule_buffer.step.item() == 9


@pytest.mark.parametrize("row", cases.STATE_UPDATES, ids=str)
def test_changing_the_learning_rate_never_waits(backend, row):
    params, opt = make(row, backend, lrs_ext.rex(0.1, 4))
    group, buffer = opt.param_groups[0], opt.schedule_buffer
    value, tensor = (torch.tensor(x, device=backend.device) for x in (0.25, 0.125))
    found = group["lr"]
    changes = [
        lambda: group.update(lr=0.5),
        lambda: group.update(lr=found),
        lambda: buffer.write_(0, value, 2),
        lambda: buffer.write_(0, 0.5, 1),
        lambda: buffer.fill_(0, lrs_ext.linear(0.2, 3)),
        lambda: group.update(lr=tensor),
        lambda: tensor.fill_(0.3),
        lambda: group.update(weight_decay=0.2),
        lambda: [opt.lr_tensor(0), opt.lr_tensor(1)],
    ]
    for change in changes:
        set_gradients(params, -1)
        with no_sync(backend):
            change()
            opt.step()
    assert buffer.step.item() == len(changes)


@pytest.mark.parametrize("row", cases.STATE_UPDATES, ids=str)
def test_a_training_loop_never_waits(backend, row):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model.to(backend.device)
    lr = lrs_ext.rex(0.1, 5)
    opt = getattr(lrs_ext, row.name)(model.parameters(), lr=lr, backend=backend.name, **row.options)
    inputs = torch.randn(16, 4, device=backend.device)

    def closure():
        opt.zero_grad()
        loss = (model(inputs) ** 2).mean()
        loss.backward()
        return loss

    with no_sync(backend):
        losses = [opt.step(closure) for _ in range(5)]
    assert losses[-1] < losses[0]
