"""Batches that come again: every trial sees the same ones, and training goes on with them."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from lrs_ext.autolrs.random_state import random_state, set_random_state


class Tape:
    """Hands out a loader's batches; between `record` and `release` it keeps them.

    While it keeps them, the loader draws its random numbers from a stream of its own: training then
    draws the same ones whether a batch is new or comes again.
    """

    def __init__(self) -> None:
        self._kept: deque[Any] = deque()
        self._position = 0  # in what is kept
        self._is_recording = False
        self._epoch = -1
        self._drawn = 0  # batches of this epoch
        self._stream: dict[str, Any] | None = None  # the loader's random state while recording
        self._epoch_start: dict[str, Any] | None = None  # the random state when its epoch began
        self._iterator: Iterator[Any] | None = None

    def record(self) -> None:
        """Keeps what comes from now on."""
        self._is_recording = True
        self._forget_past()

    def rewind(self) -> None:
        """Starts again with the first batch kept."""
        self._position = 0

    def release(self) -> None:
        """Starts again with the first batch kept, and keeps no more."""
        self._position = 0
        self._is_recording = False

    def next_batch(self, loader: Iterable[Any]) -> Any:
        """Returns the next batch; a loader at its end starts its next epoch.

        Raises:
            RuntimeError: the loader has no batch, or is an iterator that has run dry.
        """
        if self._position == len(self._kept):
            batch = self._draw(loader)
            if not self._is_recording:
                return batch
            self._kept.append(batch)
        batch = self._kept[self._position]
        self._position += 1
        if not self._is_recording:
            self._forget_past()
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "kept": list(self._kept),
            "position": self._position,
            "is_recording": self._is_recording,
            "epoch": self._epoch,
            "drawn": self._drawn,
            "stream": self._stream,
            "epoch_start": self._epoch_start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = deque(state["kept"])
        self._position = state["position"]
        self._is_recording = state["is_recording"]
        self._epoch, self._drawn = state["epoch"], state["drawn"]
        self._stream, self._epoch_start = state["stream"], state["epoch_start"]
        self._iterator = None

    def resume(self, loader: Iterable[Any], restores_itself: bool) -> None:
        """Brings a fresh loader to where the saved one was.

        Args:
            restores_itself: the loader's own state has been loaded: nothing is to be skipped.
        """
        if self._iterator is not None or self._epoch < 0:
            return
        training = random_state()
        assert self._epoch_start is not None
        try:
            if restores_itself:
                self._iterator = iter(loader)
            else:
                set_random_state(self._epoch_start)
                _set_epoch(loader, self._epoch)
                self._iterator = iter(loader)
                for _ in range(self._drawn):
                    next(self._iterator)
        finally:
            set_random_state(training)

    def _forget_past(self) -> None:
        while self._position:
            self._kept.popleft()
            self._position -= 1

    def _draw(self, loader: Iterable[Any]) -> Any:
        if not self._is_recording:
            return self._draw_from(loader)
        training = random_state()
        set_random_state(self._stream or _new_stream())
        try:
            batch = self._draw_from(loader)
            self._stream = random_state()
        finally:
            set_random_state(training)
        return batch

    def _draw_from(self, loader: Iterable[Any]) -> Any:
        if self._iterator is not None:
            for batch in self._iterator:
                self._drawn += 1
                return batch
        self._epoch += 1
        self._epoch_start = random_state()
        _set_epoch(loader, self._epoch)
        self._iterator = iter(loader)
        for batch in self._iterator:
            self._drawn = 1
            return batch
        raise RuntimeError(
            "the loader has no more batches, but the budget is not used up"
            + (", in the middle of a trial" if self._is_recording else "")
            + ": pass something that can be iterated again, such as a DataLoader or a list, "
            "not an iterator or a generator"
        )


def _set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tells a distributed sampler which epoch begins, so that it shuffles anew."""
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)


def _new_stream() -> dict[str, Any]:
    """Returns a random state that follows from torch's seed and differs from its own."""
    seed = (torch.initial_seed() + 1) % 2**32
    training = random_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is the one that loaders use
    stream = random_state()
    set_random_state(training)
    return stream
