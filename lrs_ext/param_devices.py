"""The parameters of an optimizer and their devices, and how numbers get from one to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def params_of(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """Returns the parameters of all groups."""
    return [param for group in groups for param in group["params"]]


def device_of(param: Tensor) -> torch.device:
    """Returns the device whose tables a parameter belongs to."""
    return param.device


def first_device(optimizer: torch.optim.Optimizer) -> torch.device:
    """Returns where the first parameter is, in whichever group.

    Raises:
        ValueError: there is none.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            device: torch.device = param.device
            return device
    raise ValueError(
        f"{type(optimizer).__name__} has no parameters to train: give them to it first"
    )


def devices_of(params: Iterable[Tensor]) -> list[torch.device]:
    """Returns the devices of `params`, that of the first one first; the CPU if there are none."""
    return list(dict.fromkeys(map(device_of, params))) or [torch.device("cpu")]


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on `device`, for a kernel that is launched next.

    The host waits only where a number goes from an accelerator to the CPU, whose kernel runs at
    once: a copy without waiting would let it read what is not there yet. What is in host memory is
    taken as it is now, also from page-locked memory, which only a CUDA graph reads later.
    """
    if tensor.is_cpu and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        tensor = tensor.clone()
    return tensor.to(device, non_blocking=device.type != "cpu")


def read_all(numbers: Sequence[Tensor]) -> list[float]:
    """Returns the values of one-element tensors; waits once for each device."""
    values = [0.0] * len(numbers)
    for device in dict.fromkeys(number.device for number in numbers):
        indices = [i for i, number in enumerate(numbers) if number.device == device]
        found = torch.stack([_scalar(numbers[i]) for i in indices]).tolist()
        for index, value in zip(indices, found, strict=True):
            values[index] = value
    return values


def _scalar(number: Tensor) -> Tensor:
    return number if number.dim() == 0 else number.reshape(())
