"""Where the schedules of a parameter group stand, as checkpoints keep it: in the group itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrs_ext.number_checks import checked_learning_rate
from lrs_ext.schedules import Schedule

Group = dict[str, Any]
Note = dict[str, str]  # in a group that is alive: empty, or the position at the last `state_dict`
POSITION = "position"
_START = '{"schedule":'  # of every position


@dataclass(frozen=True)
class Position:
    """Where a group of a checkpoint stood: its schedule, if one was in charge, and the step.

    `numbers` are what `HyperSchedules.save` has put there.
    """

    schedule: Schedule | None
    step: int
    numbers: Mapping[str, Any]


def put_position(group: Group, position: Position, updates: int | None, shown: Any) -> None:
    """Puts a position into a group of a checkpoint; see `LearningRates.save`."""
    schedule, lr = position.schedule, group["lr"]
    group["schedule"] = json.dumps(
        {
            "schedule": None if schedule is None else schedule.to_dict(),
            "step": position.step,
            "lr": lr,
            "shown": shown if isinstance(shown, float) else lr,
            "updates": updates,
            "numbers": position.numbers,
        }
    )


def position_in(group: Group) -> str | None:
    """Returns what `put_position` has put into a group, by itself or in a `Note`."""
    note = group.get("schedule")
    text = note.get(POSITION) if isinstance(note, dict) else note
    return text if isinstance(text, str) and text.startswith(_START) else None


def check_note(group: Group) -> None:
    """Raises ValueError if somebody else's entry is where a group keeps its `Note`."""
    entry = group.get("schedule")
    if not (entry is None or isinstance(entry, dict) or position_in(group) is not None):
        raise ValueError(
            "a parameter group keeps its position in the schedule under 'schedule', got "
            f"{entry!r} there: pass a schedule as lr, and give anything else another name"
        )


def saved_position(group: Group, updates: int | None, in_place: bool) -> Position | None:
    """Reads what `put_position` has put into a group of a checkpoint.

    Optimizers of torch carry keys that they do not know along. A position is believed only if the
    learning rate and the largest step count of the states (`updates`) are still those it was saved
    with; otherwise, and where there is none, the result is None.

    Args:
        in_place: a wrapper has put it into the group of a live optimizer. As with a `Note`, the
            states are then those of one rank, which may have made fewer updates than the one that
            has saved it. Another learning rate is what the host has put there since.

    Raises:
        ValueError: the learning rate or the schedule is not valid.
    """
    lr = checked_learning_rate(float(group["lr"]))
    text = position_in(group)
    if text is None:
        return None
    saved = json.loads(text)
    fields = saved["schedule"]
    if in_place or isinstance(group["schedule"], dict):
        if updates is not None and updates > max(saved["step"], saved["updates"] or 0):
            return None
        if lr not in (saved["lr"], saved["shown"]):
            if not in_place:
                return None
            fields = None
    elif saved["lr"] != lr or saved["updates"] != updates:
        return None
    schedule = None if fields is None else Schedule.from_dict(fields)
    return Position(schedule, saved["step"], saved.get("numbers", {}))
