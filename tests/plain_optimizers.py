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
