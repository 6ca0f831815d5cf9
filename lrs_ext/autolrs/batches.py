"""Batches that come again: every trial sees the same ones, and training goes on with them."""

from __future__ import annotations

import contextlib
import copy
import operator
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrs_ext.autolrs.random_state import random_state, set_random_state

_GENERATORS = (  # of a loader, where torch has them
    "generator",
    "sampler.generator",
    "batch_sampler.generator",
    "batch_sampler.sampler.generator",
    "batch_sampler.batch_sampler.sampler.generator",  # Accelerate's, with several processes
)
# What shuffles anew in each epoch, besides the loader itself.
_SHUFFLED = ("sampler", "batch_sampler", "batch_sampler.sampler", "dataset")


class Tape:
    """Hands out a loader's batches; between `record` and `release` it keeps them.

    It keeps as many as one trial draws, trial_steps times the batches of an update, where they
    are: on the device if the loader puts them there. A checkpoint holds them. Who draws them may
    change them in place: each time another copy comes (`cloned`), until after the last trial, when
    training gets those that are kept, without a copy, and the memory goes free with them.

    `rewind` takes effect at the next draw. A prefetcher around the tape, which draws ahead of the
    updates, shifts the batches of the trials against each other: put it around the loader.

    While batches are kept, the loader draws its random numbers from a stream of its own: training
    then draws the same ones whether a batch is new or comes again. Generators that a loader or its
    sampler brings are its own anyway; they resume with their states at the start of the epoch.

    Args:
        share: what trials get instead of a batch that is drawn; training gets the batch itself.
    """

    def __init__(self, share: Callable[[Any], Any] | None = None) -> None:
        self._share = share
        self._kept: deque[Any] = deque()
        self._origins: deque[tuple[int, int]] = deque()  # (epoch, index in it) of what is kept
        self._shared: list[Any] = []  # in place of what is kept, as far as it has been handed out
        self._position = 0  # in what is kept
        self._is_recording = False
        self._epoch = -1
        self._drawn = 0  # batches of this epoch
        self._stream: dict[str, Any] | None = None  # the loader's random state while recording
        self._has_begun = False  # the epoch of the loader in use
        self._epoch_start: dict[str, Any] | None = None  # random states when that was
        self._loader: Iterable[Any] | None = None
        self._iterator: Iterator[Any] | None = None

    @property
    def is_in_use(self) -> bool:
        """Whether batches have been drawn here since it was made or loaded."""
        return self._loader is not None

    def record(self) -> None:
        """Keeps what comes from now on."""
        self._is_recording = True
        self._shared.clear()
        self._forget_past()

    def rewind(self) -> None:
        """Starts again with the first batch kept."""
        self._position = 0

    def release(self) -> None:
        """Starts again with the first batch kept, and keeps no more."""
        self._position = 0
        self._is_recording = False
        self._shared.clear()

    def next_batch(self, loader: Iterable[Any]) -> Any:
        """Returns the next batch; a loader at its end starts its next epoch.

        Raises:
            RuntimeError: the loader has no batch, or is an iterator that has run dry; or it is not
                the one of the last `resume`.
        """
        if self._loader is None:
            self._loader = loader
        elif self._loader is not loader:
            raise RuntimeError(
                "batches() has been called with another loader since, which has taken over: draw "
                "from one at a time, and join loaders that are needed together into one iterable"
            )
        if self._position == len(self._kept):
            batch = self._draw(loader)
            if not self._is_recording:
                return batch
            self._kept.append(cloned(batch))  # some loaders write every batch into the same memory
            self._origins.append((self._epoch, self._drawn - 1))
            is_new = True
        else:
            batch, is_new = self._kept[self._position], False
        self._position += 1
        if not self._is_recording:
            self._forget_past()
            return batch
        if self._share is not None:
            if self._position > len(self._shared):
                self._shared.append(self._share(batch))
            return cloned(self._shared[self._position - 1])
        return batch if is_new else cloned(batch)

    def state_dict(self) -> dict[str, Any]:
        """Returns where the tape is, which is the same on every rank, and `of_this_rank`."""
        return {
            "position": self._position,
            "is_recording": self._is_recording,
            "epoch": self._epoch,
            "drawn": self._drawn,
            "has_begun": self._has_begun,
            "origins": tuple(self._origins),
            "of_this_rank": {
                "kept": [cloned(batch) for batch in self._kept],
                "stream": self._stream,
                "epoch_start": self._epoch_start,
            },
        }

    def load_state_dict(self, state: dict[str, Any], is_own: bool = True) -> None:
        """Goes on where `state_dict` was called.

        Args:
            is_own: whether it was called on this rank. What another rank has kept says nothing
                here: it is drawn again.
        """
        own = state["of_this_rank"]
        self._kept = deque(cloned(batch) for batch in own["kept"]) if is_own else deque()
        self._origins = deque(tuple(origin) for origin in state["origins"])
        self._shared.clear()
        self._position = state["position"]
        self._is_recording = state["is_recording"]
        self._epoch, self._drawn = state["epoch"], state["drawn"]
        self._has_begun = state["has_begun"]
        self._stream = own["stream"] if is_own else None
        self._epoch_start = own["epoch_start"] if is_own else None
        self._loader = self._iterator = None

    def resume(self, loader: Iterable[Any], restores_itself: bool) -> None:
        """Brings a fresh loader to where the saved one was.

        A loader other than the one in use takes over at the next batch that is not kept, with an
        epoch of its own.

        Args:
            restores_itself: the loader's own state has been loaded: nothing is to be skipped.

        Raises:
            RuntimeError: the loader has fewer batches than the saved one had given, or would have
                to draw again what another rank has kept, and cannot.
        """
        if self._loader is not None and self._loader is not loader:
            self._iterator, self._has_begun = None, False
        self._loader = loader
        is_missing = len(self._kept) < len(self._origins)
        if self._iterator is not None or not (self._has_begun or is_missing):
            return
        if is_missing and restores_itself:
            raise RuntimeError(
                "the batches of the present trials are those of another rank, and a loader in "
                "extra_state cannot draw this rank's again: save and load AutoLRS.state_dict on "
                "each rank, or leave the loader out of extra_state"
            )
        if is_missing and isinstance(loader, Drawn):
            if self._is_recording:
                raise RuntimeError(
                    "the batches of the present trials are those of another rank, and what the "
                    "framework has drawn here is gone: resume from a checkpoint that was saved "
                    "before the search or after it, or with a loop of your own, which can save "
                    "AutoLRS.state_dict on each rank"
                )
            self._origins.clear()
            is_missing = False
        training = random_state()
        try:
            if is_missing:
                self._redraw(loader)
            elif restores_itself:
                self._iterator = iter(loader)
            else:
                self._set_generators(loader)
                self._iterator = _skipped(loader, self._epoch, self._drawn)
        finally:
            set_random_state(training)

    def _set_generators(self, loader: Iterable[Any]) -> None:
        """Puts the generators to where they were when the epoch began, as far as that is known."""
        if self._epoch_start is not None:
            set_random_state(self._epoch_start["random"])
            for place, generator in _generators(loader).items():
                if place in self._epoch_start["generators"]:
                    generator.set_state(self._epoch_start["generators"][place].cpu())

    def _redraw(self, loader: Iterable[Any]) -> None:
        """Draws again, from this rank's loader, what was kept when the run was saved."""
        (self._epoch, index), end = self._origins[0], (self._epoch, self._drawn)
        self._iterator, self._drawn = _skipped(loader, self._epoch, index), index
        self._kept.clear()
        self._origins.clear()
        while (self._epoch, self._drawn) < end:
            batch = self._draw_from(loader)
            self._kept.append(cloned(batch))
            self._origins.append((self._epoch, self._drawn - 1))

    def _forget_past(self) -> None:
        while self._position:
            self._kept.popleft()
            self._origins.popleft()
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
        generators = _generators(loader).items()
        self._has_begun = True
        self._epoch_start = {
            "random": random_state(),
            "generators": {place: generator.get_state() for place, generator in generators},
        }
        set_epoch(loader, self._epoch)
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


