"""Memory for copies of the training state, beside it or in page-locked host memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrs_ext.autolrs.live_state import copied, is_like, tensors_in

PLACEMENTS = ("device", "pinned")
_MEMORY_ERRORS = (MemoryError, RuntimeError)  # torch.OutOfMemoryError is the latter


class CopyMemory:
    """The copies, whose memory is taken once and kept.

    Args:
        placement: "device", beside each tensor, or "pinned", in page-locked host memory, where
            only the states of extra objects that are no modules stay beside them.

    Attributes:
        tensors: copies of tensors, by name.
        homes: where training has what a copy is of.
        extra: copies of the states that are not copied tensor by tensor.

    Raises:
        ValueError: there is no such placement.
    """

    def __init__(self, placement: str) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"snapshot must be one of {PLACEMENTS}, got {placement!r}")
        self._placement = placement
        self.tensors: dict[str, Tensor] = {}
        self.homes: dict[str, torch.device] = {}
        self.extra: dict[int | str, Any] = {}

    @property
    def nbytes(self) -> int:
        return _bytes([*self.tensors.values(), *tensors_in(self.extra)])

    def wait(self) -> None:
        """Waits for what devices still copy to and from host memory, before the host uses it."""
        for device in {self.homes[name] for name, t in self.tensors.items() if t.is_pinned()}:
            torch.cuda.synchronize(device)

    def at_home(self, name: str) -> Tensor:
        """Returns a new tensor where training has it, with the values of its copy."""
        empty = torch.empty_like(self.tensors[name], device=self.homes[name])
        return empty.copy_(self.tensors[name], non_blocking=True)

    def reserve(
        self,
        tensors: dict[str, Tensor],
        homes: dict[str, torch.device],
        states: dict[int | str, Any],
    ) -> None:
        """Takes the memory for copies of tensors that do not have any yet, and copies `states`.

        Args:
            homes: where training has, or will have, each tensor.
        """
        missing = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in self.tensors
            or not is_like(self.tensors[name], tensor)
            or self.homes[name] != homes[name]
        }
        _check_overlaps(missing)
        extra = list(tensors_in(states))
        needed = _bytes([*missing.values(), *extra])
        try:
            host = [t for n, t in missing.items() if self._device(homes[n]).type == "cpu"]
            host += [tensor for tensor in extra if tensor.device.type == "cpu"]
            if host and _bytes(host) > (available := available_host_memory()):
                raise MemoryError(f"{available:,} bytes of host memory are available")
            for name, tensor in missing.items():
                self.tensors.pop(name, None)
                home, device = homes[name], self._device(homes[name])
                self.homes[name] = home
                self.tensors[name] = torch.empty_like(
                    tensor, device=device, pin_memory=device != home
                )
            if states:
                self.extra = {key: copied(state) for key, state in states.items()}
        except _MEMORY_ERRORS as error:
            self.tensors.clear()
            self.extra.clear()
            way_out = (
                'snapshot="pinned" keeps it in host memory, or take a smaller model'
                if self._placement == "device"
                else "it needs more host memory or a smaller model"
            )
            raise RuntimeError(
                f"the copy of the training state takes {needed:,} bytes, which do not fit: {error}."
                f" AutoLRS rolls back to it after every trial; {way_out}"
            ) from error

    def _device(self, home: torch.device) -> torch.device:
        """Returns where the copy is of a tensor that training has on `home`."""
        is_moved = self._placement == "pinned" and home.type == "cuda"
        return torch.device("cpu") if is_moved else home


def available_host_memory() -> int:
    """Returns how many bytes the host can still give, as far as the system says."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**63 - 1


def _check_overlaps(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if any(
            n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, is expanded: "
                "its elements share memory and cannot be rolled back; make it with .clone() or "
                ".contiguous()"
            )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
