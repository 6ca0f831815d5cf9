"""Taking over what others have put into the groups and states of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrs_ext import capture_checks
from lrs_ext.checkpoint import check_complete, has_content, last_step, replace_states, unwrap_states
from lrs_ext.device_tables import States
from lrs_ext.functional import FEWEST_STATES, STATE_NAMES
from lrs_ext.positions import Group, Position
from lrs_ext.preparation import Preparation
from lrs_ext.state_storage import REMAINDER


def sync(preparation: Preparation, groups: list[Group], states: States) -> None:
    """Follows the groups and writes what is new in them; see `Preparation.write`."""
    follow(preparation, groups, states)
    preparation.write(groups)


def follow(preparation: Preparation, groups: list[Group], states: States) -> None:
    """Follows whoever has moved or removed groups, or has loaded a checkpoint into them."""
    numbers = preparation.numbers
    if numbers.are_in_place(groups):
        return
    capture_checks.check_places(preparation.is_captured)
    _follow_order(preparation, groups)
    if numbers.are_loaded(groups):
        load(preparation, groups, states, dict(states), in_place=True)
        preparation.write(groups)


def _follow_order(preparation: Preparation, groups: list[Group]) -> None:
    places = preparation.numbers.new_order(groups)
    if places is not None:
        capture_checks.check_same_groups(preparation.was_captured)
        preparation.numbers.rearrange(groups, places)
        preparation.forget_tables()


def expect_load(preparation: Preparation, groups: list[Group]) -> None:
    """Makes ready for a checkpoint, also groups that somebody has put beside those known so far.

    A schedule that was put into a group, or put aside for a while and back, is then in charge.

    Raises:
        TypeError, ValueError, RuntimeError: see `Rule.check_new_group`.
    """
    preparation.rule.complete(groups)
    _follow_order(preparation, groups)
    numbers = preparation.numbers
    if numbers.are_elsewhere(groups):
        capture_checks.check_same_groups(preparation.was_captured)
        numbers.readmit(groups)
        buffer = numbers.rates.buffer
        preparation.take_groups(groups, int(buffer.step), buffer.capacity)
    for index, group in enumerate(groups):
        preparation.numbers.sync(index, group)


@torch.no_grad()
def load(
    preparation: Preparation,
    groups: list[Group],
    states: States,
    saved_states: Mapping[Any, Any],
    in_place: bool,
) -> None:
    """Takes over a checkpoint; whatever can be wrong comes to light before anything is changed.

    Args:
        groups: those of the checkpoint.
        states: the optimizer's, which become equal to `saved_states`.
        in_place: the groups are the optimizer's own, into which a wrapper has put them.
    """
    rule, numbers = preparation.rule, preparation.numbers
    rule.complete(groups)
    names = STATE_NAMES[rule.algorithm]
    loaded = unwrap_states(saved_states, states, rule.storage, names)
    needed = names[: FEWEST_STATES[rule.algorithm]]
    if len(needed) > 1:  # most implementations of Lion, which has one, keep no count
        check_complete(loaded, ["step", *needed])
    updates = last_step(loaded)
    positions = numbers.resume(groups, updates, in_place)
    for position in positions:
        if position is not None and position.schedule is not None:
            numbers.rates.check_room(position.schedule, preparation.was_captured)
    if preparation.was_captured:
        capture_checks.check_loaded_states(states, loaded, [*names, REMAINDER])
    for group in groups:
        rule.check_group(group)
    are_blank = _are_blank(positions, loaded)
    with torch.inference_mode():  # only so it may write to states that were made in that mode
        replace_states(states, loaded)
        preparation.counters.load(states, are_blank)
    buffer = numbers.rates.buffer
    numbers.load(groups, positions, updates)
    if numbers.rates.buffer is buffer:
        preparation.tables.forget_numbers()
    else:  # the tables count in another
        preparation.forget_tables()


def _are_blank(positions: Sequence[Position | None], loaded: Mapping[Any, Any]) -> bool:
    """Returns whether a checkpoint is of an optimizer that has made no update; waits."""
    # One of torch's SGD has no step, but may have momentum.
    is_at_start = all(position is not None and position.step == 0 for position in positions)
    return is_at_start and not any(map(has_content, loaded.values()))
