"""LAMB, with a schedule where the learning rate goes."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from lrs_ext.optimizers import (
    Betas,
    LearningRate,
    Number,
    check_betas,
    check_not_negative,
    check_tensor_lr,
)
from lrs_ext.positions import Group
from lrs_ext.scheduled_optimizer import ScheduledOptimizer


class LAMB(ScheduledOptimizer):
    """LAMB: Adam whose step has, tensor by tensor, a length in proportion to the parameters.

    ``u = m' / (sqrt(v') + eps) + weight_decay * p``, ``p -= lr * |p| / |u| * u`` with Adam's
    bias-corrected m' and v'; the ratio is 1 where either norm is 0. Two launches a step.

    Args:
        params, lr: as for `AdamW`; every parameter is a layer of its own.
        betas, eps, weight_decay, maximize: as in apex and timm, with their defaults, except that
            gradients are not clipped: see `torch.nn.utils.clip_grad_norm_`. weight_decay and
            betas[0] may be schedules.
        bias_correction: False takes the moments as they are, as the first BERT runs did.
        always_adapt: False makes the ratio 1 in groups without weight decay, as in apex and timm;
            the paper has no such exception.
        foreach, capturable, differentiable, fused: accepted for compatibility; every step is fused.
        backend: "cuda", "triton", "cpu" or "reference"; None picks by device.

    Raises:
        ValueError, TypeError, RuntimeError: as `torch.optim.AdamW` for the same mistake.

    Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes,
    ICLR 2020, arXiv 1904.00962.

    >>> import torch, lrs_ext
    >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = lrs_ext.LAMB([p], lr=lrs_ext.rex(0.1, total_steps=10), weight_decay=0.0)
    >>> p.grad = torch.tensor([2.0, 0.0])
    >>> opt.step()  # by 0.1 * 5 in the direction [1, 0]
    >>> [round(x, 5) for x in p.tolist()]
    [2.5, 4.0]
    """

    algorithm = "lamb"

    def __init__(
        self,
        params: ParamsT,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: Number = 1e-2,
        *,
        bias_correction: bool = True,
        always_adapt: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
    ) -> None:
        check_tensor_lr(lr, foreach, capturable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "always_adapt": always_adapt,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, backend)

    @staticmethod
    def _check(group: Group) -> None:
        check_not_negative(group, "eps", "epsilon")
        check_betas(group)
        check_not_negative(group, "weight_decay")

    @staticmethod
    def _state_names(group: Group) -> list[str]:
        return ["exp_avg", "exp_avg_sq"]
