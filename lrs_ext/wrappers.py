"""Optimizers around optimizers: what frameworks hand out instead of the one they were given."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable

import torch

from lrs_ext.param_devices import params_of

# Looking for one goes through all objects there are: once for each optimizer.
_whole_optimizers: weakref.WeakKeyDictionary[
    torch.optim.Optimizer, Callable[[], torch.optim.Optimizer | None]
] = weakref.WeakKeyDictionary()


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns the optimizer that does the work.

    Accelerate's `AcceleratedOptimizer` and Lightning's `LightningOptimizer` keep it as their
    attribute `optimizer`.
    """
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def is_zero_redundancy(optimizer: object) -> bool:
    """Returns whether it is a ZeroRedundancyOptimizer, with an optimizer of its own inside."""
    kind = _zero_redundancy()
    return kind is not None and issubclass(type(optimizer), kind)


def whole_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """Returns the ZeroRedundancyOptimizer that has given `optimizer` its share, if one has.

    The share is this rank's; the whole has all parameters, with their gradients.
    """
    if _zero_redundancy() is None or not torch.distributed.is_initialized():
        return None
    if optimizer not in _whole_optimizers:
        wholes = filter(is_zero_redundancy, gc.get_objects())
        found = next((w for w in wholes if getattr(w, "optim", None) is optimizer), None)
        _whole_optimizers[optimizer] = (lambda: None) if found is None else weakref.ref(found)
    return _whole_optimizers[optimizer]()


def others_have_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether a step of `optimizer` is a part of one with gradients on other ranks only."""
    whole = whole_optimizer(optimizer)
    if whole is None:
        return not params_of(optimizer.param_groups)
    return any(param.grad is not None for param in params_of(whole.param_groups))


def _zero_redundancy() -> type | None:
    """Returns the class, None if nobody has imported it, which costs too much for all others."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return getattr(module, "ZeroRedundancyOptimizer", None)
