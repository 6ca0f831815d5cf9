"""Where the schedules of a parameter group stand, as checkpoints keep it: in the group itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_ext.number_checks import checked_learning_rate
from lrs_ext.schedules import Schedule
from lrs_ext.table_schedules import TableSchedule

Group = dict[str, Any]
# Of a group in a checkpoint: a text, or a list of it and the tables of its schedules. Tables are
# strings, not tensors: distributed checkpoints load a tensor only into another of its size.
Entry = str | list[str]
Note = dict[str, Entry]  # in a group that is alive: empty, or the position at the last `state_dict`
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


def put_position(
    group: Group, position: Position, updates: int | None, shown: Any, tables: dict[bytes, str]
) -> None:
    """Puts a position into a group of a checkpoint; see `LearningRates.save`.

    Args:
        tables: what is in the other groups, by its float64 values: equal tables become the same
            object, which `torch.save` writes once.
    """
    own: list[str] = []

    def described(part: Schedule | bytes) -> dict[str, Any] | int:
        if isinstance(part, Schedule):
            return part.fields()
        if part not in tables:
            tables[part] = _table_text(np.frombuffer(part))
        own.append(tables[part])
        return len(own)  # its place behind the text

    lr = group["lr"]
    text = json.dumps(
        {
            "schedule": position.schedule,
            "step": position.step,
            "lr": lr,
            "shown": shown if isinstance(shown, float) else lr,
            "updates": updates,
            "numbers": position.numbers,
        },
        default=described,
    )
    group["schedule"] = [text, *own] if own else text


def position_in(group: Group) -> Entry | None:
    """Returns what `put_position` has put into a group, by itself or in a `Note`."""
    note = group.get("schedule")
    entry = note.get(POSITION) if isinstance(note, dict) else note
    text = entry[0] if isinstance(entry, list) and entry else entry
    return entry if isinstance(text, str) and text.startswith(_START) else None


def check_note(group: Group) -> None:
    """Raises ValueError if somebody else's entry is where a group keeps its `Note`."""
    entry = group.get("schedule")
    if not (entry is None or isinstance(entry, dict) or position_in(group) is not None):
        raise ValueError(
            "a parameter group keeps its position in the schedule under 'schedule', got "
            f"{entry!r} there: pass a schedule as lr, and give anything else another name"
        )


def saved_position(
    group: Group, updates: int | None, in_place: bool, tables: dict[str, Schedule]
) -> Position | None:
    """Reads what `put_position` has put into a group of a checkpoint.

    Optimizers of torch carry keys that they do not know along. A position is believed only if the
    learning rate and the largest step count of the states (`updates`) are still those it was saved
    with; otherwise, and where there is none, the result is None.

    Args:
        in_place: a wrapper has put it into the group of a live optimizer. As with a `Note`, the
            states are then those of one rank, which may have made fewer updates than the one that
            has saved it. Another learning rate is what the host has put there since.
        tables: those read so far, which groups share.

    Raises:
        ValueError: the learning rate or the schedule is not valid.
    """
    lr = checked_learning_rate(float(group["lr"]))
    entry = position_in(group)
    if entry is None:
        return None
    saved = _read(entry, tables)
    schedule = saved["schedule"]
    if in_place or isinstance(group["schedule"], dict):
        if updates is not None and updates > max(saved["step"], saved["updates"] or 0):
            return None
        if lr not in (saved["lr"], saved["shown"]):
            if not in_place:
                return None
            schedule = None
    elif saved["lr"] != lr or saved["updates"] != updates:
        return None
    return Position(schedule, saved["step"], saved.get("numbers", {}))


def _read(entry: Entry, tables: dict[str, Schedule]) -> dict[str, Any]:
    """Returns what `put_position` has written, with schedules in their places."""
    entry = [entry] if isinstance(entry, str) else entry

    def read(fields: dict[str, Any]) -> Any:
        if fields.get("profile") == "table":
            table = entry[fields["values"]]
            if table not in tables:
                tables[table] = TableSchedule.of(_table_values(table))
            return tables[table]
        return Schedule.from_dict(fields) if "profile" in fields else fields

    saved: dict[str, Any] = json.loads(entry[0], object_hook=read)
    return saved


def _table_text(values: NDArray[np.float64]) -> str:
    """Returns float64 values as text, to the bit, of half the length if they are float32."""
    with np.errstate(over="ignore"):
        short = values.astype("<f4")
    array = short if np.array_equal(short, values) else values.astype("<f8")
    return f"{array.dtype.str}:{base64.b64encode(array.tobytes()).decode()}"


def _table_values(text: str) -> NDArray[np.float64]:
    dtype, _, code = text.partition(":")
    return np.frombuffer(base64.b64decode(code), dtype)
