"""The part of a step that updates what this rank holds of DTensors."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrs_ext.grad_scaling import GradScaling
from lrs_ext.param_devices import on_device
from lrs_ext.shards import Spread, is_dtensor, local, spread_of
from lrs_ext.step_parts import Selection, Table

# Between the random bits of two parts of a parameter: more than an optimizer has parameters.
_POSITIONS = 1 << 20

# Loops over all parameters at every step: without a Python frame each.
_part_of = operator.attrgetter("_local_tensor")
_is_none = functools.partial(operator.is_, None)

MakeTable = Callable[[Selection, Spread], Table]


class LocalPart:
    """Parameters that are spread over the same ranks, through a table of their local tensors.

    Args:
        selection: the parameters.
        spread: over which ranks.
        make_table: makes the table of a selection of plain tensors.
    """

    def __init__(self, selection: Selection, spread: Spread, make_table: MakeTable) -> None:
        self.spread = spread
        self._params = [*itertools.chain.from_iterable(selection.param_lists)]
        self._lists = [[local(p) for p in params] for params in selection.param_lists]
        self._kinds: list[Any] = [*map(type, self._params)]
        self._specs: list[Any] = [p._spec if is_dtensor(p) else None for p in self._params]
        self._spread_params = [*filter(is_dtensor, self._params)]
        self._parts = [*map(local, self._spread_params)]
        self._states = _States(self._params, selection.state)
        self._state = {
            local(param): {name: local(value) for name, value in selection.state[param].items()}
            for param in self._params
            if param in selection.state
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
        if not self._states.are_those_of(state):
            return False
        if not all(map(operator.is_, map(_part_of, self._spread_params), self._parts)):
            return False
        collected = self._gradients() if gradients is None else gradients
        if collected is None:
            return False
        self._note_updated(collected)
        return self._table.refresh(self._lists, self._state, collected)

    def _gradients(self) -> list[Tensor | None] | None:
        """Returns this rank's parts of the gradients; None if one is not spread as its parameter.

        They are asked for at every step: engines make other ones, in other memory.
        """
        collected: list[Tensor | None] = []
        for param, kind, spec in zip(self._params, self._kinds, self._specs, strict=True):
            gradient: Any = param.grad
            if spec is not None and gradient is not None:
                if type(gradient) is not kind:
                    return None
                own = gradient._spec
                if own is not spec and (own.placements, own.mesh) != (spec.placements, spec.mesh):
                    return None
                gradient = gradient._local_tensor
                if type(gradient) is not Tensor:
                    return None  # on its way from another rank
            collected.append(gradient)
        return collected

    @property
    def has_gradients(self) -> bool:
        return self._table.has_gradients

    def grad_norm(self) -> Tensor:
        """Returns the norm of what this rank holds."""
        return self._table.grad_norm()

    def run(self, scaling: GradScaling | None = None, commits_step: bool = True) -> None:
        self._table.run(scaling, commits_step)
        torch.autograd.graph.increment_version(self._updated)

    def _note_updated(self, gradients: list[Tensor | None]) -> None:
        self._updated = self._params
        if any(map(_is_none, gradients)):
            pairs = zip(self._params, gradients, strict=True)
            self._updated = [param for param, gradient in pairs if gradient is not None]


class _States:
    """The states of some parameters, and the arrays in them, as they were at first."""

    def __init__(self, params: list[Tensor], state: dict[Tensor, dict[str, Any]]) -> None:
        self._params, self._own = params, [state.get(param) for param in params]
        self._views = [own.values() for own in self._own if own is not None]  # which follow them
        self._sizes = [*map(len, self._views)]
        self._arrays = [*itertools.chain.from_iterable(self._views)]
        self._keys, self._values = [*state], [*state.values()]

    def are_those_of(self, state: dict[Tensor, dict[str, Any]]) -> bool:
        """Returns whether all are still the same objects."""
        # In the order of `state`, because to look up a tensor costs more.
        is_known = len(state) == len(self._keys) and _are_same(state, self._keys)
        if not (is_known and _are_same(state.values(), self._values)):
            if not _are_same(map(state.get, self._params), self._own):
                return False
            self._keys, self._values = [*state], [*state.values()]
        if [*map(len, self._views)] != self._sizes:
            return False
        return _are_same(itertools.chain.from_iterable(self._views), self._arrays)


def _are_same(present: Iterable[Any], known: Iterable[Any]) -> bool:
    return all(map(operator.is_, present, known))


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
