"""Optimizers around optimizers: what frameworks hand out instead of the one they were given."""

from __future__ import annotations

import torch


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns the optimizer that does the work.

    Accelerate's `AcceleratedOptimizer` and Lightning's `LightningOptimizer` keep it as their
    attribute `optimizer`.
    """
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer
