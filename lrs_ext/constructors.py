"""The schedules that there are: one function each.

Those with a budget share `warmup_steps`, `min_lr` and `sampling`, see `ProfileSchedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lrs_ext.number_checks import (
    checked_fractions,
    checked_learning_rate,
    checked_positive_count,
)
from lrs_ext.profile_schedule import ProfileSchedule, Sampling
from lrs_ext.profiles import Parameter
from lrs_ext.schedules import Schedule
from lrs_ext.table_schedules import JoinedSchedule, TableSchedule


def rex(
    lr: float,
    total_steps: int,
    *,
    d: float = 0.5,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the REX schedule, f(p) = (1 - p) / (1 - d p).

    Args:
        lr: the peak, at the first update after the warm-up.
        total_steps: the budget in optimizer updates, warm-up included.
        d: in [0, 1). 0.5 is the paper's curve 2(1 - p) / (2 - p), 0 is linear, towards 1 it stays
            high longer; 0.9 is the value in the authors' later code.
        warmup_steps, min_lr, sampling: see `ProfileSchedule`.

    Raises:
        ValueError: a number is outside its range.

    Source: Chen, Wolfe, Kyrillidis, REX: Revisiting Budgeted Training with an Improved Schedule,
    MLSys 2022, arXiv 2107.04197.

    >>> round(rex(3e-4, total_steps=10_000)(5_000), 9)
    0.0002
    >>> [round(rex(0.1, 1000, sampling="50-75")(k), 4) for k in (0, 499, 500, 750)]
    [0.1, 0.1, 0.0667, 0.04]
    """
    return _schedule("rex", lr, total_steps, warmup_steps, min_lr, sampling, d=d)


