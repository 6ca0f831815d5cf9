"""Ways to get a learning rate, each of which trains a model within a budget of updates.

All see the same initial model and the same batches in the same order for a seed. What a method
spends on finding the learning rate comes out of its budget.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from autolrs_tasks import MOMENTUM, WEIGHT_DECAY, Batch, Task
from torch import Tensor, nn

import lrs_ext

Options = dict[str, Any]

DECADES = 4.0  # width of the range of learning rates that every method gets
FINITE_CHECK_STEPS = 50  # a run that has diverged is cut short
BATCH_NORM_BATCHES = 50  # that schedule-free's averaged weights are measured with
RANGE_TEST_SHARE = 0.1
RANGE_TEST_SMOOTHING = 0.05  # weight of a new loss, as in torch-lr-finder
RANGE_TEST_LIMIT = 5.0  # times the best loss, where it ends, as in torch-lr-finder


@dataclass(frozen=True)
class Outcome:
    """A trained model.

    Attributes:
        updates: made in all; fewer than the budget where the run has diverged.
        search_updates: those of them that were spent on finding the learning rate.
        lr: that was chosen or given, the peak of its schedule; None where there is no such thing.
        trials: what AutoLRS has tried: learning rate and objective of each trial.
    """

    model: nn.Module
    updates: int
    search_updates: int = 0
    lr: float | None = None
    trials: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Contestant:
    """A method.

    Attributes:
        run: trains: task, budget, seed, options.
        knobs: what the user must supply that matters for the result.
        defaults: options and their values when they are not given.
        needs: a module of a package that is not always there, or "".
    """

    run: Callable[[Task, int, int, Options], Outcome]
    knobs: str
    defaults: Options = field(default_factory=dict)
    needs: str = ""

    @property
    def is_available(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.package) is not None

    @property
    def package(self) -> str:
        return self.needs.partition(".")[0]


def rate_bounds(task: Task, decades: float) -> tuple[float, float]:
    return task.centre * 10 ** (-decades / 2), task.centre * 10 ** (decades / 2)


def train(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    after: Callable[[Tensor], object] = lambda loss: None,
) -> int:
    """Makes one update a batch; returns how many it made before the loss stopped being finite.

    Args:
        after: gets the loss of an update, 0-d.
    """
    updates = 0
    for batch in batches:
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(loss.detach())
        updates += 1
        if updates % FINITE_CHECK_STEPS == 0 and not math.isfinite(loss.detach()):
            break
    return updates


def following(
    optimizer: torch.optim.Optimizer, schedule: lrs_ext.Schedule
) -> Callable[[Tensor], None]:
    """Sets the schedule's first value now and the next one whenever it is called."""
    steps = itertools.count()

    def follow(_: Tensor | None = None) -> None:
        lr = schedule(next(steps))
        for group in optimizer.param_groups:
            group["lr"] = lr

    follow()
    return follow


# Schedules with a given peak


def scheduled(
    schedule: Callable[[float, int], lrs_ext.Schedule],
) -> Callable[[Task, int, int, Options], Outcome]:
    """Returns a run with `offset`: decades from the middle of the range to the peak."""

    def run(task: Task, total_steps: int, seed: int, options: Options) -> Outcome:
        lr = task.centre * 10 ** options["offset"]
        model = task.model(seed)
        optimizer = task.optimizer(model.parameters(), schedule(lr, total_steps))
        batches = itertools.islice(task.batches(seed), total_steps)
        return Outcome(model, train(task, model, optimizer, batches), lr=lr)

    return run


# AutoLRS


@contextlib.contextmanager
def patched(constants: dict[str, Any]) -> Iterator[None]:
    """Changes constants of `lrs_ext.autolrs`, named "module.NAME", for a while."""
    originals = []
    try:
        for path, value in constants.items():
            module_name, _, name = path.partition(".")
            module = importlib.import_module(f"lrs_ext.autolrs.{module_name}")
            if not hasattr(module, name):
                raise ValueError(f"lrs_ext.autolrs.{module_name} has no {name}")
            original = getattr(module, name)
            originals.append((module, name, original))
            setattr(module, name, tuple(value) if isinstance(original, tuple) else value)
        yield
    finally:
        for module, name, original in reversed(originals):
            setattr(module, name, original)


