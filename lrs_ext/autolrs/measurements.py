"""What has been measured in a run: losses of updates and validations, as means over the ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lrs_ext.autolrs.ranks import Ranks
from lrs_ext.autolrs.replicas import Replicas
from lrs_ext.autolrs.timetable import Segment, Timetable

VALIDATIONS = 16  # in a trial of the preset "paper", as in the reference code
_TENSORS = ("losses", "trials", "values")


class Measurements:
    """Losses on the device, the same on every rank; what is not finite on one is so on all.

    Attributes:
        losses: float32, (total_steps,): of the updates that belong to no trial.
        trials: float32, (stages, updates, trials): of the trials' updates.
        values: float32, (stages, VALIDATIONS + 1, trials): what `val_loss` has returned.
    """

    def __init__(
        self, timetable: Timetable, ranks: Ranks, replicas: Replicas | None, device: torch.device
    ) -> None:
        self._ranks, self._replicas = ranks, replicas
        stages, trials = timetable.num_stages, timetable.num_trials
        longest = max(s.steps for s in timetable.segments if s.kind == "trial")
        self.losses = torch.full((timetable.total_steps,), math.nan, device=device)
        self.trials = torch.full((stages, longest, trials), math.nan, device=device)
        self.values = torch.full((stages, VALIDATIONS + 1, trials), math.nan, device=device)

    def add_loss(self, segment: Segment, update: int, loss: Tensor) -> None:
        """Takes the loss of an update, counted in the whole run."""
        if segment.kind == "trial":
            self._add_of_trials(segment, self.trials[segment.stage, update - segment.start], loss)
        else:
            self._add(self.losses[update : update + 1], 0, 1.0 / self._ranks.size, loss)

    def add_value(self, segment: Segment, point: int, loss: Tensor) -> None:
        """Takes a validation loss of a trial."""
        self._add_of_trials(segment, self.values[segment.stage, point], loss)

    def repeat_value(self, segment: Segment) -> None:
        """Takes the first trial's validation loss before its first update for later trials'."""
        self._ranks.wait()
        slots = self.values[segment.stage, 0]
        _own(slots, segment).copy_(slots[0])

    def of_updates(self, start: int, end: int) -> Tensor:
        """Returns the losses of updates outside of trials, (end - start,)."""
        self._ranks.wait()
        return self.losses[start:end]

    def of_trial(self, segment: Segment, trial: int) -> Tensor:
        """Returns the losses of a trial's updates, (updates,)."""
        self._ranks.wait()
        return self.trials[segment.stage, : segment.steps, trial]

    def values_of_trial(self, segment: Segment, trial: int, points: int) -> Tensor:
        """Returns a trial's first validation losses, (points,)."""
        self._ranks.wait()
        return self.values[segment.stage, :points, trial]

    def state_dict(self) -> dict[str, Any]:
        self._ranks.wait()
        return {name: getattr(self, name).clone() for name in _TENSORS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ranks.wait()
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])

    def _add_of_trials(self, segment: Segment, slots: Tensor, loss: Tensor) -> None:
        """Takes a measurement of a segment's trials; slots: (trials,)."""
        slot, weight = 0, 1.0 / self._ranks.size
        if self._replicas is not None:
            width = segment.width
            slot, weight = self._replicas.slot(width), self._replicas.weight(width)
        self._add(_own(slots, segment), slot, weight, loss)

    def _add(self, slots: Tensor, slot: int, weight: float, loss: Tensor) -> None:
        """Writes into all `slots` the sums over the ranks of their weighted losses."""
        if self._ranks.size > 1:
            slots.zero_()
        if weight > 0.0:
            slots[slot].copy_(loss.detach(), non_blocking=True)
            if weight < 1.0:
                slots[slot].mul_(weight)
        self._ranks.sum_(slots)


def _own(slots: Tensor, segment: Segment) -> Tensor:
    return slots[segment.trials.start : segment.trials.stop]