class Drawn:
    """An endless loader of whatever somebody else has drawn last, which cannot be drawn again."""

    def __init__(self) -> None:
        self.batch: Any = None

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.batch


def cloned(batch: Any) -> Any:
    """Returns a copy of a batch that shares no memory with it.

    Mappings, lists and tuples of any kind are rebuilt, tensors stay on their device and in
    page-locked memory; whatever else there is, NumPy's arrays too, is copied by `copy.deepcopy`.

    >>> batch = {"x": torch.zeros(2), "names": ["a", "b"]}
    >>> copied = cloned(batch)
    >>> _ = copied.pop("names"), copied["x"].add_(1.0)
    >>> batch
    {'x': tensor([0., 0.]), 'names': ['a', 'b']}
    """
    if isinstance(batch, Tensor):
        tensor = batch.detach()
        if tensor.layout == torch.strided and tensor.is_pinned():
            tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
        else:
            tensor = tensor.clone()
        return tensor.requires_grad_(batch.requires_grad)
    if isinstance(batch, MutableMapping):
        mapping = copy.copy(batch)
        for key, value in batch.items():
            mapping[key] = cloned(value)
        return mapping
    if isinstance(batch, list):
        items = copy.copy(batch)
        items[:] = map(cloned, batch)
        return items
    if isinstance(batch, tuple):
        parts = [cloned(item) for item in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return copy.deepcopy(batch)


def _generators(loader: Iterable[Any]) -> dict[str, torch.Generator]:
    """Returns the generators that a loader and its samplers bring, by where they are."""
    found = {}
    for place in _GENERATORS:
        try:
            generator = operator.attrgetter(place)(loader)
        except AttributeError:
            continue
        if isinstance(generator, torch.Generator) and generator.device.type == "cpu":
            found[place] = generator
    return found


def _skipped(loader: Iterable[Any], epoch: int, count: int) -> Iterator[Any]:
    """Returns an iterator behind the first `count` batches of an epoch.

    Raises:
        RuntimeError: there are fewer.
    """
    set_epoch(loader, epoch)
    iterator = iter(loader)
    for found in range(count):
        try:
            next(iterator)
        except StopIteration:
            raise RuntimeError(
                f"the loader gives {found} batches, fewer than the {count} that had been "
                "drawn when the run was saved: resume with the same data and batch size"
            ) from None
    return iterator


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tells a loader and what is in it which epoch begins, so that they shuffle anew."""
    parts = [loader]
    for place in _SHUFFLED:
        with contextlib.suppress(AttributeError):
            parts.append(operator.attrgetter(place)(loader))
    for part in {id(part): part for part in parts}.values():
        told = getattr(part, "set_epoch", None)
        if callable(told):
            told(epoch)


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
