"""What the next step multiplies its gradients by: a GradScaler's scale undone, a norm clipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrs_ext.capture_checks import check_together
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
        self._is_captured = False  # whether the norm is taken by a CUDA graph

    def clip(self, norm: Tensor, max_norm: float | Tensor, is_captured: bool) -> None:
        """Limits the norm of the next step's gradients, which is `norm` as they are stored."""
        self._norm, self._is_captured = norm, is_captured
        if isinstance(max_norm, Tensor):
            self._max_norm = on_device(max_norm.detach().reshape(()), norm.device).to(norm.dtype)
        else:
            self._max_norm = torch.full_like(norm, max_norm)

    def forget_capture(self) -> None:
        """Gives up the limit of a norm that is only in a graph."""
        if self._is_captured:
            self._norm = self._max_norm = None

    def take(
        self, loss_scale: Tensor | None, found_inf: Tensor | None, is_captured: bool
    ) -> GradScaling | None:
        """Returns what the step now beginning reads, None if it is nothing; the limit is used up.

        Args:
            loss_scale, found_inf: as a GradScaler hands them over, on any device.
            is_captured: whether the step is.

        Raises:
            RuntimeError: the norm was captured and the step is not, or the other way round.
        """
        norm, max_norm = self._norm, self._max_norm
        if loss_scale is None and found_inf is None and norm is None:
            return None
        self._norm = self._max_norm = None
        if norm is not None:
            check_together("clip_grad_norm_", self._is_captured, is_captured)
        return GradScaling(loss_scale, found_inf, norm, max_norm)
