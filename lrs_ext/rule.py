"""What sets one optimizer apart from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lrs_ext.positions import Group


@dataclass(frozen=True)
class Rule:
    """The update of an optimizer, as far as the host knows it.

    Attributes:
        algorithm: a native name.
        name: of the optimizer, for messages and profiles.
        check: raises ValueError for numbers of a group out of range, in the words of `torch.optim`.
        state_names: returns the keys of the arrays that the update of a group keeps.
        hyper: returns the numbers of a group that the update reads, by their native names.
        options: the keys of a group that the update depends on.
    """

    algorithm: str
    name: str
    check: Callable[[Group], None]
    state_names: Callable[[Group], list[str]]
    hyper: Callable[[Group], dict[str, float]]
    options: tuple[str, ...]
