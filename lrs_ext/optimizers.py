"""Optimizers with the interface of `torch.optim` and a schedule where the learning rate goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lrs_ext.param_devices import params_of
from lrs_ext.positions import Group
from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.schedules import Schedule
from lrs_ext.state_storage import Storage

LearningRate = float | Tensor | Schedule
Number = float | Schedule
Betas = tuple[Number, float]


class SGD(ScheduledOptimizer):
    """`torch.optim.SGD` with a schedule where the number goes.

    ``b = momentum * b + (1 - dampening) * g``, ``p -= lr * b``; see `torch.optim.SGD` for the
    variants. Arithmetic is float32 whatever the dtype of the parameters; states are by default.

    Args:
        params: float32, bfloat16 or float16 tensors, groups of them, or named ones.
        lr: a float, a one-element tensor or a `Schedule`, here or in a group.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch; momentum and
            weight_decay may be schedules too. Where the momentum of a schedule is 0, the momentum
            buffer is the (dampened) gradient; torch would leave it alone.
        foreach, differentiable, fused: accepted for compatibility; every step is fused.
        backend: "cuda", "triton", "cpu" or "reference"; None picks by device.
        state_dtype, master_weights, stochastic_rounding: see `lrs_ext.state_storage.Storage`.

    Raises:
        ValueError, TypeError, RuntimeError: as in torch for the same mistake.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning,
    ICML 2013, in the form of torch.optim.

    >>> import torch, lrs_ext
    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> opt = lrs_ext.SGD([p], lr=lrs_ext.linear(0.5, total_steps=2))
    >>> for _ in range(2):
    ...     p.grad = torch.ones(3)
    ...     opt.step()
    >>> p.tolist(), opt.current_lr()
    ([0.25, 0.25, 0.25], [0.0])
    >>> cycle = lrs_ext.one_cycle(0.1, total_steps=4)
    >>> opt = lrs_ext.SGD([p], lr=cycle, momentum=cycle.momentum)
    >>> opt.step()
    >>> round(opt.param_groups[0]["lr"], 6), round(opt.param_groups[0]["momentum"], 6)
    (0.055, 0.9)
    """

    algorithm = "sgd"
    _counts_in_state = False

    def __init__(
        self,
        params: ParamsT,
        lr: LearningRate = 1e-3,
        momentum: Number = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        storage = Storage(state_dtype, master_weights, stochastic_rounding)
        super().__init__(params, defaults, backend, storage)

    @staticmethod
    def _check(group: Group) -> None:
        check_not_negative(group, "momentum")
        check_not_negative(group, "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    @staticmethod
    def _state_names(group: Group) -> list[str]:
        return ["momentum_buffer"] if group["momentum"] != 0 else []

    def state_dict(self) -> dict[str, Any]:
        """As in torch, where there is no momentum buffer before its first gradient.

        But distributed checkpoints ask for it, to load it in place.
        """
        state_dict = super().state_dict()
        counters = self._preparation.counters
        if counters.are_blank:
            return state_dict
        unused = counters.unused()
        for index, param in enumerate(params_of(self.param_groups)):
            if param in unused and index in state_dict["state"]:
                saved = state_dict["state"][index]
                state_dict["state"][index] = {**saved, "momentum_buffer": None}
        return state_dict


class Adam(ScheduledOptimizer):
    """`torch.optim.Adam` with a schedule where the number goes.

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``p -= lr * m' / (sqrt(v') + eps)`` with
    the bias-corrected m' and v'. Arithmetic is float32 whatever the dtype of the parameters; states
    are by default.

    Args:
        params: float32, bfloat16 or float16 tensors, groups of them, or named ones.
        lr: a float, a one-element tensor or a `Schedule`, here or in a group.
        betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in torch; betas that
            are tensors on a device make every step wait for it. weight_decay and betas[0] may be
            schedules; as in torch under `OneCycleLR`, ``m' = m / (1 - b1^k)`` in update k has the
            b1 of that update.
        foreach, capturable, differentiable, fused: accepted for compatibility; every step is fused.
        backend: "cuda", "triton", "cpu" or "reference"; None picks by device.
        state_dtype, master_weights, stochastic_rounding: see `lrs_ext.state_storage.Storage`.

    Raises:
        ValueError, TypeError, RuntimeError: as in torch for the same mistake.

    Source: Kingma, Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, arXiv 1412.6980.

    >>> import torch, lrs_ext
    >>> p = torch.nn.Parameter(torch.ones(1))
    >>> opt = lrs_ext.Adam([p], lr=lrs_ext.rex(0.5, total_steps=10))
    >>> p.grad = torch.ones(1)
    >>> opt.step()
    >>> p.item(), round(opt.param_groups[0]["lr"], 6)
    (0.5, 0.473684)
    >>> cycle = lrs_ext.one_cycle(0.1, total_steps=4)
    >>> opt = lrs_ext.Adam([p], lr=cycle, betas=(cycle.momentum, 0.999))
    >>> opt.param_groups[0]["betas"]
    (0.95, 0.999)
    """

    algorithm = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        backend: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        check_tensor_lr(lr, foreach, capturable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        storage = Storage(state_dtype, master_weights, stochastic_rounding)
        super().__init__(params, defaults, backend, storage)

    @staticmethod
    def _check(group: Group) -> None:
        check_not_negative(group, "eps", "epsilon")
        check_betas(group)
        check_not_negative(group, "weight_decay")

    @staticmethod
    def _state_names(group: Group) -> list[str]:
        names = ["exp_avg", "exp_avg_sq"]
        return [*names, "max_exp_avg_sq"] if group["amsgrad"] else names


class AdamW(Adam):
    """`torch.optim.AdamW` with a schedule where the number goes.

    `Adam` whose weight decay multiplies the parameter by ``1 - lr * weight_decay`` instead of
    adding to the gradient. The arguments are those of `Adam`; `weight_decay` is 0.01 unless given.

    Source: Loshchilov, Hutter, Decoupled Weight Decay Regularization, ICLR 2019, arXiv 1711.05101.

    >>> import torch, lrs_ext
    >>> p = torch.nn.Parameter(torch.ones(1))
    >>> opt = lrs_ext.AdamW([p], lr=lrs_ext.rex(0.5, total_steps=10), weight_decay=0.1)
    >>> p.grad = torch.zeros(1)
    >>> opt.step()
    >>> round(p.item(), 6)
    0.95
    """

    def __init__(
        self,
        params: ParamsT,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            backend=backend,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
        )


class Lion(ScheduledOptimizer):
    """Lion: the sign of a momentum, of which it keeps one array.

    ``p = p (1 - lr * weight_decay) - lr * sign(b1 m + (1 - b1) g)``, ``m = b2 m + (1 - b2) g``.
    The sign of 0 is 0, and nan stays nan, where `torch.sign` would make it 0. Arithmetic is float32
    whatever the dtype of the parameters; states are by default.

    Args:
        params: float32, bfloat16 or float16 tensors, groups of them, or named ones.
        lr: a float, a one-element tensor or a `Schedule`, here or in a group; the paper advises a
            third to a tenth of AdamW's, with a weight decay as many times larger.
        betas, weight_decay, maximize: as in `torch.optim.AdamW`; the decay is decoupled.
            weight_decay and betas[0] may be schedules.
        foreach, capturable, differentiable, fused: accepted for compatibility; every step is fused.
        backend: "cuda", "triton", "cpu" or "reference"; None picks by device.
        state_dtype, master_weights, stochastic_rounding: see `lrs_ext.state_storage.Storage`.

    Raises:
        ValueError, TypeError, RuntimeError: as `torch.optim.AdamW` for the same mistake.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023,
    arXiv 2302.06675, algorithm 2.

    >>> import torch, lrs_ext
    >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    >>> opt = lrs_ext.Lion([p], lr=lrs_ext.linear(0.25, total_steps=2))
    >>> p.grad = torch.tensor([3.0, 0.0, -0.01])
    >>> opt.step()
    >>> p.tolist(), opt.current_lr()
    ([0.75, 1.0, 1.25], [0.125])
    """

    algorithm = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: LearningRate = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: Number = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        check_tensor_lr(lr, foreach, capturable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        storage = Storage(state_dtype, master_weights, stochastic_rounding)
        super().__init__(params, defaults, backend, storage)

    @staticmethod
    def _check(group: Group) -> None:
        check_betas(group)
        check_not_negative(group, "weight_decay")

    @staticmethod
    def _state_names(group: Group) -> list[str]:
        return ["exp_avg"]


def check_tensor_lr(lr: LearningRate, foreach: bool | None, capturable: bool) -> None:
    """Raises ValueError for a tensor where `torch.optim.Adam` does not take one."""
    if isinstance(lr, Tensor) and foreach and not capturable:
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")


def check_not_negative(group: Group, key: str, name: str | None = None) -> None:
    """Raises ValueError for a negative number or NaN; torch calls it `name`, None is the key."""
    if not group[key] >= 0.0:
        raise ValueError(f"Invalid {name or key} value: {group[key]}")


def check_betas(group: Group) -> None:
    """Raises ValueError for betas out of range, in the words of `torch.optim.Adam`."""
    betas = group["betas"]
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element")
        if isinstance(beta, Tensor) and group["foreach"] and not group["capturable"]:
            raise ValueError(
                f"betas[{index}] as a Tensor is not supported for capturable=False and foreach=True"
            )
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {float(beta)}")
