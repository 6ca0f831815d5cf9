"""The order in which tensors visit memory; the kernels walk a parameter and its states in step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Returns whether the tensor covers its memory without gaps or overlaps, in any order."""
    if tensor.layout != torch.strided:
        return False
    return tensor.is_contiguous() or same_layout(tensor, torch.empty_like(tensor, device="meta"))


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Returns whether both visit memory in the same order; single entries have no stride."""
    shape, strides_a, strides_b = a.shape, a.stride(), b.stride()
    return shape == b.shape and (
        strides_a == strides_b
        or all(
            size == 1 or stride_a == stride_b
            for size, stride_a, stride_b in zip(shape, strides_a, strides_b, strict=True)
        )
    )


def laid_out_as(param: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a copy of `source` with the device and the strides of `param`."""
    return torch.empty_like(param, dtype=dtype).copy_(source)


def memory_order(tensor: Tensor) -> Tensor:
    """Returns a dense tensor's elements in the order of memory: a view, shape (numel,)."""
    return tensor.as_strided((tensor.numel(),), (1,))


def may_overlap(tensor: Tensor) -> bool:
    """Returns whether two elements of a strided tensor may share memory."""
    if tensor.is_contiguous():
        return False
    sizes = sorted((t, n) for n, t in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    reach = 1  # of the dimensions with smaller strides
    for stride, size in sizes:
        if stride < reach:
            return True
        reach += (size - 1) * stride
    return False


def dense_copies(
    tensors: Iterable[Tensor], present: Mapping[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Returns a dense tensor like each that has gaps between its elements, from `present` if there.

    The values are not copied.
    """
    copies = {}
    for tensor in tensors:
        if is_dense(tensor):
            continue
        copy, like = present.get(tensor), torch.empty_like(tensor, device="meta")
        is_known = copy is not None and (copy.dtype, copy.device) == (tensor.dtype, tensor.device)
        if copy is None or not is_known or not same_layout(copy, like):
            with torch.inference_mode(False):  # later steps outside of that mode write to it too
                copy = torch.empty_like(tensor, requires_grad=False)
        copies[tensor] = copy
    return copies
