"""A scheduler of torch beside AutoLRS is an error; what a user writes by hand is not."""

import pytest
import torch
from autolrs_runs import BOUNDS, OPTIMIZERS, PEAK, Training, list_of_batches, make_model
from torch.optim import lr_scheduler

import lrs_ext
from lrs_ext.autolrs import scheduler_watch
from lrs_ext.integrations import OwnSchedule

SCHEDULERS = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 1, gamma=0.9),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1.0 / (epoch + 2)),
    "chained": lambda opt: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(opt, 0.9)]),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
}
both_kinds = pytest.mark.parametrize("kind", ["adamw", "torch adam"])


class Scheduled(Training):
    """A run whose optimizer has a scheduler already when the controller is made."""

    def __init__(self, kind, name):
        self.model = make_model()
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.scheduler = SCHEDULERS[name](self.optimizer)
        self.auto = lrs_ext.AutoLRS(self.optimizer, self.model, BOUNDS, **PEAK)
        self.losses, self.batches = [], []
        self.stream = self.auto.batches(list_of_batches())


@both_kinds
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_refused_when_it_has_written(name, is_first, kind):
    run = Scheduled(kind, name) if is_first else Training(kind)
    scheduler = run.scheduler if is_first else SCHEDULERS[name](run.optimizer)
    with pytest.raises(RuntimeError, match=r"has written .* of group 0, .*leave out the scheduler"):  # noqa: PT012
        for _ in range(4):
            run.update()
            scheduler.step(*([1.0] if name == "plateau" else []))
    with pytest.raises(RuntimeError, match="leave out the scheduler"):
        run.update()


@both_kinds
def test_a_scheduler_that_rests_is_not_to_blame_for_what_is_written_by_hand(kind):
    run = Scheduled(kind, "step")
    run.run(3)
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.run(3)
    assert run.scheduler.get_last_lr() == [1e-3]


@both_kinds
def test_what_is_written_by_hand_is_looked_into_once(kind, monkeypatch):
    seen, writer = [], scheduler_watch._writer
    monkeypatch.setattr(
        scheduler_watch, "_writer", lambda *args: seen.append(args) or writer(*args)
    )
    run = Training(kind)
    for update in range(6):
        run.optimizer.param_groups[0]["lr"] = 0.1 / (update + 1)
        run.update()
    assert len(seen) == 1


def test_own_schedule_writes_nothing():
    run = Training("adamw")
    scheduler = OwnSchedule(run.optimizer)
    run.optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(3):
        scheduler.step()
        run.update()


def test_a_scheduler_of_another_optimizer_is_none_of_ours():
    run = Training("adamw")
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = SCHEDULERS["step"](other)
    run.optimizer.param_groups[0]["lr"] = 0.5
    run.run(2)
    assert scheduler.get_last_lr() == [0.5]
