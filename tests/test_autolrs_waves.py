"""Trials that run at once: when, where they are placed, and on which batches."""

import math

import pytest
import torch
from test_batches import draw

from lrs_ext.autolrs.batches import Tape
from lrs_ext.autolrs.presets import PaperSearch, PeakSearch
from lrs_ext.autolrs.timetable import search_then_train, timetable_of

BOUNDS = (1e-4, 1e0)
CPU = torch.device("cpu")


def waves(timetable, stage=0):
    return [list(segment.trials) for segment in timetable.stage(stage)[0]]


@pytest.mark.parametrize(
    ("num_trials", "replicas", "wanted"),
    [
        (8, 1, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        (8, 2, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (8, 4, [[0, 1, 2, 3], [4, 5], [6, 7]]),
        (8, 64, [[0, 1, 2, 3, 4, 5], [6, 7]]),  # those that go downhill need the others
        (3, 2, [[0, 1], [2]]),
        (None, 2, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (None, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),  # waves over the bounds are filled
    ],
)
def test_waves_are_as_wide_as_there_are_replicas(num_trials, replicas, wanted):
    timetable = search_then_train(1000, 0.1, num_trials, 10, replicas)
    assert waves(timetable) == wanted
    assert timetable.search_steps == 10 * len(wanted)
    assert timetable.total_steps == 1000
    assert timetable.segments[-1].steps == 1000 - 10 * len(wanted)


def test_stages_of_the_paper_have_waves():
    timetable = timetable_of(
        "paper",
        total_steps=1000,
        search_fraction=None,
        num_trials=5,
        stage_steps=100,
        trial_steps=10,
        warmup_steps=0,
        replicas=2,
    )
    assert timetable.num_stages == 7  # of 3 waves and 100 updates each
    assert all(waves(timetable, stage) == [[0, 1], [2, 3], [4]] for stage in range(7))


def run_search(kind, timetable, loss_at):
    """Tries everything on a known function of log10 of the rate; returns where, by waves."""
    found = kind(timetable, BOUNDS, CPU, 0, lambda value: value)
    tried = []
    for segment in timetable.stage(0)[0]:
        found.propose(0, segment.trial, segment.width)
        positions = found.rates(segment).log10().tolist()
        for trial, position in zip(segment.trials, positions, strict=True):
            found.record(0, trial, torch.full((10,), loss_at(position)), 100.0)
        tried.append(positions)
    return found, tried


@pytest.mark.parametrize("replicas", [2, 3, 6])
def test_downhill_trials_of_a_wave_look_at_different_places(replicas):
    timetable = search_then_train(1000, 0.1, None, 10, replicas)
    found, tried = run_search(PeakSearch, timetable, lambda x: (x + 1.7) ** 2)
    alone, turns = run_search(
        PeakSearch, search_then_train(1000, 0.1, 8, 10), lambda x: (x + 1.7) ** 2
    )
    downhill = tried[-1]
    others = [position for wave in tried[:-1] for position in wave]
    for index, position in enumerate(downhill):
        apart = [abs(position - x) for x in (*others, *downhill[:index])]
        assert min(apart) > 0.1
        assert abs(position + 1.7) < 1.0
    if replicas == 2:
        assert others == pytest.approx([x for (x,) in turns[:6]])
        assert downhill[0] == pytest.approx(turns[6][0])  # placed before the other one
    # As good a choice as one after another, within the gap between its trials.
    assert found.choose(0).log10().item() == pytest.approx(alone.choose(0).log10().item(), abs=0.4)


def test_a_wave_of_the_paper_fills_the_space_before_anything_is_known():
    timetable = timetable_of(
        "paper",
        total_steps=1000,
        search_fraction=None,
        num_trials=6,
        stage_steps=100,
        trial_steps=10,
        warmup_steps=0,
        replicas=3,
    )
    _, (first, second) = run_search(PaperSearch, timetable, lambda x: 1.0 + (x + 1.7) ** 2)
    gaps = [abs(a - b) for i, a in enumerate(first) for b in first[:i]]
    assert min(gaps) > 0.5
    assert min(abs(a - b) for i, a in enumerate(second) for b in (*first, *second[:i])) > 0.05
    assert min(abs(x + 1.7) for x in second) < 0.6


def test_trials_get_what_is_shared_and_training_what_was_drawn():
    shared = []

    def share(batch):
        shared.append(batch)
        return batch + 100

    tape, loader = Tape(share), [1, 2, 3]
    tape.record()
    assert draw(tape, loader, 2) == [101, 102]
    tape.rewind()
    assert draw(tape, loader, 3) == [101, 102, 103]
    assert shared == [1, 2, 3]  # once each
    tape.rewind()
    tape.release()
    assert draw(tape, loader, 5) == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("drawn", [2, 3, 7])
def test_what_another_rank_has_kept_is_drawn_again(drawn):
    tape, loader = Tape(), [1, 2, 3]
    draw(tape, loader, 2)
    tape.record()
    wanted = draw(tape, loader, drawn)
    tape.rewind()
    draw(tape, loader, 1)
    other, own = Tape(), [10, 20, 30]
    other.load_state_dict(tape.state_dict(), is_own=False)
    other.resume(own, restores_itself=False)
    assert draw(other, own, drawn - 1) == [10 * batch for batch in wanted[1:]]
    assert draw(other, own, 2) == [10 * batch for batch in draw(tape, loader, drawn + 1)[-2:]]


def test_a_loader_with_a_state_cannot_draw_again_what_another_rank_has_kept():
    tape, loader = Tape(), [1, 2, 3]
    tape.record()
    draw(tape, loader, 2)
    other = Tape()
    other.load_state_dict(tape.state_dict(), is_own=False)
    with pytest.raises(RuntimeError, match="are those of another rank"):
        other.resume(loader, restores_itself=True)


def test_the_choice_is_what_the_ranks_agree_on():
    timetable = search_then_train(1000, 0.1, 3, 10)
    found = PeakSearch(timetable, BOUNDS, CPU, 0, lambda value: torch.full_like(value, -2.0))
    for trial in range(3):
        found.propose(0, trial)
        assert found.positions[0, trial].item() == -2.0
        found.record(0, trial, torch.full((10,), 1.0 + trial), 100.0)
    found.choose(0)
    assert math.isclose(found.best[0].item(), -2.0)
