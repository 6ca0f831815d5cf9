"""Optimizers that torch.optim lacks, as a torch.optim.Optimizer in plain torch: what users had.

They are written from their authors' code, one tensor operation at a time in the parameters' dtype.
"""

import torch
from torch.optim import Optimizer


def plain_optimizer(name):
    """The class of torch.optim, or the one here."""
    return getattr(torch.optim, name, None) or globals()[name]


class Lion(Optimizer):
    """The authors' lion_pytorch.py, with the step count and `maximize` of torch.optim.Adam."""

    def __init__(
        self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False, foreach=None
    ):
        own = {"betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {"lr": lr, "foreach": foreach, **own})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(param)
                state["step"] += 1
                exp_avg = state["exp_avg"]
                grad = -param.grad if group["maximize"] else param.grad
                param.mul_(1 - group["lr"] * group["weight_decay"])
                update = exp_avg * beta1 + grad * (1 - beta1)
                sign = torch.where(update.isnan(), update, update.sign())  # torch: 0 for nan
                param.add_(sign, alpha=-group["lr"])
                exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


class LAMB(Optimizer):
    """timm's Lamb without its clipping, and with apex's condition for a ratio of 1."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        bias_correction=True,
        always_adapt=True,
        maximize=False,
        foreach=None,
    ):
        own = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        own |= {"bias_correction": bias_correction, "always_adapt": always_adapt}
        super().__init__(params, {"lr": lr, "foreach": foreach, **own})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["step"] += 1
                step, corrects = state["step"].item(), group["bias_correction"]
                grad = -param.grad if group["maximize"] else param.grad
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                bias_correction1 = 1 - beta1**step if corrects else 1.0
                bias_correction2 = 1 - beta2**step if corrects else 1.0
                denominator = (state["exp_avg_sq"] / bias_correction2).sqrt() + group["eps"]
                update = state["exp_avg"] / bias_correction1 / denominator
                update.add_(param, alpha=group["weight_decay"])
                ratio = 1.0
                if group["weight_decay"] != 0 or group["always_adapt"]:
                    param_norm, update_norm = param.norm(), update.norm()
                    if param_norm != 0 and update_norm != 0:
                        ratio = param_norm / update_norm
                param.sub_(update * (group["lr"] * ratio))
