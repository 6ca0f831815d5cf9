"""How a learning rate that only the device knows reaches the optimizer, without a sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrs_ext.scheduled_optimizer import ScheduledOptimizer

Group = dict[str, Any]


def group_ratios(groups: Sequence[Group]) -> list[float]:
    """Returns each group's learning rate over that of the first group.

    Raises:
        ValueError: a learning rate is no positive number.
    """
    rates = [group["lr"] for group in groups]
    for index, rate in enumerate(rates):
        is_number = isinstance(rate, (float, int)) or (
            isinstance(rate, Tensor) and rate.numel() == 1
        )
        if not is_number or not float(rate) > 0.0:
            raise ValueError(
                "AutoLRS keeps the ratios between the learning rates of the groups, so each needs "
                f"a positive one; group {index} has {rate!r}: give the optimizer lr=1e-3, say"
            )
    return [float(rate) / float(rates[0]) for rate in rates]


def rates_of(optimizer: torch.optim.Optimizer, ratios: Sequence[float], capacity: int) -> Rates:
    """Returns what writes the learning rates of `optimizer` for up to `capacity` updates."""
    if isinstance(optimizer, ScheduledOptimizer):
        return BufferRates(optimizer, ratios, capacity)
    return TensorRates(optimizer, ratios)


class Rates:
    """The learning rates of an optimizer: ``rate * ratio[group] * shape[updates since start]``.

    Attributes:
        rate: float64, 0-d, on the parameters' device: that of the first group.
        start: int64, 0-d, on the same device: the optimizer's step at the last `write`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ratios: Sequence[float]) -> None:
        self._optimizer = optimizer
        device = optimizer.param_groups[0]["params"][0].device
        self._ratios = torch.tensor(ratios, dtype=torch.float64).to(device)
        self._shape = torch.ones(1, dtype=torch.float64, device=device)
        self.rate = torch.ones((), dtype=torch.float64, device=device)
        self.start = torch.zeros((), dtype=torch.int64, device=device)

    def write(self, rate: Tensor, shape: Tensor) -> None:
        """Makes the next updates follow ``rate * shape``; the last entry of `shape` holds.

        Args:
            shape: float64, (updates,), on the parameters' device.
        """
        self.rate.copy_(rate)
        self._shape = shape
        self._begin()
        self.put()

    def scale_(self, factor: Tensor) -> None:
        """Multiplies the rates of the last `write` by `factor`, 0-d."""
        self.rate.mul_(factor)
        self.put()

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate.clone(), "start": self.start.clone()}

    def load_state_dict(self, state: dict[str, Any], shape: Tensor) -> None:
        self.rate.copy_(state["rate"])
        self.start.copy_(state["start"])
        self._shape = shape
        self.attach()

    def advance(self) -> None:
        """Follows an update."""

    def show(self, value: Callable[[int], float]) -> None:
        """Shows the rates on the host, now that they are known there.

        Args:
            value: from updates since the last `write` to the learning rate of the first group.
        """

    def attach(self) -> None:
        """Writes the rates again, after somebody else has: a loaded checkpoint, say."""
        self.put()

    def put(self) -> None:
        """Writes the rates to where the optimizer reads them."""
        raise NotImplementedError

    def _begin(self) -> None:
        raise NotImplementedError


class BufferRates(Rates):
    """Writes the rows of an `lrs_ext` optimizer's schedule buffer: once for all updates to come."""

    _optimizer: ScheduledOptimizer

    def __init__(
        self, optimizer: ScheduledOptimizer, ratios: Sequence[float], capacity: int
    ) -> None:
        super().__init__(optimizer, ratios)
        optimizer.reserve_(capacity)
        buffer = optimizer.schedule_buffer
        self._host_ratios = list(ratios)
        self._steps = torch.arange(buffer.capacity, device=buffer.values.device)
        self._host_start = 0

    def _begin(self) -> None:
        self.start.copy_(self._optimizer.schedule_buffer.step)
        self._host_start = self._optimizer.host_step
        self._optimizer.drive_(self.put)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "host_start": self._host_start}

    def load_state_dict(self, state: dict[str, Any], shape: Tensor) -> None:
        self._host_start = state["host_start"]
        super().load_state_dict(state, shape)

    def attach(self) -> None:
        self._optimizer.drive_(self.put)
        self.put()

    def put(self) -> None:
        since = (self._steps - self.start).clamp_(0, len(self._shape) - 1)
        heights = (self.rate * self._ratios).unsqueeze(1)
        self._optimizer.schedule_buffer.values.copy_(heights * self._shape.index_select(0, since))

    def show(self, value: Callable[[int], float]) -> None:
        start, ratios = self._host_start, self._host_ratios
        self._optimizer.drive_(
            self.put, lambda group, step: value(max(step - start, 0)) * ratios[group]
        )


class TensorRates(Rates):
    """Writes the tensors in ``group["lr"]`` of a `torch.optim` optimizer, before every update."""

    def __init__(self, optimizer: torch.optim.Optimizer, ratios: Sequence[float]) -> None:
        super().__init__(optimizer, ratios)
        self._updates = 0
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                lr = torch.tensor(float(group["lr"]), dtype=torch.float32)
                group["lr"] = lr.to(self.rate.device)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any], shape: Tensor) -> None:
        self._updates = state["updates"]
        super().load_state_dict(state, shape)

    def advance(self) -> None:
        self._updates += 1
        self.put()

    def _begin(self) -> None:
        self._updates = 0

    def put(self) -> None:
        now = self.rate * self._shape[min(self._updates, len(self._shape) - 1)]
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"].copy_(now * ratio)
