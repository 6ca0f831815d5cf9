"""How often each parameter of an optimizer has been updated."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import Tensor

from lrs_ext.param_devices import read_all
from lrs_ext.tensor_checks import step_counter

States = dict[Tensor, dict[str, Any]]


class StepCounters:
    """Counts of the updates of each parameter: float32, 0-d, on its device.

    Args:
        in_state: whether a parameter's state keeps its count, under "step"; else this does.
        own: the counts that this keeps, by parameter.

    Attributes:
        own: as given.
        are_blank: whether all states are 0, made for a distributed checkpoint or by one.
    """

    def __init__(self, in_state: bool, own: dict[Tensor, Tensor] | None = None) -> None:
        self._in_state = in_state
        self.own = {} if own is None else own
        self._loaded_count = 1.0
        self.are_blank = False

    def has(self, param: Tensor, states: States) -> bool:
        """Returns whether there is a count of a parameter's updates."""
        return param in self.own or "step" in states.get(param, {})

    def of(self, param: Tensor, states: States, is_new: bool) -> Tensor:
        """Returns the count of a parameter's updates, which may begin with this.

        Args:
            is_new: whether an array of its state has just been created.
        """
        if self._in_state:
            state = states[param]
            counter = state["step"] = step_counter(param, state.get("step", 0.0))
            return counter
        # All that matters is whether the state has had its first gradient: a loaded one has.
        if is_new or param not in self.own:
            self.own[param] = step_counter(param, 0.0 if is_new else self._loaded_count)
        self.own[param] = self.own[param].to(param.device)
        return self.own[param]

    def keep_only(self, params: Container[Tensor]) -> None:
        """Lets go of all other parameters."""
        self.own = {param: count for param, count in self.own.items() if param in params}

    def follow_params(self) -> None:
        """Moves the counts to where their parameters are now."""
        self.own = {param: count.to(param.device) for param, count in self.own.items()}

    def load(self, states: Container[Tensor], are_blank: bool) -> None:
        """Takes over states that have been loaded without counts."""
        self.are_blank = are_blank
        self._loaded_count = 0.0 if are_blank else 1.0
        for counter in self.own.values():
            counter.fill_(self._loaded_count)
        self.keep_only(states)

    def unused(self) -> set[Tensor]:
        """Returns the parameters whose count is kept here and 0; waits."""
        counts = read_all(list(self.own.values()))
        return {param for param, count in zip(self.own, counts, strict=True) if count == 0.0}
