"""How a learning rate that only the device knows reaches the optimizer, without a sync."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lrs_ext.autolrs.shapes import Shape
from lrs_ext.drivers import check_num_groups
from lrs_ext.host_copy import HostCopy
from lrs_ext.param_devices import first_device
from lrs_ext.positions import Group
from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.wrappers import is_zero_redundancy, whole_optimizer


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Checks that `optimizer` can follow a learning rate that only the device knows.

    Raises:
        TypeError: it is no optimizer, or its `step` needs a closure: that is many evaluations, not
            one update.
        ValueError: ``foreach=True``, which torch serves with a number from the host only.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"the first argument must be an optimizer, got {name}")
    if isinstance(optimizer, ScheduledOptimizer):
        return
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"the step of {name} needs a closure, which it evaluates as often as it likes: "
            "take an optimizer whose step is one update, such as torch.optim.AdamW"
        )
    for group in optimizer.param_groups:
        if group.get("foreach") and not group.get("capturable"):
            raise ValueError(
                "lr as a Tensor, which is written on the device, is not supported for "
                f"capturable=False and foreach=True: make {name} without foreach=True"
            )


def check_whole(optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError if its states or its learning rates are another optimizer's affair."""
    if is_zero_redundancy(optimizer) or whole_optimizer(optimizer) is not None:
        raise TypeError(
            "AutoLRS does not serve ZeroRedundancyOptimizer, which writes its own learning rates "
            "into the optimizer that has a rank's states: use an optimizer of all parameters, or "
            "fully_shard"
        )


def rates_of(optimizer: torch.optim.Optimizer, ratios: Sequence[float], capacity: int) -> Rates:
    """Returns what writes the learning rates of `optimizer` for up to `capacity` updates.

    Raises:
        TypeError, ValueError: see `check_optimizer` and `ScheduledOptimizer.reserve_`.
    """
    check_optimizer(optimizer)
    if isinstance(optimizer, ScheduledOptimizer):
        return BufferRates(optimizer, ratios, capacity)
    return TensorRates(optimizer, ratios)


class Rates:
    """The learning rates of an optimizer: ``rate * ratio[group] * shape[updates]``.

    Something else that the host puts into a ``group["lr"]`` takes over from the next update, for as
    long as it is there, in a resumed run too. Putting back what was found there hands back.

    Attributes:
        rate: float64, 0-d, on the parameters' device: that of the first group.
        updates: followed by `advance` since the last `write`, whatever has been rolled back.

    Raises:
        RuntimeError: from all methods that write, before they do: there are more groups now.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ratios: Sequence[float]) -> None:
        # Weak: the optimizer holds what it calls back.
        self._weak_optimizer: Callable[[], Any] = weakref.ref(optimizer)
        self._device = first_device(optimizer)
        self.set_ratios(ratios)
        self._shape = Shape(torch.ones(1, dtype=torch.float64, device=self._device), lambda _: 1.0)
        self._taken_over: dict[int, Any] = {}  # in a loaded state, until the next update
        self.rate = torch.ones((), dtype=torch.float64, device=self._device)
        self.updates = 0

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "AutoLRS can be neither copied nor pickled, as the copy would drive the optimizer of "
            "the original: save auto.state_dict(), and load it into an AutoLRS made anew"
        )

    def write(self, rate: Tensor, shape: Shape) -> None:
        """Makes the next updates follow ``rate * shape``."""
        self.check_groups()
        self.rate.copy_(rate)
        self._shape = shape
        self.updates = 0
        self._begin()
        self._put()

    def scale_(self, factor: Tensor) -> None:
        """Multiplies the rates of the last `write` by `factor`, 0-d."""
        self.check_groups()
        self.rate.mul_(factor)
        self._put()

    def set_ratios(self, ratios: Sequence[float]) -> None:
        """Takes other ratios between the groups, from the next `write` or `attach` on."""
        self._ratios = list(ratios)
        self._ratio_tensor = torch.tensor(ratios, dtype=torch.float64).to(self._device)

    def advance(self) -> None:
        """Follows an update, also one that was skipped or replayed in a CUDA graph."""
        self.check_groups()
        self._taken_over.clear()
        self.updates += 1
        self._follow()

    def show(self) -> None:
        """Shows the rates on the host, from when they have arrived there to the next `write`."""

    def attach(self) -> None:
        """Takes the learning rates over after a checkpoint was loaded, which has put others there.

        May wait for the device.
        """
        self.check_groups()
        self._claim()
        self._put()
        for index, lr in self._taken_over.items():
            self._groups[index]["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        return {
            "rate": self.rate.clone(),
            "updates": self.updates,
            "taken_over": tuple(
                (index, lr.detach().clone() if isinstance(lr, Tensor) else float(lr))
                for index, lr in self._others().items()
            ),
        }

    def load_state_dict(self, state: dict[str, Any], shape: Shape) -> None:
        self.rate.copy_(state["rate"])
        self.updates = state["updates"]
        self._taken_over = dict(state["taken_over"])
        self._shape = shape
        self.attach()

    @property
    def _shape_now(self) -> Tensor:
        values = self._shape.values
        return values[min(self.updates, len(values) - 1)]

    @property
    def _groups(self) -> list[Group]:
        optimizer: torch.optim.Optimizer = self._weak_optimizer()
        return optimizer.param_groups

    def check_groups(self) -> None:
        """Raises RuntimeError if the optimizer has other parameter groups than at the start."""
        check_num_groups(self._groups, len(self._ratios), "AutoLRS")

    def written_by_others(self) -> set[int]:
        """Returns the groups whose learning rate somebody else has written, as the host sees it."""
        return set(self._others())

    def _others(self) -> dict[int, Any]:
        """Returns what the host has put into the groups that it has taken over."""
        raise NotImplementedError

    def _claim(self) -> None:
        """Makes the optimizer read what is written here, in every group."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Follows the start of a `write`."""

    def _follow(self) -> None:
        """Follows an update."""
        raise NotImplementedError

    def _put(self) -> None:
        """Writes the rates to where the optimizer reads them."""
        raise NotImplementedError