def auto(task: Task, total_steps: int, seed: int, options: Options) -> Outcome:
    """AutoLRS.

    Its options are the keywords of `lrs_ext.AutoLRS`, constants by "module.NAME", and `decades`,
    the width of the bounds; `shift`, decades from the middle of the range to that of the bounds;
    `judge="validation"`, which makes the validation set judge the trials.
    """
    constants = {name: value for name, value in options.items() if "." in name}
    keywords = {name: value for name, value in options.items() if "." not in name}
    shift = 10.0 ** keywords.pop("shift", 0.0)
    low, high = rate_bounds(task, keywords.pop("decades", DECADES))
    model = task.model(seed)
    judge = keywords.pop("judge", "training")
    if judge not in ("training", "validation"):
        raise ValueError(f'judge must be "training" or "validation", got {judge!r}')
    if judge == "validation":
        keywords["val_loss"] = lambda: task.evaluate(model, "validation")
    optimizer = task.optimizer(model.parameters(), task.centre)
    with patched(constants):
        controller = lrs_ext.AutoLRS(
            optimizer, model, (shift * low, shift * high), total_steps, **keywords
        )
        for batch in controller.batches(task.batches(seed)):
            loss = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step(loss.detach())
        stages = controller.history.stages
    trials = [trial for stage in stages for trial in stage.trials]
    return Outcome(
        model,
        total_steps,
        search_updates=sum(len(trial.losses) for trial in trials),
        lr=stages[-1].best_lr,
        trials=[(trial.lr, trial.objective) for trial in trials],
    )


