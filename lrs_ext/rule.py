"""What sets one optimizer apart from another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lrs_ext.backends import select_backends
from lrs_ext.hyper_schedules import MovableNumber, with_peaks
from lrs_ext.learning_rates import at_height_of, check_learning_rate
from lrs_ext.positions import Group, check_note
from lrs_ext.schedules import Schedule
from lrs_ext.state_storage import Storage
from lrs_ext.tensor_checks import check_numbers, check_params


@dataclass(frozen=True)
class Rule:
    """The update of an optimizer, as far as the host knows it.

    Attributes:
        algorithm: a native name.
        name: of the optimizer, for messages and profiles.
        check: raises ValueError for numbers of a group out of range, in the words of `torch.optim`.
        state_names: returns the keys of the arrays that the update of a group keeps.
        hyper: returns the numbers of a group that the update reads, by their native names.
        defaults: the optimizer's own, with the keys of a group that the update depends on.
        movable: what else than the learning rate may follow a schedule.
        storage: how states and bfloat16 parameters are kept.
        requested_backend: a name, or None for the fastest on each device.
    """

    algorithm: str
    name: str
    check: Callable[[Group], None]
    state_names: Callable[[Group], list[str]]
    hyper: Callable[[Group], dict[str, float]]
    defaults: Group
    movable: Sequence[MovableNumber]
    storage: Storage
    requested_backend: str | None

    def complete(self, groups: Iterable[Group]) -> None:
        """Gives groups that somebody else has made the options that they lack."""
        for group in groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def check_group(self, group: Group) -> None:
        """Raises TypeError or ValueError if the numbers of a group do not serve."""
        fixed = with_peaks(self.movable, group)
        self.check(fixed)
        self.storage.check(fixed["params"], self.state_names(fixed))
        check_numbers(self.hyper(fixed))

    def check_new_group(self, group: Group) -> None:
        """Raises TypeError, ValueError or RuntimeError if a group cannot be taken in."""
        check_learning_rate(group["lr"])
        if isinstance(group["lr"], Schedule):
            at_height_of(group, group["lr"])
        check_note(group)
        self.check_group(group)
        if group["params"]:
            select_backends(self.requested_backend, group["params"])
        check_params(group["params"], self.name)
