"""What a copy of the training state has of parameters that are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrs_ext.autolrs.live_state import LiveState, kind, param_index
from lrs_ext.param_devices import params_of
from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.shards import is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def spread_tensors(live: LiveState, copies: Mapping[str, Tensor]) -> dict[str, DTensor]:
    """Returns the DTensors among what is copied, and parameters in place of states to come."""
    tensors, params = live.tensors(), live.params
    for name, part in copies.items():
        if name not in tensors and kind(name) == "state":
            param = params[param_index(name)]
            if part.dim() > 0 and part.shape == local(param).shape:
                tensors[name] = param
    return {name: tensor for name, tensor in tensors.items() if is_dtensor(tensor)}


def converted_states(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    convert: Callable[[ScheduledOptimizer, Tensor, dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Returns what `convert` makes of the arrays of each parameter that is a DTensor.

    An optimizer of `lrs_ext` may keep them in blocks of each rank's part.
    """
    if not isinstance(optimizer, ScheduledOptimizer):
        return {}
    converted: dict[str, Tensor] = {}
    for index, param in enumerate(params_of(optimizer.param_groups)):
        if is_dtensor(param):
            prefix = f"state {index} "
            arrays = {n: t for n, t in tensors.items() if n.startswith(prefix) and t.dim() > 0}
            arrays = {n.removeprefix(prefix): t.to(param.device) for n, t in arrays.items()}
            arrays = convert(optimizer, param, arrays)
            converted |= {prefix + name: array for name, array in arrays.items()}
    return converted


def arrays_of_parts(
    names: Iterable[str], copies: Mapping[str, Tensor], params: list[Tensor]
) -> set[str]:
    """Returns which names are of arrays of one rank's part, such as scales of its blocks.

    A DTensor says itself whose part it is.
    """
    states = {name for name in names if kind(name) == "state" and name in copies}
    arrays = {name for name in states if copies[name].dim() > 0}
    return {name for name in arrays if is_dtensor(params[param_index(name)])}


def numbers_of_parts(params: list[Tensor]) -> Tensor:
    """Returns numbers of which each part of the parameters has others.

    In a file of another rank they are that rank's.
    """
    numbers = torch.arange(1 << 12, dtype=torch.int32)
    for param in params:
        if is_dtensor(param):
            from torch.distributed.tensor import Replicate, Shard, distribute_tensor

            placements = [Shard(0) if p.is_shard() else Replicate() for p in param.placements]
            numbers = numbers.to(param.device)
            return distribute_tensor(numbers, param.device_mesh, placements, src_data_rank=None)
    return numbers


def is_same_part(numbers: Tensor, params: list[Tensor]) -> bool:
    """Returns whether saved `numbers_of_parts` are of the part that this rank has.

    Plain ones say nothing of it.
    """
    if not is_dtensor(numbers):
        return True
    first, second = local(numbers), local(numbers_of_parts(params))
    return first.shape == second.shape and torch.equal(first, second.to(first.device))
