"""The parts of a step: tables over some of an optimizer's parameters, each launched at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrs_ext import ops, reference
from lrs_ext.grad_scaling import GradScaling
from lrs_ext.shards import Spread

Table = ops.StepTable | reference.ReferenceTable


@dataclass(frozen=True)
class Selection:
    """Parameters that share a table, with what else the table is made of.

    Attributes:
        param_lists: by group.
        positions: of the parameters, in order, among all of the optimizer.
        state: the optimizer's state, by parameter.
        steps: each parameter's step counter, None for one that takes no part.
        gradients: each parameter's gradient or None.
    """

    param_lists: list[list[Tensor]]
    positions: list[int]
    state: dict[Tensor, dict[str, Any]]
    steps: list[Tensor | None]
    gradients: list[Tensor | None]

    def only(self, is_wanted: Callable[[Tensor], bool]) -> Selection:
        """Returns the parameters for which `is_wanted` is true."""
        params = [param for params in self.param_lists for param in params]
        kept = [index for index, param in enumerate(params) if is_wanted(param)]
        return Selection(
            [[param for param in params if is_wanted(param)] for params in self.param_lists],
            [self.positions[index] for index in kept],
            self.state,
            [self.steps[index] for index in kept],
            [self.gradients[index] for index in kept],
        )


class StridedPart:
    """Parameters with gaps between their elements, which the kernels update in dense copies.

    Args:
        selection: the parameters.
        copies: a dense tensor for each of them.
        make_table: makes the table of a selection.
    """

    def __init__(
        self,
        selection: Selection,
        copies: dict[Tensor, Tensor],
        make_table: Callable[[Selection], Table],
    ) -> None:
        self._pairs = [
            (param, copies[param]) for params in selection.param_lists for param in params
        ]
        state = {copies[p]: s for p, s in selection.state.items() if p in copies}
        self._table = make_table(
            Selection(
                [[copies[param] for param in params] for params in selection.param_lists],
                selection.positions,
                state,
                selection.steps,
                selection.gradients,
            )
        )

    @property
    def has_gradients(self) -> bool:
        return self._table.has_gradients

    @property
    def spread(self) -> Spread:
        return self._table.spread

    def grad_norm(self) -> Tensor:
        return self._table.grad_norm()

    def run(self, scaling: GradScaling | None = None, commits_step: bool = True) -> None:
        with torch.no_grad():
            for param, copy in self._pairs:
                copy.copy_(param)
            self._table.run(scaling, commits_step)
            for param, copy in self._pairs:
                param.copy_(copy)
