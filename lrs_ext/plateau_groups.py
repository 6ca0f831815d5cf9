"""Learning rates, one a parameter group, that are read and written on the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrs_ext.autolrs.rates import check_optimizer, usable_lr, warn_of_waiting
from lrs_ext.drivers import check_num_groups
from lrs_ext.host_copy import HostCopy
from lrs_ext.param_devices import first_device
from lrs_ext.positions import Group
from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.wrappers import whole_optimizer


def groups_of(optimizer: torch.optim.Optimizer) -> Groups:
    """Returns the learning rates of `optimizer`, in the way that suits it.

    Raises:
        TypeError, ValueError: see `check_optimizer` and `ScheduledOptimizer.reserve_`; or another
            optimizer writes the learning rates.
    """
    check_optimizer(optimizer)
    if whole_optimizer(optimizer) is not None:
        raise TypeError(
            "ZeroRedundancyOptimizer writes its own learning rates into the optimizer that has a "
            "rank's states: pass the ZeroRedundancyOptimizer itself"
        )
    if isinstance(optimizer, ScheduledOptimizer):
        return BufferGroups(optimizer)
    return TensorGroups(optimizer)


class Groups:
    """The learning rates of an optimizer's groups.

    Something else that the host puts into a ``group["lr"]`` is in charge until the next `read`,
    which takes it over.

    Attributes:
        device: where `read` puts its result.
    """

    device: torch.device

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Weak: the optimizer holds what it calls back.
        self._weak_optimizer: Callable[[], Any] = weakref.ref(optimizer)
        self._num_groups = len(optimizer.param_groups)

    def read(self) -> Tensor:
        """Returns what the next update of each group will use: float64, (groups,), without a sync.

        Raises:
            RuntimeError: there are more groups now.
            ValueError: a schedule or a tensor is in charge of a group of an `lrs_ext` optimizer.
        """
        raise NotImplementedError

    def write(self, lrs: Tensor) -> None:
        """Makes the next updates use `lrs`, float64, (groups,), without a sync."""
        raise NotImplementedError

    def show(self) -> None:
        """Shows on the host what the device uses; waits for it."""

    @property
    def _optimizer(self) -> Any:
        return self._weak_optimizer()

    def _param_groups(self) -> list[Group]:
        groups: list[Group] = self._optimizer.param_groups
        check_num_groups(groups, self._num_groups, "ReduceOnPlateau")
        return groups


class BufferGroups(Groups):
    """Rows of an `lrs_ext` optimizer's schedule buffer."""

    def __init__(self, optimizer: ScheduledOptimizer) -> None:
        super().__init__(optimizer)
        optimizer.reserve_(1)
        self.device = optimizer.schedule_buffer.step.device
        lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._lrs = torch.tensor(lrs, dtype=torch.float64).to(self.device)
        self._copy: HostCopy | None = None
        optimizer.drive_(self._put)

    def read(self) -> Tensor:
        groups, optimizer = self._param_groups(), self._optimizer
        driven = optimizer.driven_groups()
        if len(driven) < len(groups):
            optimizer.reserve_(1)
            for index, group in enumerate(groups):
                if index not in driven:
                    self._lrs[index].fill_(float(group["lr"]))
            optimizer.drive_(self._put)
        return self._lrs

    def write(self, lrs: Tensor) -> None:
        self._show_what_is_here()
        self._lrs.copy_(lrs)
        self._put()
        self._copy = HostCopy(self._lrs)
        self._show_what_is_here()

    def show(self) -> None:
        if self._copy is not None:
            self._copy = None
            self._show(self._lrs.tolist())

    def _put(self) -> None:
        self._optimizer.write_driven_(self._lrs.unsqueeze(1))

    def _show_what_is_here(self) -> None:
        if self._copy is not None and self._copy.is_here:
            lrs, self._copy = self._copy.read_all(), None
            self._show(lrs)

    def _show(self, lrs: list[float]) -> None:
        if lrs != [group["lr"] for group in self._optimizer.param_groups]:
            self._optimizer.show_(lrs)


class TensorGroups(Groups):
    """Tensors that a `torch.optim` optimizer has in ``group["lr"]``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        warn_of_waiting(optimizer)
        self.device = first_device(optimizer)
        self._tensors: list[Tensor | None] = [None] * self._num_groups
        self.read()

    def read(self) -> Tensor:
        tensors: list[Tensor] = []
        for group, present in zip(self._param_groups(), self._tensors, strict=True):
            if group["lr"] is not present or present is None:
                group["lr"] = usable_lr(group, self.device, tensors)
            tensors.append(group["lr"])
        self._tensors = list(tensors)
        lrs = [t.detach().reshape(()).to(self.device, torch.float64) for t in tensors]
        return torch.stack(lrs)

    def write(self, lrs: Tensor) -> None:
        for tensor, lr in zip(self._tensors, lrs, strict=True):
            assert tensor is not None
            tensor.copy_(lr, non_blocking=True)
