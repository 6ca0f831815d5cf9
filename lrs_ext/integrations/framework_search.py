"""An AutoLRS whose training loop belongs to a framework."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lrs_ext.autolrs.batches import Drawn
from lrs_ext.autolrs.controller import AutoLRS
from lrs_ext.autolrs.random_state import random_state, set_random_state


class FrameworkSearch:
    """Hands the batches that a framework draws to `AutoLRS`, and the losses of its updates.

    The framework draws a fresh batch for every step of its own, also where a trial's batches come
    again: the fresh one is then left out. Its counts of batches and epochs, and what it skips when
    it resumes, stay right that way. What it draws at random between the updates of a trial, at the
    start of an epoch or in an evaluation, does not shift the random numbers of training.
    """

    def __init__(self, auto: AutoLRS) -> None:
        self.auto = auto
        self._drawn = Drawn()
        self._stream: Iterator[Any] | None = None
        self._loss: Tensor | None = None
        self._random: dict[str, Any] | None = None  # where training goes on, in a trial

    def batch(self, fresh: Any) -> Any:
        """Returns what to train on: `fresh`, or in a trial what the first trial had in its place.

        Once the budget is used up, it is always `fresh`.
        """
        if self.auto.done:
            return fresh
        if self._stream is None:
            self._stream = self.auto.batches(self._drawn)
        self._drawn.batch = fresh
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
        return next(self._stream)

    @property
    def has_loss(self) -> bool:
        """Whether any loss has been added since the last update."""
        return self._loss is not None

    def add_loss(self, loss: Tensor) -> None:
        """Adds the share of a micro-batch to the loss of the update, 0-d."""
        loss = loss.detach()
        self._loss = loss.clone() if self._loss is None else self._loss + loss

    def end_update(self) -> None:
        """Follows an update of the optimizer, whose loss is the sum of those added.

        Raises:
            RuntimeError: there was none.
        """
        loss, self._loss = self._loss, None
        if self.auto.done:
            return
        if loss is None:
            raise RuntimeError(
                "there was an update without a loss: AutoLRS judges learning rates by the losses "
                "that the framework's training step returns"
            )
        self.auto.step(loss.reshape(()))
        self._keep_random_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `AutoLRS.state_dict` was called."""
        self.auto.load_state_dict(state)
        self._stream = self._loss = None
        self._keep_random_state()

    def _keep_random_state(self) -> None:
        self._random = random_state() if self.auto.phase == "search" else None
