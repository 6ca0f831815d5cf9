"""What the next step multiplies its gradients by: a GradScaler's scale undone, a norm clipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrs_ext.param_devices import on_device


@dataclass(frozen=True)
class GradScaling:
    """What one step multiplies its gradients by: one-element float32 tensors on their device.

    Attributes:
        loss_scale: by which the loss was multiplied.
        found_inf: if not 0, the step changes nothing.
        norm, max_norm: of all gradients as they are stored, and the limit for the unscaled ones.
    """

    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None
    norm: Tensor | None = None
    max_norm: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.loss_scale, self.found_inf, self.norm, self.max_norm


class StepScaling:
    """Collects for one optimizer what its next step reads besides the gradients."""

    def __init__(self) -> None:
        self._norm: Tensor | None = None
        self._max_norm: Tensor | None = None

    def clip(self, norm: Tensor, max_norm: float | Tensor) -> None:
        """Limits the norm of the next step's gradients, which is `norm` as they are stored."""
        self._norm = norm
        if isinstance(max_norm, Tensor):
            self._max_norm = on_device(max_norm.detach().reshape(()), norm.device).to(norm.dtype)
        else:
            self._max_norm = torch.full_like(norm, max_norm)

    def take(self, loss_scale: Tensor | None, found_inf: Tensor | None) -> GradScaling | None:
        """Returns what the step now beginning reads, None if it is nothing; the limit is used up.

        Args:
            loss_scale, found_inf: as a GradScaler hands them over, on any device.
        """
        norm, max_norm = self._norm, self._max_norm
        if loss_scale is None and found_inf is None and norm is None:
            return None
        self._norm = self._max_norm = None
        return GradScaling(loss_scale, found_inf, norm, max_norm)
