"""The numbers of the parameter groups that may follow schedules, on the host and on the device."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrs_ext import ops
from lrs_ext.hyper_schedules import HyperSchedules, MovableNumber, put_schedules
from lrs_ext.learning_rates import Kept, LearningRates, Mark
from lrs_ext.positions import (
    POSITION,
    Group,
    Note,
    Position,
    position_in,
    saved_position,
)
from lrs_ext.rule import Rule
from lrs_ext.schedules import Schedule


class GroupNumbers:
    """Learning rates and other numbers of the groups, which advance together.

    Each group has a `Note` under "schedule", into which `save` writes the position. It is for
    wrappers such as ZeroRedundancyOptimizer, which have groups of their own with the same objects,
    save those instead of what `state_dict` returns, and put what they load into these groups.

    Args:
        rule: says what else than the learning rate may follow a schedule.
        groups: the optimizer's parameter groups; schedules in them are replaced by floats.
        devices: where the parameters are.
        step: committed updates so far.
        capacity: the least length of a row of learning rates.

    Attributes:
        rates: the learning rates; another object when their buffers have been replaced.
        hyper_schedules: the other numbers.
    """

    _notes: list[Note]

    def __init__(
        self,
        rule: Rule,
        groups: list[Group],
        devices: Sequence[torch.device],
        step: int,
        capacity: int,
    ) -> None:
        self._rule = rule
        self.rates = LearningRates(groups, devices, step, capacity)
        self.hyper_schedules = HyperSchedules(rule.movable, groups, devices, step)
        self._renew_notes(groups)

    def __len__(self) -> int:
        return len(self._notes)

    def are_in_place(self, groups: list[Group]) -> bool:
        """Returns whether all groups are where they were, with their notes."""
        notes = (group.get("schedule") for group in groups)
        return len(groups) == len(self._notes) and all(map(operator.is_, notes, self._notes))

    def are_loaded(self, groups: list[Group]) -> bool:
        """Returns whether somebody has put the position of a checkpoint into a group.

        Raises:
            RuntimeError: there are more or fewer groups than before; or a schedule is in charge
                where somebody has put another group, such as one of a checkpoint without positions.
        """
        if len(groups) != len(self._notes):
            raise RuntimeError(
                f"there are {len(groups)} parameter groups where there were {len(self._notes)}: "
                "add them with add_param_group"
            )
        foreign = [
            index
            for index, (group, note) in enumerate(zip(groups, self._notes, strict=True))
            if group.get("schedule") is not note
        ]
        if any(position_in(groups[index]) is not None for index in foreign):
            return True
        for index in foreign:
            has_note = isinstance(groups[index].get("schedule"), dict)
            if has_note and self.schedules(index) and not self.is_synced(index, groups[index]):
                raise RuntimeError(
                    f"group {index} is not the one that was there, and has no position in the "
                    "schedule: add groups with add_param_group; where a wrapper saves groups of "
                    "its own, save and load the state_dict() of the optimizer inside of it"
                )
        return False

    def places_before(self, groups: list[Group]) -> list[int | None]:
        """Returns where each group was, None for one that is not known."""
        known = {id(note): index for index, note in enumerate(self._notes)}
        return [known.get(id(group.get("schedule"))) for group in groups]

    def new_order(self, groups: list[Group]) -> list[int] | None:
        """Returns where groups were of which some have been removed or have changed places.

        It is None where all are in their places, or some are not known.
        """
        places = [place for place in self.places_before(groups) if place is not None]
        are_all_known = len(set(places)) == len(groups)
        return places if are_all_known and places != [*range(len(self._notes))] else None

    def are_elsewhere(self, groups: list[Group]) -> bool:
        """Returns whether there are more or fewer groups, or a known one has changed places."""
        places = enumerate(self.places_before(groups))
        is_moved = any(place not in (None, index) for index, place in places)
        return is_moved or len(groups) != len(self._notes)

    def readmit(self, groups: list[Group]) -> None:
        """Puts the schedules in charge back into the groups that are known, wherever they are.

        Raises:
            TypeError, ValueError, RuntimeError: a group cannot be taken in.
        """
        in_charge = []
        for group, place in zip(groups, self.places_before(groups), strict=True):
            if place is None:
                self._rule.check_new_group(group)
            else:
                self.sync(place, group)
            in_charge.append({} if place is None else self.schedules(place))
        for group, schedules in zip(groups, in_charge, strict=True):
            put_all_schedules(self._rule.movable, group, schedules)

    def rearrange(self, groups: list[Group], places: Sequence[int]) -> None:
        """Takes the numbers of the groups along to where these are now, from `places`."""
        self.rates = self.rates.rearranged(groups, places)
        self.hyper_schedules.rearrange(places)
        self._notes = [self._notes[place] for place in places]

    def _renew_notes(self, groups: list[Group]) -> None:
        self._notes = [{} for _ in groups]
        for group, note in zip(groups, self._notes, strict=True):
            group["schedule"] = note

    @property
    def devices(self) -> list[torch.device]:
        return list(self.rates.buffers)

    def sync(self, index: int, group: Group) -> Group:
        """Writes what the host has put into the group to the device; see `HyperSchedules.sync`."""
        self.rates.sync(index, group)
        return self.hyper_schedules.sync(index, group, self.rates.step, self._rule.check)

    def is_synced(self, index: int, group: Group) -> bool:
        """Returns whether there is nothing new in the group for `sync` to take over."""
        rates_are_synced = self.rates.is_synced(index, group)
        return rates_are_synced and self.hyper_schedules.is_synced(index, group)

    def advance(
        self, groups: list[Group], known: ops.KnownGroups, found_inf: Tensor | None = None
    ) -> None:
        """Follows an update on the host; see `LearningRates.advance`."""
        self.rates.advance(groups, known, found_inf)
        if self.hyper_schedules.are_there:
            known.change(groups, lambda: self.hyper_schedules.show(groups, self.rates.step))
        if any(self._notes):  # what has been saved stays as it is
            self._renew_notes(groups)

    def roll_back(self, groups: list[Group], mark: Mark) -> None:
        """Follows the first device's step back to where it stood."""
        self.rates.roll_back(mark)
        self.hyper_schedules.show(groups, mark.step)

    def follow_device(self, groups: list[Group]) -> None:
        """Takes the position from the device, which alone knows of replayed updates."""
        for index, group in enumerate(groups):
            self.hyper_schedules.sync(index, group, self.rates.step, self._rule.check)
        self.rates.follow_device(groups)
        self.hyper_schedules.show(groups, self.rates.step, is_late=True)

    def add_group(self, groups: list[Group], devices: Sequence[torch.device]) -> None:
        """Takes in a group that has been added to `groups`, which are on `devices` now."""
        is_new_device = list(devices) != self.devices
        self.rates = self.rates.rebuilt(groups, devices)
        self.hyper_schedules.add(groups[-1], self.rates.step)
        if is_new_device:
            self.hyper_schedules = self.hyper_schedules.moved(groups, devices, self.rates.step)
        self._notes.append({})
        groups[-1]["schedule"] = self._notes[-1]

    def move(self, groups: list[Group], devices: Sequence[torch.device]) -> None:
        """Moves everything to other devices."""
        self.rates = self.rates.rebuilt(groups, devices)
        self.hyper_schedules = self.hyper_schedules.moved(groups, devices, self.rates.step)

    def lengthen(self, groups: list[Group], capacity: int) -> bool:
        """Makes the rows of the learning rates longer; returns whether they were too short.

        That waits for the device.
        """
        if self.rates.buffer.capacity >= capacity:
            return False
        self.rates = self.rates.rebuilt(groups, self.devices, capacity)
        return True

    def reserve(self, groups: list[Group], capacity: int) -> bool:
        """As `lengthen`, for somebody who is going to write the rows.

        Raises:
            ValueError: a schedule or a tensor is in charge of a group.
        """
        for index, group in enumerate(groups):
            if self.rates.schedule(index) is not None or isinstance(group["lr"], Tensor):
                raise ValueError(
                    f"the learning rate of group {index} is a schedule or a tensor, which would be "
                    "overwritten: give the optimizer a float"
                )
        return self.lengthen(groups, capacity)

    # Checkpoints and copies

    def save(self, saved_groups: list[Group], updates: int | None, shown: list[Group]) -> None:
        """Adds to the groups of a checkpoint, and to the notes, what it takes to resume.

        Args:
            updates: the largest step count of the states.
            shown: the groups before `follow_device`.
        """
        tables: dict[bytes, str] = {}
        for index, (group, note) in enumerate(zip(saved_groups, self._notes, strict=True)):
            numbers = self.hyper_schedules.save(index, group, shown[index])
            self.rates.save(index, group, updates, numbers, shown[index]["lr"], tables)
            note[POSITION] = group["schedule"]

    def resume(
        self, groups: list[Group], updates: int | None, in_place: bool
    ) -> list[Position | None]:
        """Puts schedules of a checkpoint into its groups; returns where each group stood.

        Args:
            in_place: the groups are the optimizer's own, into which a wrapper has put them.

        Raises:
            ValueError: a learning rate or a schedule is not valid.
        """
        tables: dict[str, Schedule] = {}
        positions = [saved_position(group, updates, in_place, tables) for group in groups]
        for index, (group, position) in enumerate(zip(groups, positions, strict=True)):
            self.hyper_schedules.resume(index, group, position)
        return positions

    def load(
        self, groups: list[Group], positions: list[Position | None], updates: int | None
    ) -> None:
        """Takes over the groups of a checkpoint, in the present rows if they are long enough."""
        self.rates = self.rates.loaded(groups, positions, updates)
        self.hyper_schedules.load(groups, self.rates.step)
        self._renew_notes(groups)

    def schedules(self, index: int) -> dict[str, Schedule]:
        """Returns the schedules that are in charge of a group, by the names of their numbers."""
        lr = self.rates.schedule(index)
        return {**({} if lr is None else {"lr": lr}), **self.hyper_schedules.in_charge(index)}


def put_all_schedules(
    numbers: Sequence[MovableNumber], group: Group, schedules: Mapping[str, Any]
) -> None:
    """Puts what `GroupNumbers.schedules` has returned into a group."""
    if "lr" in schedules:
        group["lr"] = Kept(schedules["lr"])
    put_schedules(numbers, group, schedules)
