"""What the host does grows no faster than what there is to do."""

import sys
from pathlib import Path

import pytest
import torch

import lrs_ext
from lrs_ext.state_storage import Storage

PACKAGE = str(Path(lrs_ext.__file__).parent)


def calls_of(action):
    """Returns how many functions of the package `action` calls."""
    count = 0

    def watch(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def make(num_groups):
    params = [torch.zeros(2, requires_grad=True) for _ in range(num_groups)]
    return lrs_ext.AdamW([{"params": [p]} for p in params], lr=lrs_ext.rex(0.1, total_steps=9))


def started(num_groups):
    optimizer = make(num_groups)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(2)
    optimizer.step()
    return optimizer


def move_learning_rates(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()


ACTIONS = {
    "constructor": lambda optimizer: make(len(optimizer.param_groups)),
    "current_lr": lambda optimizer: optimizer.current_lr(),
    "set_schedule": lambda optimizer: optimizer.set_schedule(lrs_ext.linear(0.2, total_steps=9)),
    "step": move_learning_rates,
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_twice_the_groups_take_twice_the_calls(name):
    action = ACTIONS[name]
    few, many = started(30), started(60)
    assert calls_of(lambda: action(many)) < 2.1 * calls_of(lambda: action(few))


def test_a_gradient_in_another_layout_takes_no_look_at_the_states(monkeypatch):
    params = [torch.zeros(3, 2, requires_grad=True) for _ in range(2)]
    optimizer = lrs_ext.SGD(params, lr=1.0, momentum=0.5)
    for count in range(1, 4):
        params[0].grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).t()
        params[1].grad = torch.ones(3, 2)
        optimizer.step()
        momentum = optimizer.state[params[0]]["momentum_buffer"]
        assert torch.equal(momentum, params[0].grad * (2.0 - 0.5 ** (count - 1)))
        monkeypatch.setattr(Storage, "complete", None)