class BufferRates(Rates):
    """Writes the rows of an `lrs_ext` optimizer's schedule buffer: once for all updates to come.

    Raises:
        ValueError: a schedule or a tensor is in charge of a group.
    """

    def __init__(
        self, optimizer: ScheduledOptimizer, ratios: Sequence[float], capacity: int
    ) -> None:
        super().__init__(optimizer, ratios)
        step = optimizer.schedule_buffer.step
        self._capacity = int(step) + capacity
        self._start = step.to(self._device, copy=True)  # the optimizer's step at the last `write`
        self._known: HostCopy | None = None  # the rate on its way to the host
        self._host_rate: float | None = None  # as far as it has arrived there
        self._shown: float | None = None  # by the first group; None while the device alone knows
        self._steps_seen = optimizer.committed_steps
        self._is_ahead = False  # whether the rows may be ahead of the run, but for the next update
        optimizer.reserve_(self._capacity)
        optimizer.drive_(self._refill)
        self._positions = self._all_positions()

    def scale_(self, factor: Tensor) -> None:
        super().scale_(factor)
        self._known = HostCopy(self.rate)

    def show(self) -> None:
        if self._known is not None and self._known.is_here:
            self._host_rate, self._known = self._known.read(), None
            self._show_now()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "start": self._start.clone(),
            "capacity": self._capacity,
            "shown": self._shown,
        }

    def load_state_dict(self, state: dict[str, Any], shape: Shape) -> None:
        self._start.copy_(state["start"])
        self._capacity = state["capacity"]
        self._host_rate, self._shown = None, state["shown"]
        super().load_state_dict(state, shape)
        self._known = HostCopy(self.rate)

    @property
    def _buffered(self) -> ScheduledOptimizer:
        optimizer: ScheduledOptimizer = self._weak_optimizer()
        return optimizer

    def _others(self) -> dict[int, Any]:
        driven = self._buffered.driven_groups()
        return {i: g["lr"] for i, g in enumerate(self._groups) if i not in driven}

    def _claim(self) -> None:
        optimizer = self._buffered
        optimizer.drive_(self._refill)
        optimizer.reserve_(self._capacity)
        self._steps_seen = optimizer.committed_steps
        self._show_lrs()

    def _begin(self) -> None:
        self._start.copy_(self._buffered.schedule_buffer.step, non_blocking=True)
        self._known = HostCopy(self.rate)
        self._host_rate = self._shown = None

    def _follow(self) -> None:
        optimizer = self._buffered
        steps, self._steps_seen = self._steps_seen, optimizer.committed_steps
        missed = self._steps_seen - steps - 1
        has_missed = missed != 0 and not optimizer.was_captured
        if optimizer.may_have_skipped or self._is_ahead or has_missed:
            # A skipped update counts, as it does in the rest of the run, but not on the device.
            self._start.copy_(optimizer.schedule_buffer.step - self.updates)
            if has_missed:
                self._put()
            else:
                self._put_next()
        self._show_now()

    def _show_now(self) -> None:
        rate = self._host_rate
        self._shown = None if rate is None else rate * self._shape.at(self.updates)
        self._show_lrs()

    def _show_lrs(self) -> None:
        if self._shown is not None:
            self._buffered.show_([self._shown * ratio for ratio in self._ratios])

    def _refill(self) -> None:
        self.check_groups()
        self._put()
        self._show_lrs()

    def _put(self) -> None:
        optimizer = self._buffered
        if len(self._positions) != optimizer.schedule_buffer.capacity:
            self._positions = self._all_positions()
        shape = self._shape.values
        since = (self._positions - self._start).clamp_(0, len(shape) - 1)
        heights = (self.rate * self._ratio_tensor).unsqueeze(1)
        optimizer.write_driven_(heights * shape.index_select(0, since))
        self._is_ahead = False

    def _put_next(self) -> None:
        """Writes what the next update reads: nobody knows yet where those after it will read."""
        values = self.rate * self._ratio_tensor * self._shape_now
        for index in self._buffered.driven_groups():
            self._buffered.schedule_buffer.write_(index, values[index], steps=1)
        self._is_ahead = True

    def _all_positions(self) -> Tensor:
        return torch.arange(self._buffered.schedule_buffer.capacity, device=self._device)


