"""Decay on plateau, decided on the device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lrs_ext.capture_checks import check_outside
from lrs_ext.drivers import check_free, register
from lrs_ext.number_checks import (
    checked_count,
    checked_learning_rate,
    checked_number,
    checked_real,
)
from lrs_ext.param_devices import on_device
from lrs_ext.plateau_groups import Groups, groups_of
from lrs_ext.wrappers import unwrapped


class ReduceOnPlateau:
    """Multiplies the learning rates by `factor` where a metric stops improving.

    `torch.optim.lr_scheduler.ReduceLROnPlateau` with the same arguments and decisions, but the
    metric may be on the device: `step` does not wait for it. On an optimizer of `lrs_ext` it writes
    the schedule buffer, on one of torch the tensors that it puts into ``group["lr"]``. A float that
    the host puts there is what the next reduction starts from.

    Args:
        optimizer: with floats (or, if it is of torch, tensors) as learning rates.
        mode: "min" or "max": which metric is better.
        factor: in [0, 1): of each reduction.
        patience: how many steps without an improvement are let pass.
        threshold: what counts as an improvement, by `threshold_mode` "rel" or "abs".
        cooldown: steps after a reduction in which nothing counts as a plateau.
        min_lr: the floor, one for all groups or a list with one for each.
        eps: a reduction by no more than this is left out.

    Raises:
        TypeError, ValueError: an argument is out of range, or a schedule is in charge of a group.
        RuntimeError: something else drives the optimizer.

    Source: the baseline "decay on plateau" of arXiv 2107.04197.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        optimizer = unwrapped(optimizer)
        if mode not in ("min", "max"):
            raise ValueError(f"mode {mode} is unknown!")
        if threshold_mode not in ("rel", "abs"):
            raise ValueError(f"threshold mode {threshold_mode} is unknown!")
        self.optimizer = optimizer
        self.mode, self.threshold_mode = mode, threshold_mode
        self.factor = checked_real("factor", factor)
        if self.factor >= 1.0:
            raise ValueError("Factor should be < 1.0.")
        if self.factor < 0.0:
            raise ValueError(f"factor must not be negative, got {factor}")
        self.patience = checked_count("patience", patience)
        self.threshold = checked_real("threshold", threshold)
        self.cooldown = checked_count("cooldown", cooldown)
        self.eps = checked_real("eps", eps)
        floors = _floors(min_lr, len(optimizer.param_groups))
        self._drive()
        device = self._groups.device
        self._floors = torch.tensor(floors, dtype=torch.float64).to(device)
        worst = math.inf if mode == "min" else -math.inf
        self._best = torch.full((), worst, dtype=torch.float64, device=device)
        self._num_bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._cooldown_left = torch.zeros((), dtype=torch.int64, device=device)

    def _drive(self) -> None:
        """Takes charge of the optimizer's learning rates."""
        check_free(self.optimizer)
        self._groups = groups_of(self.optimizer)
        groups = weakref.ref(self._groups)
        handle = self.optimizer.register_state_dict_pre_hook(lambda _: _show(groups()))
        weakref.finalize(self, handle.remove)
        register(self.optimizer, self)

    def __getstate__(self) -> dict[str, Any]:
        """As torch's schedulers: a copy drives a copy of the optimizer."""
        state = {name: value for name, value in vars(self).items() if name != "_groups"}
        return {**state, "_lrs": self._groups.read().clone()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        lrs = state["_lrs"]
        vars(self).update({name: value for name, value in state.items() if name != "_lrs"})
        self._drive()
        self._groups.write(lrs)

    def step(self, metric: Tensor | float) -> None:
        """Takes a metric and reduces the learning rates if it is time; never waits for the device.

        Args:
            metric: a number or a one-element tensor. NaN is no improvement. The host waits for one
                that is on a GPU only where the parameters are on the CPU.

        Raises:
            TypeError: it is no number.
            ValueError: it has more than one element, or a schedule is now in charge of a group.
            RuntimeError: the optimizer has other parameter groups than at the start, or a CUDA
                graph is being captured.

        >>> import lrs_ext
        >>> opt = lrs_ext.SGD([torch.zeros(2, requires_grad=True)], lr=0.5)
        >>> plateau = lrs_ext.ReduceOnPlateau(opt, factor=0.5, patience=1)
        >>> for metric in (1.0, 1.0, 1.0, 1.0):
        ...     plateau.step(torch.tensor(metric))
        >>> opt.current_lr()
        [0.25]
        """
        check_outside("ReduceOnPlateau.step()", self._best.device)
        if not isinstance(metric, Tensor):
            metric = torch.tensor(checked_number("metric", metric), dtype=torch.float64)
        if metric.numel() != 1:
            raise ValueError(f"metric must have one element, got shape {tuple(metric.shape)}")
        lrs = self._groups.read()
        metric = on_device(metric.detach().reshape(()), self._best.device).to(self._best.dtype)
        is_due = self._is_due(metric)
        reduced = torch.maximum(lrs * self.factor, self._floors)
        is_worth_it = lrs - reduced > self.eps
        self._groups.write(torch.where(is_due & is_worth_it, reduced, lrs))

    def state_dict(self) -> dict[str, Any]:
        """Returns best metric, counters and learning rates, all on the device."""
        return {
            "best": self._best.clone(),
            "num_bad_steps": self._num_bad_steps.clone(),
            "cooldown_left": self._cooldown_left.clone(),
            "lrs": self._groups.read().clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was called, whichever is loaded first, this or the optimizer.

        Raises:
            ValueError: the state is of another number of parameter groups.
        """
        lrs = self._groups.read()
        if state_dict["lrs"].shape != lrs.shape:
            raise ValueError(
                f"the state has {len(state_dict['lrs'])} parameter groups, the optimizer {len(lrs)}"
            )
        self._best.copy_(state_dict["best"])
        self._num_bad_steps.copy_(state_dict["num_bad_steps"])
        self._cooldown_left.copy_(state_dict["cooldown_left"])
        self._groups.write(state_dict["lrs"].to(lrs))

    def _is_due(self, metric: Tensor) -> Tensor:
        """Follows a metric, float64, 0-d, and returns whether there is a plateau: bool, 0-d."""
        is_better = self._is_better(metric)
        self._best.copy_(torch.where(is_better, metric, self._best))
        num_bad = torch.where(is_better, 0, self._num_bad_steps + 1)
        is_cooling = self._cooldown_left > 0
        num_bad = torch.where(is_cooling, 0, num_bad)
        is_due = num_bad > self.patience
        self._num_bad_steps.copy_(torch.where(is_due, 0, num_bad))
        left = torch.where(is_cooling, self._cooldown_left - 1, self._cooldown_left)
        self._cooldown_left.copy_(torch.where(is_due, self.cooldown, left))
        return is_due

    def _is_better(self, metric: Tensor) -> Tensor:
        sign = -1.0 if self.mode == "min" else 1.0
        if self.threshold_mode == "rel":
            limit = self._best * (1.0 + sign * self.threshold)
        else:
            limit = self._best + sign * self.threshold
        return metric < limit if self.mode == "min" else metric > limit


def _floors(min_lr: float | Sequence[float], groups: int) -> list[float]:
    if not isinstance(min_lr, (list, tuple)):
        return [checked_learning_rate(min_lr, "min_lr")] * groups
    if len(min_lr) != groups:
        raise ValueError(f"expected {groups} min_lrs, got {len(min_lr)}")
    return [checked_learning_rate(floor, "min_lr") for floor in min_lr]


def _show(groups: Groups | None) -> None:
    if groups is not None:
        groups.show()
