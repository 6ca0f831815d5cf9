"""The part of a step that updates what this rank holds of DTensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrs_ext import ops
from lrs_ext.param_devices import on_device
from lrs_ext.shards import Spread, is_dtensor, local, spread_of
from lrs_ext.step_parts import Selection, Table

# Between the random bits of two parts of a parameter: more than an optimizer has parameters.
_POSITIONS = 1 << 20

MakeTable = Callable[[Selection, Spread], Table]


@dataclass(frozen=True)
class _Entry:
    """A parameter, and what the table was made of."""

    param: Tensor
    part: Tensor  # what this rank holds: the parameter itself, if it is no DTensor
    kind: type[Tensor]
    placements: Any  # None if it is no DTensor
    state: dict[str, Any] | None
    arrays: tuple[Any, ...]  # the values of the state


class LocalPart:
    """Parameters that are spread over the same ranks, through a table of their local tensors.

    Args:
        selection: the parameters.
        spread: over which ranks.
        make_table: makes the table of a selection of plain tensors.
    """

    def __init__(self, selection: Selection, spread: Spread, make_table: MakeTable) -> None:
        self.spread = spread
        self._entries = [
            _entry(param, selection.state.get(param))
            for params in selection.param_lists
            for param in params
        ]
        self._lists = [[local(p) for p in params] for params in selection.param_lists]
        self._state = {
            entry.part: {name: local(value) for name, value in entry.state.items()}
            for entry in self._entries
            if entry.state is not None
        }
        # Elements that are equal on several ranks are rounded alike, others by bits of their own.
        positions = [position + _POSITIONS * spread.index for position in selection.positions]
        steps, gradients = selection.steps, selection.gradients
        parts = Selection(self._lists, positions, self._state, steps, gradients)
        self._table = make_table(parts, spread)
        self._note_updated(selection.gradients)

    def refresh(
        self,
        state: dict[Tensor, dict[str, Any]],
        gradients: list[Tensor | None] | None = None,
    ) -> bool:
        """Collects the gradients for the next `run`.

        Args:
            state: the optimizer's.
            gradients: in the place of the parameters' own: what this rank holds of them.

        Returns:
            False if the part is out of date; see `StepTable.refresh`.
        """
        collected: list[Tensor | None] = []
        for entry in self._entries:
            param = entry.param
            if state.get(param) is not entry.state:
                return False
            if entry.state is not None:
                arrays = entry.state.values()
                is_same = len(arrays) == len(entry.arrays)
                if not is_same or not all(map(operator.is_, arrays, entry.arrays)):
                    return False
            gradient = param.grad
            if entry.placements is not None:
                if param._local_tensor is not entry.part:  # type: ignore[attr-defined]
                    return False
                if gradient is not None and gradients is None:
                    if type(gradient) is not entry.kind:
                        return False
                    if gradient._spec.placements != entry.placements:  # type: ignore[attr-defined]
                        return False
                    gradient = gradient._local_tensor  # type: ignore[attr-defined]
                    if type(gradient) is not Tensor:
                        return False  # on its way from another rank
            collected.append(gradient)
        collected = gradients if gradients is not None else collected
        self._note_updated(collected)
        return self._table.refresh(self._lists, self._state, collected)

    @property
    def has_gradients(self) -> bool:
        return self._table.has_gradients

    def grad_norm(self) -> Tensor:
        """Returns the norm of what this rank holds."""
        return self._table.grad_norm()

    def run(self, scaling: ops.GradScaling | None = None, commits_step: bool = True) -> None:
        self._table.run(scaling, commits_step)
        torch.autograd.graph.increment_version(self._updated)

    def _note_updated(self, gradients: list[Tensor | None]) -> None:
        params = (entry.param for entry in self._entries)
        self._updated = [p for p, g in zip(params, gradients, strict=True) if g is not None]


def _entry(param: Tensor, state: dict[str, Any] | None) -> _Entry:
    placements = param.placements if is_dtensor(param) else None
    arrays = tuple((state or {}).values())
    return _Entry(param, local(param), type(param), placements, state, arrays)


def by_spread(selection: Selection) -> list[tuple[Spread, Selection]]:
    """Divides parameters by the ranks over which they are spread, in the order of their first."""
    spreads = {p: spread_of(p) for params in selection.param_lists for p in params}

    def those_over(spread: Spread) -> Selection:
        return selection.only(lambda param: spreads[param] == spread)

    return [(spread, those_over(spread)) for spread in dict.fromkeys(spreads.values())]


def total_norm(norms: Sequence[tuple[Tensor, Spread]], device: torch.device) -> Tensor:
    """Returns the norm over all ranks of gradients whose norms are known part by part.

    One all-reduce for each way in which they are spread; without a wait on GPUs.

    Args:
        norms: float32, 0-d, of what this rank holds, and over which ranks the rest is.
        device: of the result.
    """
    if not any(spread.groups for _, spread in norms):
        wholes = [on_device(norm, device) for norm, _ in norms]
        total = torch.zeros((), device=device) if not wholes else wholes[0]
        return torch.linalg.vector_norm(torch.stack(wholes)) if len(wholes) > 1 else total
    squares: dict[Spread, Tensor] = {}
    for norm, spread in norms:
        square = on_device(norm, device).double().square()
        squares[spread] = squares[spread] + square if spread in squares else square
    for spread, square in squares.items():
        spread.sum_(square)
    return torch.stack(list(squares.values())).sum().sqrt().float()
