"""What must hold of tensors and numbers before a kernel may touch them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lrs_ext import ops
from lrs_ext.layout import is_dense, laid_out_as, may_overlap, same_layout
from lrs_ext.shards import check_alike, check_placements, local, local_gradient


def check_params(params: list[Tensor], name: str) -> None:
    """Raises RuntimeError or ValueError if the optimizer called `name` cannot update `params`."""
    if any(map(is_lazy, params)):
        raise RuntimeError(
            "a parameter of a lazy module has no shape yet: pass a batch through the model before "
            f"{name} is made"
        )
    check_alike(params, name)
    for param in params:
        _check_param(param, name)
    if len(params) != len(set(params)):
        raise ValueError(
            "optimizer contains a parameter group with duplicate parameters: list each once"
        )


def _check_param(whole: Tensor, name: str) -> None:
    check_placements(whole, name)
    param = local(whole)
    if is_traceable_wrapper_subclass(param):
        raise RuntimeError(
            f"{name} does not support {type(param).__name__} parameters yet: "
            "use torch.optim for them"
        )
    if param.dtype not in ops.DTYPES:
        frozen = "leave it out, as it is not trained: give only those that require a gradient"
        raise RuntimeError(
            f"{name} requires all the params to be floating point Tensors of float32, "
            f"bfloat16 or float16, got {param.dtype}: "
            f"{'use torch.optim for it' if whole.requires_grad else frozen}"
        )
    if param.layout != torch.strided:
        raise RuntimeError(
            f"{name} does not support parameters of layout {param.layout}, only strided ones: "
            "make it with .to_dense()"
        )
    if may_overlap(param) or param.is_neg():
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)}, strides {param.stride()} is a view "
            "with overlaps or signs of its own: make it with .contiguous()"
        )
    if param is not whole and not is_dense(param):
        raise RuntimeError(
            f"this rank's part of a DTensor has shape {tuple(param.shape)}, strides "
            f"{param.stride()} and gaps between its elements: make it with .contiguous()"
        )
    if not ops.has_memory(param):
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} has no memory: its storage was "
            "resized or never allocated; restore it before the step"
        )


def checked_gradient(param: Tensor, name: str) -> Tensor | None:
    """Returns the gradient of `param` in the layout of `param`, or None if it has none.

    Of a DTensor it is this rank's part, in the placements of `param`.

    Raises:
        RuntimeError: it is sparse, wraps other tensors, has no memory, or differs in dtype, device
            or shape.
    """
    if param.grad is None:
        return None
    gradient, param = local_gradient(param, param.grad), local(param)
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"{name} does not support sparse gradients: use sparse=False in the embedding, or "
            "torch.optim.SparseAdam"
        )
    for what in ("dtype", "device", "shape"):
        if getattr(gradient, what) != getattr(param, what):
            raise RuntimeError(
                f"a gradient has {what} {getattr(gradient, what)}, its parameter "
                f"{getattr(param, what)}: they must be equal"
            )
    if is_traceable_wrapper_subclass(gradient):
        raise RuntimeError(
            f"{name} does not support {type(gradient).__name__} gradients yet: use torch.optim for "
            "their parameters"
        )
    if gradient._is_zerotensor():
        return torch.zeros_like(param)
    if not ops.has_memory(gradient):
        raise RuntimeError(
            f"a gradient of shape {tuple(gradient.shape)} has no memory: its storage was resized; "
            "set it to None to leave its parameter out"
        )
    if gradient.is_neg() or not same_layout(gradient, param) or not is_dense(param):
        return laid_out_as(param, gradient, gradient.dtype)
    return gradient


def with_shape_of(param: Tensor, name: str, value: Any) -> Tensor:
    """Returns a value of a parameter's state if it is a tensor of its shape.

    Raises:
        RuntimeError: it is not.
    """
    if not isinstance(value, Tensor) or value.shape != param.shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else value
        raise RuntimeError(
            f"the state {name} has shape {found}, its parameter {tuple(param.shape)}: "
            "delete the parameter's state to start it anew"
        )
    return value


def checked_state(param: Tensor, name: str, value: Any, dtype: torch.dtype) -> Tensor:
    """Returns the array `value` of the state of `param` as the kernels need it.

    Raises:
        RuntimeError: it is no tensor or has another shape than `param`.
    """
    array = with_shape_of(param, name, value)
    is_ready = array.dtype == dtype and array.device == param.device
    if is_ready and same_layout(array, param) and ops.has_memory(array):
        return array
    return laid_out_as(param, array, dtype)


def check_numbers(hyper: Mapping[str, float]) -> None:
    """Raises TypeError or ValueError unless all hyper-parameters are finite numbers."""
    for name, value in hyper.items():
        try:
            is_finite = math.isfinite(value)
        except TypeError:
            raise TypeError(f"{name} must be a number, got {value!r}") from None
        if not is_finite:
            raise ValueError(f"{name} must be finite, got {value}")


def number(value: float | Tensor) -> float:
    """Returns a number as it is, a one-element tensor as a float; waits if that is on a device.

    Raises:
        ValueError: it is a tensor of another size.
    """
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(
            f"a tensor as a number of a group must be 1-element, got shape {tuple(value.shape)}"
        )
    host_value = ops.host_value(value)
    return float(value) if host_value is None else host_value


def step_counter(param: Tensor, count: Any) -> Tensor:
    """Returns `count`, a number or a tensor, as a count of updates: float32, 0-d."""
    if not isinstance(count, Tensor):  # a copy from the host would wait for the device
        return torch.full((), count, dtype=torch.float32, device=param.device)
    return count.detach().to(param.device, torch.float32).reshape(())
