"""The ratios between the learning rates of an optimizer's groups, which AutoLRS keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lrs_ext.positions import Group


def group_ratios(groups: Sequence[Group]) -> list[float]:
    """Returns each group's learning rate over that of the first group, 0 where one of them is 0.

    Such a ratio is unknown: an optimizer has rates of 0 where it has loaded a checkpoint of a
    trial's last updates, or of the end. `check_ratios` refuses them when they are needed.

    Raises:
        ValueError: a learning rate is no number or negative, or a group has an ``lr_scale``.
    """
    rates: list[Any] = [group.get("lr") for group in groups]
    for index, rate in enumerate(rates):
        scale = groups[index].get("lr_scale", 1.0)
        if scale != 1.0:
            raise ValueError(
                f"group {index} has lr_scale={scale}, which AutoLRS does not read: multiply its lr "
                "by it, which keeps the ratio, and take the key out of the group"
            )
        is_number = isinstance(rate, (float, int)) or (
            isinstance(rate, Tensor) and rate.numel() == 1
        )
        if not is_number or not float(rate) >= 0.0:
            raise _no_ratio(index, rate)
    first = float(rates[0])
    return [float(rate) / first if first else 0.0 for rate in rates]


def check_ratios(ratios: Sequence[float]) -> None:
    """Raises ValueError if one of the `group_ratios` is unknown."""
    if 0.0 in ratios:
        raise _no_ratio(list(ratios).index(0.0), 0.0)


def _no_ratio(index: int, rate: Any) -> ValueError:
    return ValueError(
        "AutoLRS keeps the ratios between the learning rates of the groups, so each needs a "
        f"positive one; group {index} has {rate!r}: give the optimizer lr=1e-3, say"
    )
