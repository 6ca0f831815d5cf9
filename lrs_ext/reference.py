"""The reference backend: the updates in plain torch, one tensor at a time, slow and readable.

Arithmetic is float32 with double coefficients, as in the kernels.

Args of both functions, for one parameter:
    param: the parameter, any supported dtype; updated in place.
    grad: its gradient.
    state: its float32 arrays by name, updated in place.
    step: float64, 0-d: which update of this parameter it is, from 1.
    lr: float64, 0-d.
    hyper: the group's hyper-parameters by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Hyper = Mapping[str, float]


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
    if hyper["weight_decay"] != 0.0:
        direction = direction + hyper["weight_decay"] * value
    if "momentum_buffer" in state:
        momentum_buffer = state["momentum_buffer"]
        # The first update takes the gradient whole: the dampening starts with the second.
        grad_share = torch.where(step == 1.0, 1.0, 1.0 - hyper["dampening"]).float()
        momentum_buffer.mul_(hyper["momentum"]).add_(direction * grad_share)
        if hyper["nesterov"]:
            direction = direction + hyper["momentum"] * momentum_buffer
        else:
            direction = momentum_buffer
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
    elif weight_decay != 0.0:
        direction = direction + weight_decay * value
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.lerp_(direction, 1.0 - beta1)
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
    exp_avg = state["exp_avg"]
    direction = hyper["beta1"] * exp_avg + (1.0 - hyper["beta1"]) * grad
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
) -> None:
    """Updates one parameter as algorithm 2 of You et al., arXiv 1904.00962."""
    value, grad = _prepare(param, grad, hyper)
    beta1, beta2, weight_decay = hyper["beta1"], hyper["beta2"], hyper["weight_decay"]
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    if not hyper["bias_correction"]:
        beta1 = beta2 = 0.0
    bias_correction1 = 1.0 - beta1**step
    bias_correction2 = 1.0 - beta2**step
    denominator = exp_avg_sq.sqrt() / bias_correction2.sqrt().float() + hyper["eps"]
    direction = exp_avg / denominator / bias_correction1.float()
    if weight_decay != 0.0:
        direction = direction + weight_decay * value
    if hyper["always_adapt"] or weight_decay != 0.0:
        param_norm, direction_norm = (x.double().norm() for x in (value, direction))
        has_ratio = (param_norm != 0.0) & (direction_norm != 0.0)
        lr = lr * torch.where(has_ratio, param_norm / direction_norm, 1.0)
    param.copy_(value - lr.float() * direction)


UPDATES: Mapping[str, Callable[..., None]] = {"sgd": sgd, "adam": adam, "lion": lion, "lamb": lamb}


@dataclass(frozen=True)
class TensorUpdate:
    """What one update of one parameter needs; see the top of the module.

    `step` is the parameter's counter, float32, before the update; `lr` is float32.
    """

    param: Tensor
    grad: Tensor
    state: Mapping[str, Tensor]
    step: Tensor
    lr: Tensor
    hyper: Hyper


class ReferenceTable:
    """One step, with the interface of `lrs_ext.ops.StepTable`; it is made anew for every step.

    Args:
        algorithm: a key of `UPDATES`.
        updates: one for each parameter that has a gradient.
        step: int64, 0-d: committed updates.
    """

    has_gradients = True

    def __init__(self, algorithm: str, updates: Sequence[TensorUpdate], step: Tensor) -> None:
        self._update = UPDATES[algorithm]
        self._updates = updates
        self._step = step

    def refresh(self, *_: object) -> bool:
        return False

    @torch.no_grad()
    def run(self) -> None:
        for item in self._updates:
            item.step.add_(1.0)
            self._update(
                item.param,
                item.grad,
                item.state,
                step=item.step.double(),
                lr=item.lr.double(),
                hyper=item.hyper,
            )
        self._step.add_(1)


def _prepare(param: Tensor, grad: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
    direction = grad.float()
    return param.float(), -direction if hyper["maximize"] else direction
