"""When trials and stages begin and end: known from step counts alone, before training starts."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Literal

from lrs_ext.number_checks import checked_integer, checked_number

Kind = Literal["warmup", "trial", "train"]

PEAK_FRACTION = 0.1  # of the budget, for the trials
PEAK_TRIALS = (6, 8)  # no fewer and no more, unless the user says so
DOWNHILL_SHARE = 1 / 4  # of the trials of "peak", after those that are spread over the bounds
# Where so many can run at once. Placed without a look at each other, more would crowd together.
DOWNHILL_AT_ONCE = 2
# A trial of "peak" is no shorter and no longer. Longer ones tell the rates no better apart; shorter
# ones than GOOD_STEPS do so worse: a small budget makes fewer trials first, and only then shorter.
TRIAL_STEPS = (4, 10)
GOOD_STEPS = 8
IDLE_SHARE = 1 / 5  # of a trial's updates, at its end and at rate zero: only their losses count
LOOKS = 10  # for divergence, in the training of a stage
PAPER_TRIALS = 10
# tau of the reference code (YuchenJin/autolrs): it grows and then stays.
PAPER_STAGE_STEPS = (1000, 2000, 4000, 8000)
MIN_FORECAST_STEPS = 4  # points that a forecast needs


@dataclass(frozen=True)
class Segment:
    """Updates in a row at one purpose.

    Attributes:
        kind: "warmup", "trial" or "train".
        stage: which stage it belongs to, from 0.
        trial: which trial of the stage it is, or the first of a wave, from 0; 0 also where it is
            none.
        start: updates before it, in the whole run.
        steps: updates in it.
        look_steps: a training segment is checked for divergence after every so many updates, and at
            its end.
        width: trials that run at once, each on ranks of its own.
    """

    kind: Kind
    stage: int
    trial: int
    start: int
    steps: int
    look_steps: int
    width: int = 1

    @property
    def trials(self) -> range:
        """Which trials of the stage it has."""
        return range(self.trial, self.trial + self.width if self.kind == "trial" else self.trial)

    @property
    def end(self) -> int:
        return self.start + self.steps


@dataclass(frozen=True)
class Timetable:
    """All segments of a run.

    Attributes:
        segments: in order, without gaps; the last one is of kind "train".
        num_trials: trials in each stage.
        num_downhill: how many of them, the last ones, look closer where the others were best.
        at_once: trials of a full wave.
    """

    segments: tuple[Segment, ...]
    num_trials: int
    num_downhill: int = 0
    at_once: int = 1

    @property
    def total_steps(self) -> int:
        return self.segments[-1].end

    @property
    def num_stages(self) -> int:
        return self.segments[-1].stage + 1

    @property
    def search_steps(self) -> int:
        """Updates in trials, those of a wave counted once."""
        return sum(segment.steps for segment in self.segments if segment.kind == "trial")

    def index_at(self, updates: int) -> int:
        """Returns which segment the next update belongs to; at the end, the last one."""
        ends = [segment.end for segment in self.segments]
        return min(bisect.bisect_right(ends, updates), len(ends) - 1)

    def stage(self, index: int) -> tuple[list[Segment], Segment]:
        """Returns the trials of a stage, by waves, and the training that follows them."""
        own = [segment for segment in self.segments if segment.stage == index]
        trials = [segment for segment in own if segment.kind == "trial"]
        return trials, next(segment for segment in own if segment.kind == "train")


def timetable_of(
    preset: str,
    *,
    total_steps: int,
    search_fraction: float | None,
    num_trials: int | None,
    stage_steps: int | Sequence[int] | None,
    trial_steps: int | None,
    warmup_steps: int,
    replicas: int = 1,
) -> Timetable:
    """Returns the timetable of a preset; see `AutoLRS` for the arguments.

    Args:
        replicas: how many trials can run at once.

    Raises:
        TypeError, ValueError: an argument is out of range, or the trials do not fit the budget.
    """
    total_steps = _checked_count("total_steps", total_steps)
    warmup_steps = _checked_count("warmup_steps", warmup_steps, least=0)
    if num_trials is not None:
        num_trials = _checked_count("num_trials", num_trials)
    if trial_steps is not None:
        trial_steps = _checked_count("trial_steps", trial_steps)
    if preset == "paper":
        if search_fraction is not None:
            raise ValueError(
                'search_fraction is for preset="peak": "paper" searches in every stage, by '
                "num_trials and trial_steps"
            )
        trials = num_trials or PAPER_TRIALS
        return paper_stages(
            total_steps, trials, stage_steps, trial_steps, warmup_steps, min(replicas, trials)
        )
    if preset != "peak":
        raise ValueError(f'preset must be "peak" or "paper", got {preset!r}')
    if stage_steps is not None:
        raise ValueError('stage_steps is for preset="paper": "peak" has one stage')
    if search_fraction is None:
        search_fraction = PEAK_FRACTION
    if not 0.0 < checked_number("search_fraction", search_fraction) < 0.5:
        raise ValueError(f"search_fraction must be in (0, 0.5), got {search_fraction}")
    return search_then_train(total_steps, search_fraction, num_trials, trial_steps, replicas)


def search_then_train(
    total_steps: int,
    search_fraction: float,
    num_trials: int | None,
    trial_steps: int | None,
    replicas: int = 1,
) -> Timetable:
    """Returns one stage: trials of equal length, then all that remains of the budget.

    Args:
        search_fraction: share of the budget that the trials take, as far as their limits allow.
        num_trials, trial_steps: None goes by `search_fraction`; trials then fill waves.
        replicas: how many trials can run at once. Those that are spread over the bounds need not
            wait for each other, and those that go downhill are placed together.

    Raises:
        ValueError: there are too few trials, or they take half of the budget or more.
    """
    budget = search_fraction * total_steps
    trials = num_trials
    if trials is None:
        trials = _within(PEAK_TRIALS, replicas * budget / (trial_steps or GOOD_STEPS))
    if trials < 3:
        raise ValueError(f'num_trials must be at least 3 for preset="peak", got {trials}')
    downhill = max(int(DOWNHILL_SHARE * trials), 1)
    spread = trials - downhill
    at_once = min(replicas, spread)
    if num_trials is None:
        spread = -(-spread // at_once) * at_once
        downhill = max(downhill, min(at_once, DOWNHILL_AT_ONCE))
    waves = [*_waves(0, spread, at_once), *_waves(spread, downhill, at_once)]
    if trial_steps is None:
        trial_steps = _within(TRIAL_STEPS, budget / len(waves))
    search = len(waves) * trial_steps
    if 2 * search >= total_steps:
        raise ValueError(
            f"{len(waves)} trials of {trial_steps} updates need total_steps > {2 * search}, got "
            f"{total_steps}: raise it, or lower num_trials or trial_steps"
        )
    parts = _stages([(trial_steps, total_steps - search)], waves)
    return Timetable(_in_order(parts), spread + downhill, downhill, at_once)


def _waves(first: int, count: int, at_once: int) -> list[range]:
    """Returns which of `count` trials, the first of which is `first`, run at once."""
    end = first + count
    return [range(begin, min(begin + at_once, end)) for begin in range(first, end, at_once)]


def _within(limits: tuple[int, int], value: float) -> int:
    return min(max(int(value), limits[0]), limits[1])


def paper_stages(
    total_steps: int,
    num_trials: int,
    stage_steps: int | Sequence[int] | None,
    trial_steps: int | None,
    warmup_steps: int,
    at_once: int,
) -> Timetable:
    """Returns a warm-up and stages of `num_trials` trials and `stage_steps` of training each.

    What is left behind the last whole stage is trained as part of it.

    Args:
        at_once: trials that run at once.
        stage_steps: tau, an int or a sequence whose last entry goes on; None is 1,000, 2,000,
            4,000, 8,000, 8,000, ...
        trial_steps: tau'; None is a tenth of the stage's tau, and no less than a forecast needs.

    Raises:
        ValueError: the first stage does not fit into the budget, or a trial is too short to
            forecast from.
    """
    waves = _waves(0, num_trials, at_once)
    if stage_steps is None:
        stage_steps = PAPER_STAGE_STEPS
    given = stage_steps if isinstance(stage_steps, Iterable) else (stage_steps,)
    sizes = tuple(_checked_count("stage_steps", size) for size in given)
    if not sizes:
        raise ValueError(f"stage_steps must have at least one entry, got {stage_steps}")
    remaining = total_steps - warmup_steps
    stages: list[tuple[int, int]] = []
    for tau in chain(sizes, repeat(sizes[-1])):
        trial = max(tau // 10, MIN_FORECAST_STEPS) if trial_steps is None else trial_steps
        if trial < MIN_FORECAST_STEPS:
            raise ValueError(
                f"a trial must have at least {MIN_FORECAST_STEPS} updates to forecast from, got "
                f"{trial}: raise stage_steps or trial_steps"
            )
        cost = len(waves) * trial + tau
        if cost > remaining:
            if not stages:
                raise ValueError(
                    f"the first stage needs {cost} updates ({len(waves)} trials of {trial}, then "
                    f"{tau}), {remaining} are there: raise total_steps, or give smaller "
                    "stage_steps, trial_steps or num_trials"
                )
            break
        stages.append((trial, tau))
        remaining -= cost
    trial, tau = stages[-1]
    stages[-1] = (trial, tau + remaining)
    warmup = [Segment("warmup", 0, 0, 0, warmup_steps, warmup_steps)] if warmup_steps else []
    parts = _stages(stages, waves)
    return Timetable(_in_order(chain(warmup, parts)), num_trials, at_once=at_once)


def _stages(sizes: list[tuple[int, int]], waves: list[range]) -> Iterator[Segment]:
    for stage, (trial_steps, train_steps) in enumerate(sizes):
        for wave in waves:
            yield Segment("trial", stage, wave.start, 0, trial_steps, trial_steps, len(wave))
        yield Segment("train", stage, 0, 0, train_steps, -(-train_steps // LOOKS))


def _in_order(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    ordered: list[Segment] = []
    for segment in segments:
        start = ordered[-1].end if ordered else 0
        ordered.append(dataclasses.replace(segment, start=start))
    return tuple(ordered)


def _checked_count(name: str, value: int, least: int = 1) -> int:
    count = checked_integer(name, value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count
