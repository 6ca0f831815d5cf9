"""Many models of one setting in training at once: stacked parameters under `torch.func.vmap`.

All models of a stack start from the same weights and see the same batches; learning rates differ.
Row i of one matrix holds the parameters of model i and is a parameter group of one optimizer of
`lrs_ext`, with a schedule of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from autolrs_tasks import Batch, Split
from rex_settings import (
    CURVES,
    EVERY_ITERATION,
    PLATEAU_CHECKS,
    PLATEAU_FACTOR,
    PLATEAU_PATIENCE,
    Setting,
)
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import lrs_ext

EVALUATED_AT_ONCE = 4  # models: more would leave the cache


@dataclass(frozen=True)
class Run:
    """One model's schedule.

    Attributes:
        schedule: of `rex_settings.CURVES`, or a variant of plateau.
        exponent: place of the learning rate in the grid of the setting.
        sampling: name of a sampling rate of `lrs_ext.SAMPLING`.
    """

    schedule: str
    exponent: int
    sampling: str = EVERY_ITERATION

    def rate(self, setting: Setting, total_steps: int) -> float | lrs_ext.Schedule:
        """Returns the schedule, or a plateau's first learning rate."""
        lr = setting.lr(self.exponent)
        if self.schedule in PLATEAU_PATIENCE:
            return lr
        return CURVES[self.schedule](lr, total_steps, sampling=self.sampling)


class Plateau:
    """Decay on plateau for one model of a stack."""

    def __init__(self, run: Run, lr: float) -> None:
        # A parameter of its own: in the stack all models belong to one optimizer.
        self._optimizer = lrs_ext.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        patience = round(PLATEAU_PATIENCE[run.schedule] * PLATEAU_CHECKS)
        self._plateau = lrs_ext.ReduceOnPlateau(
            self._optimizer, factor=PLATEAU_FACTOR, patience=patience
        )

    def next_lr(self, validation_loss: float) -> float:
        self._plateau.step(validation_loss)
        return self._optimizer.current_lr()[0]


class _Function(nn.Module):
    """A function of a model and a batch as a module, so that its parameters can be replaced."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Batch) -> Tensor:
        return self.function(self.model, batch)


class Stack:
    """Models of one setting, one for each run."""

    def __init__(self, setting: Setting, seed: int, runs: Sequence[Run], total_steps: int) -> None:
        self.setting, self.seed, self.total_steps = setting, seed, total_steps
        self.model = setting.task.model(seed)
        count = len(runs)
        self._names = [(name, p.shape) for name, p in self.model.named_parameters()]
        row = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        self.parameters = row.repeat(count, 1).requires_grad_()
        self.parameters.grad = torch.zeros_like(self.parameters)
        # Those not kept in checkpoints are constants, which the models share.
        state = self.model.state_dict()
        self.buffers = {
            name: state[name].repeat(count, *[1] * state[name].dim())
            for name, _ in self.model.named_buffers()
            if name in state
        }
        rates = [run.rate(setting, total_steps) for run in runs]
        self.optimizer = setting.task.optimizer(self._groups(rates), lr=1.0)
        self._plateaus = {
            i: Plateau(run, rate)
            for i, (run, rate) in enumerate(zip(runs, rates, strict=True))
            if isinstance(rate, float)
        }

    def _groups(self, rates: Sequence[float | lrs_ext.Schedule]) -> list[dict[str, Any]]:
        """Returns the rows as parameter groups, which share memory with the matrix."""
        groups = []
        for values, gradient, rate in zip(
            self.parameters.detach(), self.parameters.grad, rates, strict=True
        ):
            param = nn.Parameter(values)
            param.grad = gradient
            group: dict[str, Any] = {"params": [param], "lr": rate}
            if isinstance(rate, lrs_ext.Schedule) and rate.to_dict()["profile"] == "one_cycle":
                if self.setting.task.kind == "SGD":
                    group["momentum"] = rate.momentum
                else:
                    group["betas"] = (rate.momentum, 0.999)
            groups.append(group)
        return groups

    def train(self) -> None:
        """Trains all models to the end of the budget."""
        checks = {
            math.ceil(i * self.total_steps / PLATEAU_CHECKS) for i in range(1, PLATEAU_CHECKS)
        }
        self.model.train()
        batches = iter(self.setting.task.batches(self.seed))
        everyone = slice(None)
        for step in range(self.total_steps):
            if step in checks and self._plateaus:
                self._check_plateaus()
            losses = self._call(self.setting.task.loss, next(batches), everyone)
            self.parameters.grad.zero_()
            losses.sum().backward()  # the models share nothing: gradients do not mix
            if self.setting.max_norm is not None:
                self._clip(self.setting.max_norm)
            self.optimizer.step()

    def _clip(self, max_norm: float) -> None:
        """Does what `torch.nn.utils.clip_grad_norm_` does, to each model."""
        gradients = self.parameters.grad
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        gradients.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0))

    @torch.no_grad()
    def evaluate(self, split: Split) -> list[float | None]:
        """Returns the metric of each model on a held-out set, None where it is not finite."""
        batch = self.setting.task.load()[1][split]
        values = self._evaluate(self.setting.metric, batch, slice(None))
        return [value if math.isfinite(value) else None for value in values]

    @torch.no_grad()
    def _check_plateaus(self) -> None:
        whole = self.setting.task.load()[1]["validation"]
        batch = {name: values[: self.setting.check_examples] for name, values in whole.items()}
        chosen = list(self._plateaus)
        losses = self._evaluate(self.setting.task.loss, batch, chosen)
        for i, loss in zip(chosen, losses, strict=True):
            self.optimizer.param_groups[i]["lr"] = self._plateaus[i].next_lr(loss)

    def _evaluate(
        self,
        function: Callable[[nn.Module, Batch], Tensor],
        batch: Batch,
        chosen: slice | list[int],
    ) -> list[float]:
        self.model.eval()
        values = self._call(function, batch, chosen, EVALUATED_AT_ONCE)
        self.model.train()
        return values.tolist()

    def _call(
        self,
        function: Callable[[nn.Module, Batch], Tensor],
        batch: Batch,
        chosen: slice | list[int],
        at_once: int | None = None,
    ) -> Tensor:
        """Returns the function's value for each of the chosen models."""
        parts = self.parameters[chosen].split([shape.numel() for _, shape in self._names], dim=1)
        tensors = {
            f"model.{name}": part.unflatten(1, shape) if shape else part.squeeze(1)
            for (name, shape), part in zip(self._names, parts, strict=True)
        }
        tensors |= {f"model.{name}": values[chosen] for name, values in self.buffers.items()}
        module = _Function(self.model, function)

        def call(own: dict[str, Tensor]) -> Tensor:
            return functional_call(module, own, (batch,))

        with sdpa_kernel(SDPBackend.MATH):  # the only one that vmap can batch on a CPU
            return vmap(call, chunk_size=at_once)(tensors)
