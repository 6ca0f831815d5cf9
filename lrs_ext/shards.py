"""The parts of a DTensor: what this rank holds, and which ranks hold the rest.

The kernels update each rank's local tensor; a DTensor is not more than that tensor with a word on
where the others are, its placements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

PLAIN = (Tensor, torch.nn.Parameter)  # types of tensors that wrap no others


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    if type(value) in PLAIN or not is_traceable_wrapper_subclass(value):  # quick for most
        return False
    from torch.distributed.tensor import DTensor  # costs too much for programs without one

    return isinstance(value, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a DTensor, without a copy; any other tensor as it is."""
    return _local(tensor) if is_dtensor(tensor) else tensor


def _local(tensor: DTensor) -> Tensor:
    # Not to_local(), which makes another tensor of a parameter at every call.
    part = tensor._local_tensor
    if is_traceable_wrapper_subclass(part) and hasattr(part, "trigger_wait"):
        part = part.trigger_wait()  # a result on its way from another rank
    return part


def check_placements(param: Tensor, name: str) -> None:
    """Raises RuntimeError if the optimizer called `name` cannot update a parameter part by part."""
    if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
        raise RuntimeError(
            f"{name} does not support parameters with placements {param.placements}: ranks would "
            "update summands of them; make the parameter with .redistribute() to Shard or Replicate"
        )


def check_alike(params: Sequence[Tensor], name: str) -> None:
    """Raises RuntimeError if some of a group's parameters are DTensors and others are not."""
    plain = sum(not is_dtensor(param) for param in params)
    if 0 < plain < len(params):
        raise RuntimeError(
            f"a parameter group of {name} has {len(params) - plain} DTensors and {plain} plain "
            "tensors, of which nobody can say whether they are equal on all ranks: put those that "
            "are into a group of their own"
        )


def local_gradient(param: Tensor, gradient: Tensor) -> Tensor:
    """Returns this rank's part of a gradient, in the placements of its parameter.

    Where they differ, as for a replicated parameter whose gradient the ranks have yet to sum, all
    ranks exchange data.

    Raises:
        RuntimeError: one is a DTensor and the other is not, or it is on other ranks.
    """
    if is_dtensor(gradient) != is_dtensor(param):
        raise RuntimeError(
            f"a gradient is a {type(gradient).__name__}, its parameter a {type(param).__name__}: "
            "make it with torch.distributed.tensor.distribute_tensor, or take .to_local()"
        )
    if is_dtensor(gradient) and is_dtensor(param):
        if gradient.device_mesh != param.device_mesh:
            raise RuntimeError(
                f"a gradient is on {gradient.device_mesh}, its parameter on {param.device_mesh}: "
                "they must be equal"
            )
        if gradient.placements != param.placements:
            gradient = gradient.redistribute(placements=param.placements)
        return _local(gradient)
    return gradient


def like(param: DTensor, part: Tensor) -> DTensor:
    """Returns a copy of `part` as this rank's part of a DTensor that is spread as `param` is."""
    spread = torch.empty_like(param, dtype=part.dtype, requires_grad=False)
    assert is_dtensor(spread)
    _local(spread).copy_(part)
    return spread


def part_of(param: DTensor, value: Tensor) -> Tensor:
    """Returns this rank's part of `value`, spread as `param` is.

    Args:
        value: a DTensor, or a plain tensor that is equal on all ranks; of the shape of `param`.
    """
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = param.device_mesh, param.placements
    if is_dtensor(value):
        if value.device_mesh == mesh and value.placements == placements:
            return _local(value)
        if value.device_mesh == mesh:
            return _local(value.redistribute(placements=placements))
        value = value.full_tensor()
    whole = value.detach().to(param.device)
    return _local(distribute_tensor(whole, mesh, placements, src_data_rank=None))


@dataclass(frozen=True)
class Spread:
    """Over which ranks the elements of tensors are spread.

    Attributes:
        groups: ranks that have different elements, a process group for each dimension of the mesh;
            none if every rank has them all.
        index: which of the parts is here: ranks with the same elements have the same index.
        device_type: on which the groups exchange data, also of parts that are offloaded.
    """

    groups: tuple[ProcessGroup, ...] = ()
    index: int = 0
    device_type: str = "cpu"

    def sum_(self, values: Tensor) -> None:
        """Adds up the parts' values in place: one all-reduce a group, without a wait on a GPU."""
        if not self.groups:
            return
        exchanged = values.to(self.device_type) if values.device.type == "cpu" else values
        for group in self.groups:
            torch.distributed.all_reduce(exchanged, group=group)
        if exchanged is not values:
            values.copy_(exchanged)

    def any(self, value: bool) -> bool:
        """Returns whether `value` is true for any part; waits."""
        if not self.groups:
            return value
        count = torch.full((), float(value), device=self.device_type)
        self.sum_(count)
        return bool(count > 0)


WHOLE = Spread()


def spread_of(param: Tensor) -> Spread:
    """Returns over which ranks the elements of a parameter are spread."""
    if not is_dtensor(param):
        return WHOLE
    mesh, groups, index = param.device_mesh, [], 0
    for dim, placement in enumerate(param.placements):
        if not placement.is_replicate() and mesh.size(dim) > 1:
            groups.append(mesh.get_group(dim))
            index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    return Spread(tuple(groups), index, mesh.device_type)
