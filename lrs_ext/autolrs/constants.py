"""Parameters that training leaves alone, and whether it does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lrs_ext.host_copy import HostCopy


class Constants:
    """Frozen parameters, of which nobody keeps a copy, only a sum of their bits.

    A version counter would not do: what is written through ``.data``, as many a target network is,
    does not count, and what is written again as it was does.

    Attributes:
        names: of the parameters that were noted last.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._sums: dict[str, Tensor] = {}  # int64, 0-d, where the parameters are
        self._on_their_way: list[tuple[list[str], HostCopy]] = []

    def note(self, params: dict[str, Tensor]) -> None:
        """Takes parameters for constants, in place of all others, without a sync."""
        self.names = set(params)
        self._sums = {name: _bit_sum(param) for name, param in params.items() if _has_bits(param)}

    def forget(self) -> None:
        """Expects nothing of any parameter."""
        self.names.clear()
        self._sums.clear()
        self._on_their_way.clear()

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Compares what is noted with `tensors`; who calls it does not wait for the device.

        Raises:
            RuntimeError: one has changed, as far as the host knows by now.
        """
        by_device: dict[torch.device, list[str]] = {}
        for name, noted in self._sums.items():
            if name in tensors and tensors[name].device == noted.device:
                by_device.setdefault(noted.device, []).append(name)
        for names in by_device.values():
            now = torch.stack([_bit_sum(tensors[name]) for name in names])
            has_changed = now != torch.stack([self._sums[name] for name in names])
            order = torch.arange(len(names), dtype=torch.float64, device=now.device)
            first = torch.where(has_changed, order, float(len(names))).min()
            self._on_their_way.append((names, HostCopy(first)))
        while self._on_their_way and self._on_their_way[0][1].is_here:
            names, found = self._on_their_way.pop(0)
            index = int(found.read())
            if index < len(names):
                raise RuntimeError(
                    f"{names[index]} has changed since the training state was copied. It requires "
                    "no gradient and is in no parameter group, so AutoLRS has no copy to roll "
                    "back to: pass the module that it is in, such as a target network, in "
                    "extra_state, or, if a checkpoint was loaded, make AutoLRS after that"
                )


def _has_bits(param: Tensor) -> bool:
    is_plain = not (is_traceable_wrapper_subclass(param) or param.is_quantized)
    return is_plain and not param.is_meta


def _bit_sum(param: Tensor) -> Tensor:
    """Returns the sum of a parameter's memory in words of 8 bytes, modulo 2**64, int64, 0-d."""
    memory = param.detach().contiguous().view(-1).view(torch.uint8)
    words = memory[: len(memory) // 8 * 8]
    if words.storage_offset() % 8:
        words = words.clone()
    return words.view(torch.int64).sum() + memory[len(words) :].sum()