class TensorRates(Rates):
    """Writes tensors that a `torch.optim` optimizer has in ``group["lr"]``, before every update.

    Warns:
        UserWarning: the optimizer waits for the device at every step to read them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ratios: Sequence[float]) -> None:
        super().__init__(optimizer, ratios)
        warn_of_waiting(optimizer)
        self._lrs: list[Tensor] = []
        for group in optimizer.param_groups:
            self._lrs.append(usable_lr(group, self._device, self._lrs))
        self._versions = [lr._version for lr in self._lrs]  # grow when somebody writes in place
        self._claim()

    def written_by_others(self) -> set[int]:
        pairs = enumerate(zip(self._lrs, self._versions, strict=True))
        return super().written_by_others() | {i for i, (lr, v) in pairs if lr._version != v}

    def _others(self) -> dict[int, Any]:
        pairs = enumerate(zip(self._groups, self._lrs, strict=True))
        return {index: group["lr"] for index, (group, lr) in pairs if group["lr"] is not lr}

    def _claim(self) -> None:
        for group, lr in zip(self._groups, self._lrs, strict=True):
            group["lr"] = lr

    def _follow(self) -> None:
        self._put()

    def _put(self) -> None:
        now = self.rate * self._shape_now
        for group, lr, ratio in zip(self._groups, self._lrs, self._ratios, strict=True):
            if group["lr"] is lr:
                lr.copy_(now * ratio, non_blocking=True)
        self._versions = [lr._version for lr in self._lrs]


def usable_lr(group: Group, device: torch.device, used: list[Tensor]) -> Tensor:
    """Returns the group's own learning rate if it can be written to, else a tensor in its place."""
    lr = group["lr"]
    if group["params"]:
        device = group["params"][0].device
    if (
        isinstance(lr, Tensor)
        and lr.is_floating_point()
        and lr.device == device
        and not lr.requires_grad
        and not any(lr is other for other in used)
    ):
        return lr
    return torch.full((), float(lr), dtype=torch.float32, device=device)


def warn_of_waiting(optimizer: torch.optim.Optimizer) -> None:
    """Warns if the optimizer will wait for the device to read a learning rate that is there."""
    for index, group in enumerate(optimizer.param_groups):
        if not _is_on_gpu(group) or group.get("fused") or group.get("capturable"):
            continue
        options = [f"{name}=True" for name in ("fused", "capturable") if name in group]
        warnings.warn(
            f"{type(optimizer).__name__} will wait for the GPU at every step, to read the learning "
            f"rate of group {index}, which is kept there: "
            f"{'give it ' + ' or '.join(options) if options else 'take an optimizer of lrs_ext'}",
            stacklevel=5,
        )
        return


def _is_on_gpu(group: Group) -> bool:
    return any(param.is_cuda for param in group["params"])
