"""What AutoLRS warns of: choices that are guesses, and training that was rolled back."""

import itertools
import warnings

import autolrs_runs
import pytest
import torch
from autolrs_runs import PRESETS, Training

from lrs_ext.autolrs import notices
from lrs_ext.autolrs.notices import Notices


@pytest.mark.parametrize("preset", PRESETS)
def test_a_good_run_warns_of_nothing(preset):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Training("sgd", **PRESETS[preset]).run()


@pytest.mark.parametrize("preset", PRESETS)
def test_trials_that_all_diverge(preset):
    run = Training("sgd", bounds=(1e15, 1e18), **PRESETS[preset])
    with pytest.warns(UserWarning, match=r"every learning rate between 1e\+15 and 1e\+18 that was"):
        run.run()


def test_trials_that_are_not_told_apart():
    run = Training("sgd", bounds=(1e-12, 1e-8))
    with pytest.warns(UserWarning, match="better than a guess: judge by a val_loss") as found:
        run.run()
    # It points to the call of `step`.
    assert [each.filename for each in found] == [autolrs_runs.__file__]


@pytest.mark.parametrize(
    ("batches", "has_val_loss", "is_told"),
    [(7, False, True), (1, False, False), (7, True, False)],
)
def test_trials_that_see_other_batches(batches, has_val_loss, is_told):
    falling = itertools.count(100.0, -1.0)
    val_loss = (lambda: torch.tensor(next(falling))) if has_val_loss else None
    run = Training("sgd", val_loss=val_loss)
    run.stream = itertools.cycle(autolrs_runs.list_of_batches()[:batches])  # not `auto.batches`
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.run()
    told = ["draw the batches from auto.batches" in str(each.message) for each in found]
    assert any(told) == is_told


def test_negative_losses_without_a_forecast():
    texts = {}
    for preset, options in PRESETS.items():
        run = Training("sgd", **options)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            while not run.auto.done:
                next(run.stream)
                run.model(torch.ones(8, 4)).mean().backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
                run.auto.step(torch.tensor(-1.0 - run.auto._updates))
        texts[preset] = {str(each.message) for each in found}
    assert len(texts["paper"]) == 1
    assert "add a constant to the loss" in texts["paper"].pop()
    assert not any("negative" in text for text in texts["peak"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_roll_back(preset):
    run = Training("sgd", **PRESETS[preset])
    last = run.auto._timetable.segments[-1]
    run.run(last.start + 1)
    run.break_weights()
    span = f"updates {last.start + 1} to {last.start + last.look_steps}, which are undone"
    with pytest.warns(UserWarning, match=f"training has diverged in {span}") as found:
        run.run()
    assert len(found) == 1


def test_a_warning_waits_for_its_number(monkeypatch):
    class Late(notices.HostCopy):
        is_here = False

    monkeypatch.setattr(notices, "HostCopy", Late)
    coming = Notices(are_given=True)
    coming.expect(torch.tensor(2), ["first", "second"])
    coming.expect(torch.tensor(False), ["nothing"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coming.give()
    monkeypatch.setattr(Late, "is_here", True)
    with pytest.warns(UserWarning, match="AutoLRS: second") as found:
        coming.give()
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coming.give()


def test_one_rank_warns_for_all():
    silent = Notices(are_given=False)
    silent.expect(torch.tensor(True), ["something"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent.give()