def linear(
    lr: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the linear decay, f(p) = 1 - p; the arguments are those of `rex`.

    Source: Li, Yumer, Ramanan, Budgeted Training, ICLR 2020, arXiv 1905.04753.

    >>> linear(0.1, 100, min_lr=0.01)(50)
    0.055
    """
    return _schedule("linear", lr, total_steps, warmup_steps, min_lr, sampling)


def cosine(
    lr: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the cosine decay, f(p) = (1 + cos(pi p)) / 2; the arguments are those of `rex`.

    Source: Loshchilov, Hutter, SGDR, ICLR 2017, arXiv 1608.03983.

    >>> cosine(0.1, 100)(50)
    0.05
    """
    return _schedule("cosine", lr, total_steps, warmup_steps, min_lr, sampling)


def exponential(
    lr: float,
    total_steps: int,
    *,
    gamma: float = -3.0,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the exponential decay, f(p) = exp(gamma p), which ends at exp(gamma), not at 0.

    Args:
        gamma: 0 or less; -3 ends at 0.0498, and is the best one according to the source.
        lr, total_steps, warmup_steps, min_lr, sampling: see `rex`.

    Raises:
        ValueError: a number is outside its range.

    Source: section 4.1 of arXiv 2107.04197.

    >>> round(exponential(1.0, 100)(100), 4)
    0.0498
    """
    return _schedule("exponential", lr, total_steps, warmup_steps, min_lr, sampling, gamma=gamma)


def step_decay(
    lr: float,
    total_steps: int,
    *,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the step schedule, f(p) = gamma ** (milestones at or before p).

    Args:
        milestones: increasing fractions of the budget after the warm-up; x is reached at the
            update ceil(x * (total_steps - warmup_steps)).
        gamma: the factor at each milestone, in [0, 1].
        lr, total_steps, warmup_steps, min_lr, sampling: see `rex`.

    Raises:
        ValueError: a number is outside its range, or the milestones do not increase.

    Source: the schedule "50-75" of section 4.1 of arXiv 2107.04197.

    >>> step_decay(0.1, 8).values(0, 8).round(6).tolist()
    [0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    """
    fractions = checked_fractions("milestones", milestones)
    own: dict[str, Parameter] = {"milestones": fractions, "gamma": gamma}
    return _schedule("step_decay", lr, total_steps, warmup_steps, min_lr, sampling, **own)


def delayed_linear(
    lr: float,
    total_steps: int,
    *,
    delay: float = 0.5,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns f(p) = 1 up to p = delay and then (1 - p) / (1 - delay).

    Args:
        delay: share of the budget at the peak, in [0, 1); 0 is linear.
        lr, total_steps, warmup_steps, min_lr, sampling: see `rex`.

    Raises:
        ValueError: a number is outside its range.

    Source: section 4.1 of arXiv 2107.04197; Iyer et al., Wide-minima Density Hypothesis and the
    Explore-Exploit Learning Rate Schedule, JMLR 24, 2023.

    >>> delayed_linear(1.0, 8).values(0, 9).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return _schedule("delayed_linear", lr, total_steps, warmup_steps, min_lr, sampling, delay=delay)


def polynomial(
    lr: float,
    total_steps: int,
    *,
    power: float = 1.0,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the polynomial decay, f(p) = (1 - p) ** power.

    Args:
        power: positive; 1 is linear, more falls faster at first.
        lr, total_steps, warmup_steps, min_lr, sampling: see `rex`.

    Raises:
        ValueError: a number is outside its range.

    Source: as `torch.optim.lr_scheduler.PolynomialLR`.

    >>> polynomial(1.0, 4, power=2.0).values(0, 5).tolist()
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    return _schedule("polynomial", lr, total_steps, warmup_steps, min_lr, sampling, power=power)


def one_cycle(
    lr: float,
    total_steps: int,
    *,
    low: float = 0.1,
    momentum: tuple[float, float] = (0.85, 0.95),
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the triangle f(p) = low + (1 - low) (1 - abs(1 - 2 p)), its peak at p = 0.5.

    It begins at ``low * lr``, sampled or not, and is its own warm-up. Its property `momentum` is a
    schedule that moves against it: from high to low to high.

    Args:
        low: f at both ends, in [0, 1].
        momentum: (low, high), 0 < low <= high < 1.
        lr, total_steps, min_lr, sampling: see `rex`.

    Raises:
        TypeError, ValueError: a number is outside its range.

    Source: Smith, A disciplined approach to neural network hyper-parameters, arXiv 1803.09820, in
    the form of section 4.1 of arXiv 2107.04197.

    >>> cycle = one_cycle(1.0, 4)
    >>> cycle.values(0, 5).tolist(), cycle.momentum.values(0, 5).round(6).tolist()
    ([0.1, 0.55, 1.0, 0.55, 0.1], [0.95, 0.9, 0.85, 0.9, 0.95])
    """
    own: dict[str, Parameter] = {"low": low, "momentum": momentum}
    schedule = _schedule("one_cycle", lr, total_steps, 0, min_lr, sampling, **own)
    if low > 1.0:
        raise ValueError(f"low must be in [0, 1], got {low}")
    return schedule


def wsd(
    lr: float,
    total_steps: int,
    *,
    decay: float = 0.1,
    cooldown: Literal["sqrt", "linear", "cosine", "exponential"] = "sqrt",
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns warm-up, stable, decay: f(p) = 1, then g(q) over the last share `decay`.

    Args:
        decay: share of the budget after the warm-up, in (0, 1].
        cooldown: g of q, the progress in the cool-down: "sqrt" is 1 - sqrt(q), "linear" 1 - q,
            "cosine" (1 + cos(pi q)) / 2, "exponential" exp(-3 q), which ends at 0.0498.
        lr, total_steps, warmup_steps, min_lr, sampling: see `rex`.

    Raises:
        ValueError: a number is outside its range, or there is no such cool-down.

    Source: Hu et al., MiniCPM, arXiv 2404.06395; 1 - sqrt: Haegele et al., Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations, arXiv 2405.18392.

    >>> wsd(1.0, 40).values(35, 41).round(6).tolist()
    [1.0, 1.0, 0.5, 0.292893, 0.133975, 0.0]
    """
    own: dict[str, Parameter] = {"decay": decay, "cooldown": cooldown}
    return _schedule("wsd", lr, total_steps, warmup_steps, min_lr, sampling, **own)


def inverse_sqrt(
    lr: float,
    *,
    warmup_steps: int,
    capacity: int = 1_000_000,
    min_lr: float = 0.0,
    sampling: int = 1,
) -> Schedule:
    """Returns ``lr * sqrt(warmup_steps / (k + 1))`` at update k, after a warm-up, without an end.

    Args:
        warmup_steps: positive.
        capacity: how many values a buffer gets, `warmup_steps` or more; the last one holds.
        lr, min_lr, sampling: see `rex`.

    Raises:
        ValueError: a number is outside its range.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762.

    >>> schedule = inverse_sqrt(1.0, warmup_steps=4)
    >>> schedule(3), schedule(15), schedule(399)
    (1.0, 0.5, 0.1)
    """
    return _schedule("inverse_sqrt", lr, None, warmup_steps, min_lr, sampling, capacity=capacity)


def constant(
    lr: float,
    total_steps: int | None = None,
    *,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the constant schedule, f(p) = 1, without an end unless `total_steps` is given.

    Source: the baseline "none" of arXiv 2107.04197.

    >>> constant(0.1, warmup_steps=2).values(0, 4).tolist()
    [0.05, 0.1, 0.1, 0.1]
    """
    return _schedule("constant", lr, total_steps, warmup_steps, min_lr, sampling)


def from_values(values: ArrayLike) -> Schedule:
    """Returns the schedule with ``values[k]`` at update k; the last one holds.

    Args:
        values: (n,), finite and not negative; n becomes `total_steps`.

    Raises:
        TypeError, ValueError: it is no such array.

    >>> from_values([0.3, 0.2, 0.1]).values(0, 5).tolist()
    [0.3, 0.2, 0.1, 0.1, 0.1]
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, or a tensor NumPy cannot take
        raise TypeError(f"values must be an array or a list of numbers: {error}") from None
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values must be 1-d and not empty, got shape {array.shape}")
    return TableSchedule.of(np.append(array, array[-1:]))


def from_function(f: Callable[[int], float], total_steps: int) -> Schedule:
    """Returns the schedule with f(k) at update k; from `total_steps` on, f(total_steps) holds.

    The function is called here, once for every step; only its values are kept.

    Args:
        f: from a step, 0 to total_steps, to a learning rate.
        total_steps: the budget in optimizer updates.

    Raises:
        TypeError, ValueError: f is no function or returns no learning rate, or `total_steps` is not
            positive.

    >>> from_function(lambda k: 0.5**k, total_steps=3).values(0, 5).tolist()
    [1.0, 0.5, 0.25, 0.125, 0.125]
    """
    total_steps = checked_positive_count("total_steps", total_steps)
    if not callable(f):
        raise TypeError(f"f must be a function of the step, got {f!r}")
    try:
        table = np.empty(total_steps + 1)
    except (MemoryError, ValueError):
        raise ValueError(f"total_steps = {total_steps} values do not fit into memory") from None
    for k in range(total_steps + 1):
        table[k] = checked_learning_rate(f(k), f"f({k})")
    return TableSchedule.of(table)


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Returns schedules one after another, each counting from its own start.

    Args:
        schedules: n schedules; one that is shorter than its place holds its last value there, one
            that is longer is cut.
        boundaries: n - 1 increasing positive updates: the second schedule starts at the first one.

    Raises:
        TypeError, ValueError: something is no schedule, or the boundaries do not fit.

    >>> join([constant(1.0), linear(0.5, 2)], boundaries=[2]).values(0, 5).tolist()
    [1.0, 1.0, 0.5, 0.25, 0.0]
    """
    if not isinstance(schedules, Iterable) or not isinstance(boundaries, Iterable):
        raise TypeError(f"join takes two lists, got {schedules!r} and {boundaries!r}")
    return JoinedSchedule.of(tuple(schedules), boundaries)


def named_schedule(name: str, total_steps: int, sampling: Sampling = 1) -> Schedule:
    """Returns the schedule of height 1 that a constructor with a budget makes by default.

    Args:
        name: of the constructor.
        total_steps, sampling: see `rex`.

    Raises:
        ValueError: there is no such schedule, or a number is outside its range.

    >>> named_schedule("wsd", 100)
    wsd(lr=1.0, total_steps=100, decay=0.1, cooldown='sqrt')
    """
    if name not in _BY_NAME:
        raise ValueError(f"schedule must be one of {sorted(_BY_NAME)} or a Schedule, got {name!r}")
    return _BY_NAME[name](1.0, total_steps, sampling=sampling)


_BY_NAME: Mapping[str, Callable[..., Schedule]] = {
    function.__name__: function
    for function in (
        constant,
        cosine,
        delayed_linear,
        exponential,
        linear,
        one_cycle,
        polynomial,
        rex,
        step_decay,
        wsd,
    )
}


def _schedule(
    profile: str,
    lr: float,
    total_steps: int | None,
    warmup_steps: int,
    min_lr: float,
    sampling: Sampling,
    **parameters: Parameter,
) -> Schedule:
    return ProfileSchedule(
        profile=profile,
        lr=lr,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        min_lr=min_lr,
        sampling=sampling,
        parameters=tuple(parameters.items()),
    )
