"""The reference backend: the updates in plain torch, one tensor at a time, slow and readable.

Arithmetic is float32 with double coefficients, as in the kernels.

Args of both functions, for one parameter:
    param: the parameter, float32; updated in place.
    grad: its gradient.
    state: its float32 arrays by name, updated in place.
    step: float64, 0-d: which update of this parameter it is, from 1.
    lr: float64, 0-d.
    hyper: the group's hyper-parameters by name; `weight_decay` and `momentum` or `beta1`, which may
        move with the step, are float64, 0-d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrs_ext.block_codes import random_bits
from lrs_ext.grad_scaling import GradScaling
from lrs_ext.profiler_ranges import profile_range
from lrs_ext.shards import WHOLE, Spread
from lrs_ext.state_storage import Storage, unpacked, unpacked_param

Hyper = Mapping[str, Any]


def sgd(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    step: Tensor,
    lr: Tensor,
    hyper: Hyper,
) -> None:
    """Updates one parameter as `torch.optim.SGD` does."""
    value, direction = _prepare(param, grad, hyper)
    direction = _decayed(direction, value, hyper["weight_decay"])
    if "momentum_buffer" in state:
        momentum_buffer, momentum = state["momentum_buffer"], hyper["momentum"].float()
        # The first update takes the gradient whole: the dampening starts with the second.
        grad_share = torch.where(step == 1.0, 1.0, 1.0 - hyper["dampening"]).float()
        momentum_buffer.mul_(momentum).add_(direction * grad_share)
        ahead = direction + momentum * momentum_buffer
        direction = ahead if hyper["nesterov"] else momentum_buffer
    param.copy_(value - lr.float() * direction)


def adam(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    step: Tensor,
    lr: Tensor,
    hyper: Hyper,
) -> None:
    """Updates one parameter as `torch.optim.Adam` or `torch.optim.AdamW` does."""
    value, direction = _prepare(param, grad, hyper)
    beta1, beta2, weight_decay = hyper["beta1"], hyper["beta2"], hyper["weight_decay"]
    if hyper["decoupled_weight_decay"]:
        value = value * (1.0 - lr * weight_decay).float()
    else:
        direction = _decayed(direction, value, weight_decay)
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.lerp_(direction, (1.0 - beta1).float())
    exp_avg_sq.mul_(beta2).addcmul_(direction, direction, value=1.0 - beta2)
    second_moment = exp_avg_sq
    if "max_exp_avg_sq" in state:
        second_moment = state["max_exp_avg_sq"]
        torch.maximum(second_moment, exp_avg_sq, out=second_moment)
    bias_correction1 = 1.0 - beta1**step
    bias_correction2 = 1.0 - beta2**step
    denominator = second_moment.sqrt() / bias_correction2.sqrt().float() + hyper["eps"]
    param.copy_(value - (lr / bias_correction1).float() * (exp_avg / denominator))


def lion(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    step: Tensor,
    lr: Tensor,
    hyper: Hyper,
) -> None:
    """Updates one parameter as algorithm 2 of Chen et al., arXiv 2302.06675."""
    value, grad = _prepare(param, grad, hyper)
    exp_avg, beta1 = state["exp_avg"], hyper["beta1"]
    direction = beta1.float() * exp_avg + (1.0 - beta1).float() * grad
    sign = torch.where(direction.isnan(), direction, direction.sign())  # torch's sign of nan is 0
    value = value * (1.0 - lr * hyper["weight_decay"]).float()
    exp_avg.mul_(hyper["beta2"]).add_(grad, alpha=1.0 - hyper["beta2"])
    param.copy_(value - lr.float() * sign)


def lamb(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    step: Tensor,
    lr: Tensor,
    hyper: Hyper,
    spread: Spread = WHOLE,
) -> None:
    """Updates one parameter as algorithm 2 of You et al., arXiv 1904.00962.

    Args:
        spread: over which ranks the parameter is spread, of which `param` is a part.
    """
    value, grad = _prepare(param, grad, hyper)
    beta1, beta2, weight_decay = hyper["beta1"], hyper["beta2"], hyper["weight_decay"]
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.lerp_(grad, (1.0 - beta1).float())
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    corrects = 1.0 if hyper["bias_correction"] else 0.0
    bias_correction1 = 1.0 - corrects * beta1**step
    bias_correction2 = 1.0 - corrects * beta2**step
    denominator = exp_avg_sq.sqrt() / bias_correction2.sqrt().float() + hyper["eps"]
    direction = exp_avg / denominator / bias_correction1.float()
    direction = _decayed(direction, value, weight_decay)
    squares = torch.stack([x.double().square().sum() for x in (value, direction)])
    spread.sum_(squares)
    param_norm, direction_norm = squares.sqrt()
    adapts = (weight_decay != 0.0) | bool(hyper["always_adapt"])
    has_ratio = adapts & (param_norm != 0.0) & (direction_norm != 0.0)
    lr = lr * torch.where(has_ratio, param_norm / direction_norm, 1.0)
    param.copy_(value - lr.float() * direction)


UPDATES: Mapping[str, Callable[..., None]] = {"sgd": sgd, "adam": adam, "lion": lion, "lamb": lamb}


@dataclass(frozen=True)
class TensorUpdate:
    """What one update of one parameter needs; see the top of the module.

    `state` holds the arrays as they are kept, of which the update reads `names`; `step` is the
    parameter's counter, float32, before the update; `lr` is float32; `position` is the
    parameter's among all of the optimizer.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    names: Sequence[str]
    step: Tensor
    lr: Tensor
    hyper: Hyper
    position: int