def paper(task: Task, total_steps: int, seed: int, options: Options) -> Outcome:
    """AutoLRS with the preset "paper"; stages of 1, 2, 4 tau such that three fit, if they can."""
    tau = max(40, total_steps // 14)  # with its trials, a stage takes twice its length
    stages = {"preset": "paper", "stage_steps": (tau, 2 * tau, 4 * tau)}
    return auto(task, total_steps, seed, stages | options)


# Methods of others


def annealed(
    make: Callable[[Task, Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> Callable[[Task, int, int, Options], Outcome]:
    """Returns a run of an optimizer that finds its own scale: lr 1, cosine to 0."""

    def run(task: Task, total_steps: int, seed: int, options: Options) -> Outcome:
        model = task.model(seed)
        with contextlib.redirect_stdout(io.StringIO()):  # they print their options
            optimizer = make(task, model.parameters())
        batches = itertools.islice(task.batches(seed), total_steps)
        follow = following(optimizer, lrs_ext.cosine(1.0, total_steps))
        return Outcome(model, train(task, model, optimizer, batches, follow))

    return run


def decay(task: Task) -> float:
    return WEIGHT_DECAY if task.kind == "AdamW" else 0.0


def make_prodigy(task: Task, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(params, lr=1.0, weight_decay=decay(task))


def make_dadapt(task: Task, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    from dadaptation import DAdaptAdam, DAdaptSGD

    if task.kind == "SGD":
        return DAdaptSGD(params, lr=1.0, momentum=MOMENTUM)
    return DAdaptAdam(params, lr=1.0, weight_decay=decay(task), decouple=task.kind == "AdamW")


def schedule_free(task: Task, total_steps: int, seed: int, options: Options) -> Outcome:
    from schedulefree import AdamWScheduleFree, SGDScheduleFree

    model = task.model(seed)
    if task.kind == "SGD":
        optimizer = SGDScheduleFree(model.parameters(), momentum=MOMENTUM)
    else:
        optimizer = AdamWScheduleFree(model.parameters(), weight_decay=decay(task))
    batches = iter(task.batches(seed))
    optimizer.train()
    updates = train(task, model, optimizer, itertools.islice(batches, total_steps))
    optimizer.eval()
    measure_batch_norm(task, model, itertools.islice(batches, BATCH_NORM_BATCHES))
    return Outcome(model, updates, lr=optimizer.defaults["lr"])


@torch.no_grad()
def measure_batch_norm(task: Task, model: nn.Module, batches: Iterable[Batch]) -> None:
    """Gives BatchNorm the averages of the batches, for weights that it was not trained with."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    for batch in batches:
        task.loss(model, batch)


def greedy(task: Task, total_steps: int, seed: int, options: Options) -> Outcome:
    """GreedyLR from the middle of the range, on the smoothed training loss."""
    from transformers.optimization import GreedyLR

    model = task.model(seed)
    optimizer = task.optimizer(model.parameters(), task.centre)
    low, high = rate_bounds(task, DECADES)
    scheduler = GreedyLR(optimizer, min_lr=low, max_lr=high, smooth=True)
    batches = itertools.islice(task.batches(seed), total_steps)
    updates = train(task, model, optimizer, batches, scheduler.step)
    return Outcome(model, updates, lr=task.centre)


def one_cycle(task: Task, total_steps: int, seed: int, options: Options) -> Outcome:
    """An exponential range test, then torch's OneCycleLR from the initial weights.

    Option `rule`: "minimum" is a tenth of the rate with the lowest loss, "steepest" the rate at
    which the loss falls fastest.
    """
    batches = iter(task.batches(seed))
    searched, rates, losses = range_test(task, seed, batches, round(RANGE_TEST_SHARE * total_steps))
    if options["rule"] == "minimum":
        peak = rates[int(np.argmin(losses))] / 10
    elif options["rule"] == "steepest":
        peak = rates[int(np.argmin(np.gradient(losses)))]
    else:
        raise ValueError(f'rule must be "minimum" or "steepest", got {options["rule"]!r}')
    model = task.model(seed)
    optimizer = task.optimizer(model.parameters(), peak)
    remaining = total_steps - searched
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=remaining + 1)
    updates = train(
        task,
        model,
        optimizer,
        itertools.islice(batches, remaining),
        lambda loss: scheduler.step(),
    )
    return Outcome(model, searched + updates, search_updates=searched, lr=peak)


def range_test(
    task: Task, seed: int, batches: Iterator[Batch], steps: int
) -> tuple[int, list[float], list[float]]:
    """Returns how many updates a growing sweep took, its learning rates and smoothed losses."""
    low, high = rate_bounds(task, DECADES)
    rates = np.geomspace(low, high, steps).tolist()
    model, updates = task.model(seed), 0
    optimizer = task.optimizer(model.parameters(), low)
    losses: list[float] = []
    for lr, batch in zip(rates, batches, strict=False):
        optimizer.param_groups[0]["lr"] = lr
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        value = float(loss.detach())
        if losses:
            value = losses[-1] + RANGE_TEST_SMOOTHING * (value - losses[-1])
        if not math.isfinite(value) or value > RANGE_TEST_LIMIT * min([*losses, value]):
            break
        losses.append(value)
    return updates, rates[: len(losses)], losses


PEAK = "the peak, from 9 full runs"
RANGE = "a range of rates"
MIDDLE: Options = {"offset": 0.0}
CONTESTANTS = {
    "cosine": Contestant(scheduled(lrs_ext.cosine), PEAK, MIDDLE),
    "linear": Contestant(scheduled(lrs_ext.linear), PEAK, MIDDLE),
    "rex": Contestant(scheduled(lrs_ext.rex), PEAK, MIDDLE),
    "auto": Contestant(auto, RANGE, {"decades": DECADES}),
    "paper": Contestant(paper, RANGE, {"decades": DECADES}),
    "prodigy": Contestant(annealed(make_prodigy), "none", needs="prodigyopt"),
    "dadapt": Contestant(annealed(make_dadapt), "none", needs="dadaptation"),
    "schedulefree": Contestant(schedule_free, "none (the default rate)", needs="schedulefree"),
    "greedy": Contestant(greedy, "an initial rate and a range", needs="transformers.optimization"),
    "onecycle": Contestant(one_cycle, RANGE, {"rule": "steepest"}),
}
GRIDDED = ("cosine", "linear", "rex")
GRID = tuple(step / 2 for step in range(-4, 5))  # decades from the middle of the range
