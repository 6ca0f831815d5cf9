"""Whole copies of a model, one on each rank, that try different learning rates at once."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lrs_ext.autolrs.random_state import on_host, random_state, set_random_state
from lrs_ext.autolrs.ranks import Ranks
from lrs_ext.shards import is_dtensor


def check_replicas(model: nn.Module) -> None:
    """Checks that every rank has a whole model that can train without the others.

    Raises:
        TypeError: nothing says how to train without averaging gradients.
        ValueError: parameters are spread over ranks, or a layer's statistics are.
    """
    kind = type(model).__name__
    if any(is_dtensor(param) for param in model.parameters()) or kind == "FullyShardedDataParallel":
        raise ValueError(
            "parallel_trials needs a whole model on every rank, but parameters are spread over "
            "ranks: leave parallel_trials out"
        )
    synced = [name for name, part in model.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    if synced:
        raise ValueError(
            f"parallel_trials needs ranks that train apart, but {synced[0]} is a SyncBatchNorm, "
            "which would mix the statistics of different learning rates: leave parallel_trials "
            "out, or take a BatchNorm"
        )
    if not callable(getattr(model, "no_sync", None)):
        raise TypeError(
            "parallel_trials switches off the averaging of gradients during trials with "
            f"model.no_sync(), which {kind} does not have: pass the DistributedDataParallel module "
            "as model"
        )


class Replicas:
    """Lets each rank try its own candidate of a wave, on equal batches and random numbers.

    Rank r tries candidate ``r % at_once``. Where there are more ranks, those with equal ``r //
    at_once`` form a row, which has the batches of its first rank; a candidate's losses are the mean
    over its rows. Ranks that do not fill a row run along and do not count.

    Args:
        model: see `check_replicas`; None where all ranks try one candidate at a time together.
        at_once: candidates of a full wave, at most as many as ranks.
    """

    def __init__(
        self, ranks: Ranks, model: nn.Module | None, at_once: int, device: torch.device
    ) -> None:
        self._ranks, self._model, self._device = ranks, model, device
        self._at_once = at_once
        self._rows = ranks.size // at_once
        self._apart = contextlib.ExitStack()  # in which gradients are not averaged
        self._random: dict[str, Any] | None = None  # of the trials of this stage
        weakref.finalize(self, self._apart.close)

    @property
    def are_apart(self) -> bool:
        """Whether ranks try candidates of their own."""
        return self._model is not None

    def slot(self, width: int) -> int:
        """Returns which candidate of a wave of `width` this rank tries."""
        return self._ranks.rank % self._at_once % width

    def weight(self, width: int) -> float:
        """Returns by how much this rank's losses count among those of its candidate."""
        rank = self._ranks.rank
        counts = rank < self._rows * self._at_once and rank % self._at_once < width
        return 1.0 / self._rows if counts else 0.0

    def part(self, candidates: Tensor) -> Tensor:
        """Returns this rank's of a wave's candidates, (n,), for which gradients are not averaged.

        That is so from the next forward pass on.
        """
        self.join()
        if self._model is not None:
            self._apart.enter_context(self._model.no_sync())  # type: ignore[operator]
        return candidates[self.slot(len(candidates))]

    def join(self) -> None:
        """Averages gradients again, from the next forward pass on."""
        self._apart.close()

    def share(self, batch: Any) -> Any:
        """Returns the batch of the row's first rank; the host waits."""
        firsts = [row * self._at_once for row in range(self._rows)]
        shared = self._ranks.host_share(batch, firsts, self._device)
        return shared[min(self._ranks.rank // self._at_once, self._rows - 1)]

    def pair_random(self, is_new: bool) -> None:
        """Lets trials that run at once, and those after them, draw equal random numbers.

        Args:
            is_new: whether a stage begins, with the first rank's generators; the host then waits.
        """
        if is_new:
            (self._random,) = self._ranks.host_share(_own_random(self._device), [0], self._device)
        assert self._random is not None
        set_random_state(_as_own(self._random, self._device))

    def state_dict(self) -> tuple[dict[str, Any]] | None:
        return ({"random": self._random},) if self.are_apart else None

    def load_state_dict(self, state: tuple[dict[str, Any]] | None) -> None:
        if state is not None:
            random = state[0]["random"]
            self._random = None if random is None else on_host(random)


def _own_random(device: torch.device) -> dict[str, Any]:
    """Returns the random state with the generator of `device` as that of the only GPU."""
    state = random_state()
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {**state, "cuda": cuda}


def _as_own(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns the present random state of all GPUs with that of another rank's for `device`."""
    own = random_state()["cuda"]
    if state["cuda"] and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        own[index] = state["cuda"][0]
    return {**state, "cuda": own}
