"""What has been measured in a run: losses of updates and validations, as means over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrs_ext.autolrs.checks import check_loss
from lrs_ext.autolrs.random_state import random_state, set_random_state
from lrs_ext.autolrs.ranks import Ranks
from lrs_ext.autolrs.replicas import Replicas
from lrs_ext.autolrs.timetable import Segment, Timetable
from lrs_ext.param_devices import on_device

VALIDATIONS = {"peak": 1, "paper": 16}  # in a trial, at most; 16 as in the reference code
_TENSORS = ("losses", "trials", "values")


class Measurements:
    """Losses on the device, the same on every rank; what is not finite on one is so on all.

    Args:
        ranks: over which means are taken.
        replicas: how trials are spread over them.
        val_loss: returns a loss to judge trials by; None judges by those of their updates.
        validations: see `VALIDATIONS`.

    Attributes:
        losses: float32, (total_steps,): of the updates that belong to no trial.
        trials: float32, (stages, updates, trials): of the trials' updates.
        values: float32, (stages, slots, trials): what `val_loss` has returned.
    """

    def __init__(
        self,
        timetable: Timetable,
        ranks: Ranks,
        replicas: Replicas,
        val_loss: Callable[[], Tensor] | None,
        validations: int,
        device: torch.device,
    ) -> None:
        self._timetable, self._val_loss, self._validations = timetable, val_loss, validations
        self._ranks, self._replicas = ranks, replicas
        stages, trials = timetable.num_stages, timetable.num_trials
        longest = max(s.steps for s in timetable.segments if s.kind == "trial")
        self.losses = torch.full((timetable.total_steps,), math.nan, device=device)
        self.trials = torch.full((stages, longest, trials), math.nan, device=device)
        slots = max(VALIDATIONS.values()) + 1
        self.values = torch.full((stages, slots, trials), math.nan, device=device)

    def add_loss(self, segment: Segment, update: int, loss: Tensor) -> None:
        """Takes the loss of an update, counted in the whole run."""
        if segment.kind == "trial":
            self._add_of_trials(segment, self.trials[segment.stage, update - segment.start], loss)
        else:
            self._add(self.losses[update : update + 1], 0, 1.0 / self._ranks.size, loss)

    def validate(self, segment: Segment, updates: int) -> None:
        """Takes a validation loss of a trial, if one is due after so many of its updates.

        Later trials start from the state of the first, and take over what it had before an update.
        """
        interval = self._interval(segment)
        if self._val_loss is None or updates % interval != 0:
            return
        slots = self.values[segment.stage, updates // interval]
        if updates == 0 and segment.trial > 0:
            self._ranks.wait()
            _own(slots, segment).copy_(slots[0])
            return
        training = random_state()  # it may draw random numbers, which would unpair the trials
        try:
            with torch.no_grad():
                loss = self._val_loss()
        finally:
            set_random_state(training)
        check_loss(loss, "what val_loss returns")
        self._add_of_trials(segment, slots, loss)

    def of_updates(self, start: int, end: int) -> Tensor:
        """Returns the losses of updates outside of trials, (end - start,)."""
        self._ranks.wait()
        return self.losses[start:end]

    def of_trial(self, segment: Segment, trial: int) -> tuple[Tensor, float]:
        """Returns what a trial is judged by, (n,), and where in it the stage would end."""
        self._ranks.wait()
        _, train = self._timetable.stage(segment.stage)
        if self._val_loss is None:
            return self.trials[segment.stage, : segment.steps, trial], train.steps - 1
        interval = self._interval(segment)
        points = segment.steps // interval
        return self.values[segment.stage, : points + 1, trial], train.steps / interval

    def of_first_trial(self, stage: int) -> Tensor:
        """Returns the losses of the updates of a stage's first trial, float64, (n,)."""
        self._ranks.wait()
        (first, *_), _ = self._timetable.stage(stage)
        return self.trials[stage, : first.steps, 0].to(torch.float64)

    def first_losses(self, stage: int) -> tuple[Tensor, Tensor]:
        """Returns what the first trial is judged by, (n,), and each trial's first loss, (k,).

        The latter are equal if all saw the same batches. It is one loss alone where others may
        differ: trials are judged by `val_loss`, or waves of them by the batches of other ranks.
        """
        (first, *_), _ = self._timetable.stage(stage)
        judged_by, _ = self.of_trial(first, 0)
        losses = self.trials[stage, 0].to(torch.float64)
        is_alone = self._val_loss is not None or self._replicas.are_apart
        return judged_by, losses[:1] if is_alone else losses

    def state_dict(self) -> dict[str, Any]:
        self._ranks.wait()
        return {name: getattr(self, name).clone() for name in _TENSORS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ranks.wait()
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])

    def _interval(self, segment: Segment) -> int:
        """Returns updates between validations in a trial."""
        return -(-segment.steps // self._validations)

    def _add_of_trials(self, segment: Segment, slots: Tensor, loss: Tensor) -> None:
        """Takes a measurement of a segment's trials; slots: (trials,)."""
        slot, weight = self._replicas.slot(segment.width), self._replicas.weight(segment.width)
        self._add(_own(slots, segment), slot, weight, loss)

    def _add(self, slots: Tensor, slot: int, weight: float, loss: Tensor) -> None:
        """Writes into all `slots` the sums over the ranks of their weighted losses."""
        if self._ranks.size > 1:
            slots.zero_()
        if weight > 0.0:
            slots[slot].copy_(on_device(loss.detach(), slots.device))
            if weight < 1.0:
                slots[slot].mul_(weight)
        self._ranks.sum_(slots)


def keeping_modes(model: nn.Module, val_loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns `val_loss`, after which each module trains or evaluates as before."""

    def kept() -> Tensor:
        modes = [(module, module.training) for module in model.modules()]
        try:
            return val_loss()
        finally:
            for module, is_training in modes:
                module.training = is_training

    return kept


def _own(slots: Tensor, segment: Segment) -> Tensor:
    return slots[segment.trials.start : segment.trials.stop]
