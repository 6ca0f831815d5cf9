"""Divergence in training: what counts as one, and what is then undone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrs_ext.autolrs.measurements import Measurements
from lrs_ext.autolrs.notices import Notices
from lrs_ext.autolrs.presets import Search
from lrs_ext.autolrs.ranks import Ranks
from lrs_ext.autolrs.rates import Rates
from lrs_ext.autolrs.search import FAR, noise_std
from lrs_ext.autolrs.snapshot import Snapshot
from lrs_ext.autolrs.timetable import LOOKS, Segment

QUARTER = 4  # of the losses since a look, the last ones are judged,
LEAST = 3  # but no fewer than so many, or else half of them
NOISE_STDS = 2.0  # that the loss before the stage may have been underestimated by


class Guard:
    """Looks at the training a few times in each stage, on all ranks, and undoes a divergence.

    Attributes:
        scales: float64, (segments, looks): what each look has multiplied the rate with.
    """

    def __init__(
        self,
        search: Search,
        measured: Measurements,
        snapshot: Snapshot,
        rates: Rates,
        ranks: Ranks,
        notices: Notices,
    ) -> None:
        self._search, self._measured, self._snapshot = search, measured, snapshot
        self._rates, self._ranks, self._notices = rates, ranks, notices
        self._segments = search.timetable.segments
        self.scales = search.grid.new_ones(len(self._segments), LOOKS)

    def look(self, segment: Segment, updates: int) -> None:
        """Rolls training back to the last good state, at half the rate, where it has diverged.

        The schedule goes on: the run ends where it was to end, annealed. After most of the updates
        of a run, there is nothing to do.
        """
        done = updates - segment.start
        if done % segment.look_steps != 0 and updates != segment.end:
            return
        look = (done - 1) // segment.look_steps
        begin = segment.start + look * segment.look_steps
        scales = self.scales[self._segments.index(segment)]
        losses = self._measured.of_updates(begin, updates)
        # Not search.start: val_loss may have another scale.
        trial = self._measured.of_first_trial(segment.stage)
        start, std = self._search.starting_loss(trial), noise_std(trial)
        level = start
        if look > 0:
            before = self._measured.of_updates(begin - segment.look_steps, begin)
            level = good_level(before, losses, scales[look - 1] < 1.0)
        bad = has_diverged(losses, start, std, level, self._snapshot.trained())
        bad = self._ranks.any(bad)
        self._notices.expect(bad, [rolled_back(begin, updates)])
        self._snapshot.restore_where(bad)
        self._snapshot.capture()
        scale = torch.where(bad, 0.5, 1.0)
        scales[look].copy_(scale)
        self._rates.scale_(scale)


def good_level(before: Tensor, losses: Tensor, was_bad: Tensor) -> Tensor:
    """Returns the training loss with the last good state, 0-d.

    Args:
        before: of the updates between the last two looks, (m,).
        losses: of the updates since the last look, (n,), the first one made with that state.
        was_bad: whether training was rolled back at the last look, bool, 0-d.
    """
    quarter = max(len(losses) // QUARTER, 1)
    return torch.where(was_bad, losses[:quarter].amin(), _last_level(before))


def has_diverged(
    losses: Tensor,
    start: Tensor,
    std: Tensor,
    level: Tensor,
    params: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Returns whether training has left the rails, bool, 0-d, without a sync.

    It has if a loss is not finite, or an entry of a parameter that was, or if the median of the
    last quarter of the losses, which a spike leaves alone, is above twice the loss before the
    stage, with an allowance for noise. Where the task itself becomes harder, what was good at the
    last look counts instead.

    Args:
        losses: of the updates since the last look, (n,).
        start, std: the training loss before the stage, as `losses` are, and its standard deviation
            from batch to batch, 0-d, of which no more than `start` is noise: the trial that it is
            measured in may have diverged. Where `start` is not positive, only what is not finite
            counts.
        level: see `good_level`, 0-d.
        params: what this rank has of each, which may be nothing, and the last good copy of it, on
            any device. What is not finite there, such as a mask of -inf, is meant to be so.
    """
    harder = (level / start).nan_to_num(nan=1.0).clamp(min=1.0)
    allowance = NOISE_STDS * std.minimum(start)
    limit = torch.where(start > 0.0, FAR * (start + allowance) * harder, torch.inf)
    is_bad = ~losses.isfinite().all() | (_last_level(losses) > limit)
    are_good = [_stays_finite(param, copy).to(losses.device) for param, copy in params]
    return is_bad | ~torch.stack(are_good).all() if are_good else is_bad


def rolled_back(begin: int, end: int) -> str:
    """Returns what to tell of a divergence."""
    return (
        f"training has diverged in updates {begin + 1} to {end}, which are undone: losses or "
        f"weights were not finite, or losses above {FAR:g} times those before the search (or since "
        "the task became harder). It goes on at half the learning rate"
    )


def _last_level(losses: Tensor) -> Tensor:
    count = max(len(losses) // QUARTER, min(len(losses) // 2, LEAST), 1)
    return losses[-count:].median()


def _stays_finite(param: Tensor, copy: Tensor) -> Tensor:
    copy = copy.to(param.device, non_blocking=True)
    return (param.isfinite() | ~copy.isfinite()).all()
