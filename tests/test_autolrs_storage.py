"""Roll-back of compressed states and split weights, and a GradScaler that works on the device."""

import math

import cases
import pytest
import torch
from autolrs_runs import PEAK, PRESETS, list_of_batches, make_model
from test_no_sync import NoReadingMethods, NoReadingOps
from test_snapshot import all_equal, everything
from torch import nn

import lrs_ext
from lrs_ext.autolrs.copy_memory import PLACEMENTS
from lrs_ext.autolrs.snapshot import Snapshot

storages = pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
OPTIMIZERS = {
    "sgd": lambda params, **own: lrs_ext.SGD(params, lr=1e-3, momentum=0.9, dampening=0.1, **own),
    "adamw": lambda params, **own: lrs_ext.AdamW(params, lr=1e-3, **own),
    "lion": lambda params, **own: lrs_ext.Lion(params, lr=1e-3, **own),
}


def make(name, storage):
    torch.manual_seed(0)
    model = make_model().bfloat16()
    return model, OPTIMIZERS[name](model.parameters(), **storage.options)


def update(model, optimizer, count=1):
    for _ in range(count):
        inputs, targets = torch.randn(8, 4).bfloat16(), torch.randn(8, 1).bfloat16()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


@storages
@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_comes_after_a_restore_is_what_came_before_it(name, placement, warm, storage):
    """To the bit, random rounding included: it follows the step, which is rolled back too."""
    model, optimizer = make(name, storage)
    update(model, optimizer, warm)
    copied = Snapshot(model, optimizer, (), placement)
    copied.capture()
    before = everything(model, optimizer)
    update(model, optimizer, 4)
    first = everything(model, optimizer)
    copied.restore()
    assert all_equal(everything(model, optimizer)[: len(before)], before)
    update(model, optimizer, 4)
    assert all_equal(everything(model, optimizer), first)


@storages
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_memory_is_known_before_the_first_update(name, storage):
    model, optimizer = make(name, storage)
    params = list(model.parameters())
    copied = Snapshot(model, optimizer, ())
    announced = copied.nbytes
    update(model, optimizer)
    copied.capture()
    counters = 16 * len(params) + 8
    assert 0 <= copied.nbytes - announced <= counters
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    states = [t for p in params for n, t in optimizer.state[p].items() if n != "step"]
    kept = sum(t.numel() * t.element_size() for t in (*params, *states))
    assert kept + buffers <= announced <= kept + buffers + counters


@storages
def test_a_restore_decided_on_the_device_is_exact(storage):
    model, optimizer = make("adamw", storage)
    update(model, optimizer, 2)
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    before = everything(model, optimizer)
    update(model, optimizer)
    copied.restore_where(torch.tensor(True))
    assert all_equal(everything(model, optimizer), before)


@storages
@pytest.mark.parametrize("preset", PRESETS)
def test_runs_with_every_storage_search_and_train(storage, preset):
    model, optimizer = make("adamw", storage)
    auto = lrs_ext.AutoLRS(optimizer, model, (1e-4, 1.0), **PRESETS[preset])
    for inputs, targets in auto.batches(list_of_batches()):
        loss = nn.functional.mse_loss(model(inputs.bfloat16()), targets.bfloat16())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        auto.step(loss.detach())
    assert all(param.isfinite().all() for param in model.parameters())
    first, *others = auto.history.stages[0].trials
    assert all(trial.losses[0] == first.losses[0] for trial in others if trial.losses.size)


# A scaler: overflows are skipped on the device, where the host does not see it.


class Scaled:
    """A run of AutoLRS under a GradScaler, in which given updates overflow."""

    def __init__(self, overflows, name="adamw", storage=cases.STORAGES[0], is_used=True, **options):
        torch.manual_seed(0)
        self.model, self.overflows, self.scales = make_model(), overflows, []
        self.optimizer = OPTIMIZERS[name](self.model.parameters(), **storage.options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
        if is_used:
            self.scaler.scale(torch.ones(()))
        options = PEAK | options
        extra = [self.scaler]
        self.auto = lrs_ext.AutoLRS(
            self.optimizer, self.model, (1e-3, 0.1), extra_state=extra, **options
        )
        self.stream = self.auto.batches(list_of_batches())

    def update(self, index):
        inputs, targets = next(self.stream)
        loss = nn.functional.mse_loss(self.model(inputs), targets)
        factor = math.inf if index in self.overflows else 1.0
        self.scaler.scale(loss * factor).backward()
        self.scales.append(self.scaler._scale.clone())
        self.scaler.step(self.optimizer)
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self):
        index = 0
        while not self.auto.done:
            loss = self.update(index)
            self.scaler.update()
            self.auto.step(loss)
            index += 1
        return self


# The third update of every trial, and some of the training.
OVERFLOWS = (2, 10, 18, 26, 34, 42, 50, 58, 70, 90, 91)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trials_with_overflows_are_paired(name):
    run = Scaled(OVERFLOWS, name).run()
    for trial in run.auto.history.stages[0].trials:
        assert run.scales[trial.start : trial.start + 4] == run.scales[:4]
    assert run.auto.done
    assert all(param.isfinite().all() for param in run.model.parameters())


@pytest.mark.parametrize("is_used", [False, True])
def test_a_run_resumed_in_a_trial_forgets_the_loss_scale_of_its_overflows(is_used):
    def updates(run, indices):
        for index in indices:
            loss = run.update(index)
            run.scaler.update()
            run.auto.step(loss)
        return [scale.item() for scale in run.scales]

    whole, first, second = (Scaled(OVERFLOWS, is_used=is_used) for _ in range(3))
    scales = updates(whole, range(20))
    updates(first, range(4))
    for part in ("model", "optimizer", "scaler", "auto"):
        getattr(second, part).load_state_dict(getattr(first, part).state_dict())
    second.stream = second.auto.batches(list_of_batches())
    assert updates(second, range(4, 20)) == scales[4:]
    assert scales[8:12] == scales[:4] == [16.0, 16.0, 16.0, 8.0]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_skipped_update_counts_in_the_schedule(preset):
    """The learning rate that the host shows is that on the device, and both end annealed."""
    run = Scaled(OVERFLOWS, **PRESETS[preset])
    index = 0
    while not run.auto.done:
        loss = run.update(index)
        run.scaler.update()
        run.auto.step(loss)
        index += 1
        shown, used = run.optimizer.param_groups[0]["lr"], run.optimizer.current_lr()[0]
        assert shown == pytest.approx(used, rel=1e-6), index
    history = run.auto.history
    assert history.learning_rates[-1] < 0.05 * history.stages[-1].best_lr


def test_nothing_is_read_beside_what_the_scaler_reads():
    run = Scaled(OVERFLOWS)
    index = 0
    while index < 60:
        with NoReadingOps(), NoReadingMethods():
            loss = run.update(index)
        run.scaler.update()
        with NoReadingOps(), NoReadingMethods():
            run.auto.step(loss)
        index += 1
