"""OwnSchedule: a scheduler of torch that leaves the optimizer its schedule; wrapped optimizers."""

import io

import pytest
import torch
from test_no_sync import NoReadingMethods, NoReadingOps
from torch.optim import lr_scheduler

import lrs_ext
from lrs_ext.integrations import OwnSchedule
from lrs_ext.wrappers import unwrapped

REX = lrs_ext.rex(0.1, total_steps=10)


class Wrapper(torch.optim.Optimizer):
    """A framework's optimizer around another, with the attribute that they all have."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


def make(lr=REX, groups=1, name="SGD"):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(groups)]
    for param in params:
        param.grad = torch.ones(3)
    return getattr(lrs_ext, name)([{"params": [param]} for param in params], lr=lr)


def test_it_shows_what_the_update_has_used_and_changes_nothing():
    opt, plain = make(groups=2), make(groups=2)
    scheduler = OwnSchedule(opt)
    assert isinstance(scheduler, lr_scheduler.LRScheduler)
    for k in range(12):
        opt.step()
        plain.step()
        assert scheduler.get_last_lr() == [REX(k)] * 2
        scheduler.step()
        assert scheduler.get_last_lr() == scheduler.get_lr() == [REX(k + 1)] * 2
        assert {type(lr) for lr in scheduler.get_last_lr()} == {float}
        assert opt.current_lr() == plain.current_lr()
    assert torch.equal(opt.param_groups[0]["params"][0], plain.param_groups[0]["params"][0])
    assert "initial_lr" not in opt.param_groups[0]
    assert "step" not in vars(opt)  # nobody has wrapped it


def test_a_scheduler_of_torch_would_take_over():
    opt = make()
    lr_scheduler.LambdaLR(opt, lambda _: 0.5)
    assert opt.current_lr() == [pytest.approx(0.05)]


def test_looking_does_not_wait():
    opt = make(name="AdamW")
    scheduler = OwnSchedule(opt)
    opt.step()
    with NoReadingOps(), NoReadingMethods():
        for _ in range(3):
            opt.step()
            assert [type(lr) for lr in scheduler.get_last_lr()] == [float]
            scheduler.step()


def test_a_tensor_is_shown_as_it_was():
    lr = torch.tensor(0.1)
    opt = make(lr)
    scheduler = OwnSchedule(opt)
    lr.fill_(0.2)
    assert scheduler.get_last_lr()[0].item() == pytest.approx(0.1)
    scheduler.step()
    assert scheduler.get_last_lr()[0].item() == pytest.approx(0.2)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_it_resumes_in_any_order(order):
    opt = make(name="AdamW")
    scheduler = OwnSchedule(opt)
    for _ in range(4):
        opt.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save([opt.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other = make(name="AdamW")
    parts = [other, OwnSchedule(other)]
    for index in order:
        parts[index].load_state_dict(states[index])
    assert parts[1].get_last_lr() == [REX(4)]
    assert parts[1].last_epoch == 4
    for part in parts:
        part.step()
    assert parts[1].get_last_lr() == [REX(5)]


def test_other_optimizers_are_refused():
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(TypeError, match=r"got SGD: .* lrs_ext.ScheduleLR"):
        OwnSchedule(other)


# Wrapped optimizers.


def test_the_optimizer_inside_of_wrappers_is_found():
    opt = make()
    assert unwrapped(opt) is opt
    assert unwrapped(Wrapper(Wrapper(opt))) is opt


def test_what_drives_an_optimizer_takes_its_wrapper():
    opt = make(0.5)
    wrapped = Wrapper(opt)
    plateau = lrs_ext.ReduceOnPlateau(wrapped, factor=0.5, patience=0)
    for _ in range(2):
        plateau.step(torch.tensor(1.0))
    assert opt.current_lr() == [0.25]
    assert lrs_ext.clip_grad_norm_(wrapped, 0.75).item() == pytest.approx(3**0.5)
    opt.step()
    assert opt.param_groups[0]["params"][0][0].item() < 1.0 - 0.24 * 0.75 / 3**0.5
    assert OwnSchedule(wrapped).get_last_lr() == [0.25]


def test_a_search_drives_the_optimizer_inside():
    model = torch.nn.Linear(2, 1)
    opt = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    auto = lrs_ext.AutoLRS(Wrapper(opt), model, (1e-4, 1e-1), total_steps=100)
    assert auto.optimizer is opt
    opt.zero_grad()
    model(torch.ones(2)).sum().backward()
    opt.step()
    auto.step(torch.tensor(1.0))
    assert opt.current_lr() == [pytest.approx(auto.metrics()["autolrs/lr"])]