class ReferenceTable:
    """One step, with the interface of `lrs_ext.ops.StepTable`; it is made anew for every step.

    Args:
        algorithm: a key of `UPDATES`.
        updates: one for each parameter that has a gradient.
        step: int64, 0-d: committed updates.
        storage: how the states and bfloat16 parameters are kept.
        spread: over which ranks the parameters are spread, of which these are a part.
        label: of the step, in a profile.
    """

    def __init__(
        self,
        algorithm: str,
        updates: Sequence[TensorUpdate],
        step: Tensor,
        storage: Storage,
        spread: Spread,
        label: str,
    ) -> None:
        self._update = UPDATES[algorithm]
        if algorithm == "lamb":
            self._update = functools.partial(lamb, spread=spread)
        self.spread = spread
        self._label = label
        self._storage = storage
        self._updates = updates
        self._step = step

    @property
    def has_gradients(self) -> bool:
        return bool(self._updates)

    def refresh(self, *_: object) -> bool:
        return False

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Returns the 2-norm of all gradients as they are stored."""
        with profile_range("lrs_ext::grad_norm[reference]"):
            squares = [item.grad.double().square().sum() for item in self._updates]
            self._updates = ()  # which hold the gradients
            return torch.stack(squares).sum().sqrt().float()

    @torch.no_grad()
    def run(self, scaling: GradScaling | None = None, commits_step: bool = True) -> None:
        with profile_range(self._label):
            self._run(scaling or GradScaling(), commits_step)
        self._updates = ()

    def _run(self, scaling: GradScaling, commits_step: bool) -> None:
        written = [self._step]
        for item in self._updates:
            arrays = [value for value in item.state.values() if isinstance(value, Tensor)]
            written += [item.param, item.step, *arrays]
        before = [] if scaling.found_inf is None else [tensor.clone() for tensor in written]
        scale = _grad_scale(scaling)
        for item in self._updates:
            item.step.add_(1.0)
            value = unpacked_param(item.param, item.state)
            state = unpacked(item.state, item.names)
            self._update(
                value,
                item.grad if scale is None else item.grad.float() * scale,
                state,
                step=item.step.double(),
                lr=item.lr.double(),
                hyper=item.hyper,
            )
            random = random_bits(self._step, item.position, value.numel())
            self._storage.pack(item.param, item.state, value, state, random)
        if commits_step:
            self._step.add_(1)
        if scaling.found_inf is not None:
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(torch.where(scaling.found_inf != 0.0, old, tensor))


def _grad_scale(scaling: GradScaling) -> Tensor | None:
    """Returns what gradients are multiplied by, float32, None for 1."""
    scale = None
    if scaling.loss_scale is not None:
        scale = 1.0 / scaling.loss_scale.double()
    if scaling.norm is not None and scaling.max_norm is not None:
        norm = scaling.norm.double() * (1.0 if scale is None else scale)
        clip = (scaling.max_norm / (norm + 1e-6)).clamp(max=1.0)
        scale = clip if scale is None else clip * scale
    return None if scale is None else scale.float()


def _decayed(direction: Tensor, value: Tensor, weight_decay: Tensor) -> Tensor:
    # Where there is no decay, infinite parameters must not count.
    return torch.where(weight_decay != 0.0, direction + weight_decay.float() * value, direction)


def _prepare(param: Tensor, grad: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
    direction = grad.float()
    return param.float(), -direction if hyper["maximize"] else direction
