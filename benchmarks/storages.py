"""The ways to keep parameters and states, and what each costs in memory and in traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCALE_BYTES = 4 / 128  # of a float32 for each 128 elements
REMAINDER_BYTES = 2


@dataclass(frozen=True)
class StorageKind:
    """One way; the options are those of the optimizers of lrs_ext."""

    name: str
    param_dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    master_weights: bool = False
    stochastic_rounding: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {
            "state_dtype": self.state_dtype,
            "master_weights": self.master_weights,
            "stochastic_rounding": self.stochastic_rounding,
        }

    @property
    def keywords(self) -> str:
        """What the user writes."""
        words = [] if self.state_dtype == torch.float32 else [f"state_dtype={self.state_dtype}"]
        words += ["master_weights=True"] if self.master_weights else []
        words += ["stochastic_rounding=True"] if self.stochastic_rounding else []
        return ", ".join(words) or "none"

    def bytes_held(self, states: int = 2) -> float:
        """Bytes of memory per parameter, without its gradient.

        Args:
            states: arrays that the optimizer keeps; AdamW's are two.

        >>> KINDS["float32, 8-bit states"].bytes_held()
        6.0625
        """
        scale = SCALE_BYTES if self.state_dtype == torch.uint8 else 0
        remainder = REMAINDER_BYTES if self.master_weights else 0
        return self.param_dtype.itemsize + remainder + states * (self.state_dtype.itemsize + scale)

    def bytes_moved(self, states: int = 2) -> float:
        """Bytes of traffic per parameter in a step: all is read, all but the gradient is written.

        >>> KINDS["float32"].bytes_moved()
        28
        """
        return self.param_dtype.itemsize + 2 * self.bytes_held(states)


def _named(*kinds: StorageKind) -> dict[str, StorageKind]:
    return {kind.name: kind for kind in kinds}


BF16, FP16, UINT8 = torch.bfloat16, torch.float16, torch.uint8
KINDS = _named(
    StorageKind("float32"),
    StorageKind("float32, bf16 states", state_dtype=BF16),
    StorageKind("float32, 8-bit states", state_dtype=UINT8),
    StorageKind("fp16 nearest", FP16),
    StorageKind("bf16 nearest", BF16),
    StorageKind("bf16 stochastic", BF16, stochastic_rounding=True),
    StorageKind("bf16 stochastic, bf16 states", BF16, BF16, stochastic_rounding=True),
    StorageKind("bf16 stochastic, 8-bit states", BF16, UINT8, stochastic_rounding=True),
    StorageKind("bf16 split", BF16, master_weights=True),
    StorageKind("bf16 split, bf16 states", BF16, BF16, master_weights=True),
    StorageKind("bf16 split, 8-bit states", BF16, UINT8, master_weights=True),
)


def measured_bytes(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Returns the bytes held and moved per parameter, from the tensors that there are.

    Parameters need gradients and states: call this between `backward()` and `zero_grad()`.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numel = sum(param.numel() for param in params)
    held = sum(param.nbytes for param in params)
    for param in params:
        # Counters have no dimension; they are one number a tensor.
        values = [v for v in optimizer.state[param].values() if isinstance(v, Tensor) and v.dim()]
        held += sum(value.nbytes for value in values)
    gradients = sum(param.grad.nbytes for param in params)
    return held / numel, (gradients + 2 * held) / numel
