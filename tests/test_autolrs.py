"""The controller: trials, roll-back, choice, divergence, resuming, and what it refuses."""

import gc
import io
import itertools
import math

import numpy as np
import pytest
import torch
from autolrs_runs import (
    OPTIMIZERS,
    PAPER,
    PEAK,
    PRESETS,
    Training,
    list_of_batches,
    make_model,
)
from test_no_sync import NoReadingMethods, NoReadingOps
from torch import nn

import lrs_ext
from lrs_ext.autolrs.timetable import search_then_train


def same(first, second):
    return torch.equal(first, second)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_searches_trains_and_ends_annealed(optimizer, preset):
    run = Training(optimizer, **PRESETS[preset]).run()
    history = run.auto.history
    assert run.auto.done
    assert run.auto.phase == "train"
    assert len(history.losses) == PRESETS[preset]["total_steps"]
    assert run.weights().isfinite().all()
    rates = history.learning_rates
    best = history.stages[-1].best_lr
    assert 1e-4 <= best <= 1e1
    assert 0.0 < rates[-1] < 0.05 * best
    assert np.mean(history.losses[-10:]) < 0.8 * np.mean(history.losses[:5])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "lamb", "torch sgd"])
def test_trials_are_paired_and_undone(optimizer, preset):
    run = Training(optimizer, **PRESETS[preset])
    addresses = [p.data_ptr() for p in run.model.parameters()]
    run.run()
    assert [p.data_ptr() for p in run.model.parameters()] == addresses
    for stage in run.auto.history.stages:
        first, *others = stage.trials
        for trial in others:
            length = min(len(first.losses), len(trial.losses))
            shared = zip(
                run.batches[first.start : first.start + length],
                run.batches[trial.start : trial.start + length],
                strict=True,
            )
            assert all(same(a, b) for one, other in shared for a, b in zip(one, other, strict=True))
            # Same weights, same batch, same dropout: the same first loss.
            assert trial.losses[0] == first.losses[0]
        trained = run.batches[stage.start : stage.start + len(first.losses)]
        searched = run.batches[first.start : first.start + len(first.losses)]
        assert all(same(a[0], b[0]) for a, b in zip(trained, searched, strict=True))
        assert stage.losses[0] == first.losses[0]


def test_training_equals_a_run_with_the_found_schedule():
    found = Training(loader=list_of_batches()).run()
    schedule = found.auto.to_schedule()
    first = found.auto.history.stages[0].start
    batches = found.batches[first:]
    replay = Training()  # for the same initial state
    model = make_model()
    model.load_state_dict(replay.model.state_dict())
    opt = lrs_ext.AdamW(model.parameters(), lr=schedule)
    assert schedule.total_steps == len(batches)
    # Dropout draws follow the state that the controller started from.
    Training()
    losses = []
    for inputs, targets in batches:
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
    assert losses == found.losses[first:]


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_reads_from_the_device(preset):
    run = Training(**PRESETS[preset])
    batches = [next(run.stream)]
    with NoReadingOps(), NoReadingMethods():
        while not run.auto.done:
            inputs, targets = batches[0]
            loss = nn.functional.mse_loss(run.model(inputs), targets)
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.auto.step(loss.detach())
    assert not math.isnan(run.auto.history.stages[0].best_lr)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", ["sgd", "torch sgd"])
def test_rates_that_diverge_are_not_chosen(optimizer, preset):
    run = Training(optimizer, bounds=(1e-4, 1e8), **PRESETS[preset]).run()
    history = run.auto.history
    assert any(not trial.losses.max() < 100.0 for trial in history.stages[0].trials)
    assert run.weights().isfinite().all()
    assert history.stages[0].best_lr < 1e3
    assert np.isfinite(history.stages[0].posterior_mean).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_training_that_diverges_is_rolled_back(preset):
    run = Training("sgd", **PRESETS[preset])
    while run.auto.phase == "search":
        run.update()
    run.update()
    run.break_weights()
    run.run()
    assert run.weights().isfinite().all()
    assert run.auto.history.learning_rates[-1] < run.auto.history.stages[-1].best_lr


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_are_finite_even_if_the_last_update_breaks_them(preset):
    run = Training("sgd", **PRESETS[preset])
    run.run(PRESETS[preset]["total_steps"] - 1)
    run.break_weights()
    run.run()
    assert run.auto.done
    assert run.weights().isfinite().all()


def saved(run):
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ORDERS = list(itertools.permutations(("model", "optimizer", "auto")))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "torch adam"])
def test_resuming_at_any_step_changes_nothing(optimizer, preset):
    whole = Training(optimizer, **PRESETS[preset]).run()
    stops = (0, 1, 4, 10, 19, 28, 44, 45, 70, 111, 149)
    training = Training(optimizer, **PRESETS[preset])
    states = [saved(training.run(stop - len(training.losses))) for stop in stops]
    for stop, state, order in zip(stops, states, itertools.cycle(ORDERS), strict=False):
        resumed = Training(optimizer, seed=99, **PRESETS[preset]).load_state_dict(state, order)
        resumed.run()
        assert same(resumed.weights(), whole.weights()), (stop, order)
        first, second = resumed.auto.history, whole.auto.history
        assert np.array_equal(first.losses, second.losses), (stop, order)
        assert np.array_equal(first.learning_rates, second.learning_rates), (stop, order)


@pytest.mark.parametrize("optimizer", ["adamw", "torch adam"])
def test_groups_keep_their_ratios(optimizer):
    model = make_model()
    params = list(model.parameters())
    kind = lrs_ext.AdamW if optimizer == "adamw" else torch.optim.Adam
    groups = [{"params": params[:2], "lr": 1e-3}, {"params": params[2:], "lr": 5e-3}]
    opt = kind(groups)
    auto = lrs_ext.AutoLRS(opt, model, (1e-4, 1e-1), **PEAK)
    for _ in range(PEAK["total_steps"] - 1):
        first, second = (
            opt.current_lr() if optimizer == "adamw" else [float(g["lr"]) for g in opt.param_groups]
        )
        assert second == pytest.approx(5 * first, rel=1e-6)
        loss = model(torch.ones(8, 4)).square().mean()
        loss.backward()
        opt.step()
        auto.step(loss.detach())


def test_the_host_shows_what_the_device_uses():
    run = Training()
    for _ in range(PEAK["total_steps"] - 1):
        run.update()
        shown = run.optimizer.param_groups[0]["lr"]
        assert isinstance(shown, float)
        assert shown == pytest.approx(run.optimizer.current_lr()[0], rel=1e-6)


def test_a_float_of_the_host_takes_over_and_hands_back():
    run = Training().run(60)
    group = run.optimizer.param_groups[0]
    before, rate = group["lr"], run.optimizer.current_lr()
    group["lr"] = 0.0
    assert run.optimizer.current_lr() == [0.0]
    group["lr"] = before
    assert run.optimizer.current_lr() == rate
    run.run()
    assert same(run.weights(), Training().run().weights())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_validation_loss_judges_trials(preset):
    calls = []

    def target_rate():
        """Best where the weights have moved by 1 in all."""
        calls.append(1)
        moved = torch.cat([p.detach().flatten() for p in run_model[0].parameters()])
        return (moved - start).abs().sum().sub(1.0).abs()

    run_model = []
    torch.manual_seed(0)
    model = make_model()
    run_model.append(model)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    opt = lrs_ext.SGD(model.parameters(), lr=1e-3)
    auto = lrs_ext.AutoLRS(opt, model, (1e-4, 1.0), val_loss=target_rate, **PRESETS[preset])
    inputs = torch.randn(8, 4)
    while auto.phase == "search":
        loss = model(inputs).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        auto.step(loss.detach())
    tried = [trial.objective for trial in auto.history.stages[0].trials]
    assert len(calls) >= len(tried)
    assert len(set(tried)) == len(tried)


def test_gradients_accumulate_over_several_batches():
    run = Training()
    seen = []
    for index, (inputs, targets) in enumerate(run.auto.batches(list_of_batches())):
        seen.append(inputs)
        loss = nn.functional.mse_loss(run.model(inputs), targets)
        (loss / 2).backward()
        if index % 2:
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.auto.step(loss.detach())
    assert len(seen) == 2 * PEAK["total_steps"]
    for trial in run.auto.history.stages[0].trials:
        for index in range(8):
            assert same(seen[2 * trial.start + index], seen[index])


def test_a_scaler_may_skip_updates():
    torch.manual_seed(0)
    model = make_model()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
    auto = lrs_ext.AutoLRS(opt, model, (1e-3, 1.0), extra_state=[scaler], **PEAK)
    scales = []
    for step, (inputs, targets) in enumerate(auto.batches(list_of_batches())):
        loss = nn.functional.mse_loss(model(inputs), targets)
        overflows = step in (*range(2, 64, 8), 90)  # the third update of every trial
        scaler.scale(loss * (math.inf if overflows else 1.0)).backward()
        scales.append(scaler.get_scale())
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        auto.step(loss.detach())
    for trial in auto.history.stages[0].trials:
        assert scales[trial.start : trial.start + 4] == scales[:4]


def test_metrics_and_plot():
    run = Training(**PAPER).run(75)
    metrics = run.auto.metrics()
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["autolrs/updates"] == 75.0
    assert metrics["autolrs/lr"] == pytest.approx(run.optimizer.current_lr()[0], rel=1e-6)
    figure = run.run().auto.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert "stage 1" in titles
    assert "stage 2" in titles
    assert "search" in [axes.get_title() for axes in Training().run().auto.plot().axes]


def test_the_repr_of_a_history_has_no_arrays():
    auto = Training().run().auto
    [stage] = auto.history.stages
    shown = repr(auto.history)
    assert "array" not in shown
    assert len(shown.splitlines()) == 1
    assert all(f"lr={trial.lr!r}" in shown for trial in stage.trials)
    assert auto.to_schedule().lr == auto.metrics()["autolrs/best_lr"] == stage.best_lr


# What is refused


def controller(**options):
    model = make_model()
    opt = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    return lrs_ext.AutoLRS(opt, model, **({"lr_bounds": (1e-4, 1e-1)} | PEAK | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr_bounds": (0.0, 1.0)}, ValueError, "0 < low < high < inf"),
        ({"lr_bounds": (1.0, 0.1)}, ValueError, "0 < low < high < inf"),
        ({"lr_bounds": (1.0, math.inf)}, ValueError, "0 < low < high < inf"),
        ({"lr_bounds": (math.nan, 1.0)}, ValueError, "0 < low < high < inf"),
        ({"lr_bounds": 0.1}, TypeError, "two numbers"),
        ({"lr_bounds": (1e-5, 1e-3, 1e-1)}, TypeError, "two numbers"),
        ({"lr_bounds": ("1e-5", 0.1)}, TypeError, r"lr_bounds\[0\] must be a number, got '1e-5'"),
        ({"lr_bounds": "12"}, TypeError, r"lr_bounds\[0\] must be a number, got '1'"),
        ({"total_steps": 80}, ValueError, "lower num_trials or trial_steps"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1"),
        ({"total_steps": 10.5}, TypeError, "total_steps must be an integer"),
        ({"num_trials": 0}, ValueError, "num_trials must be at least 1"),
        ({"num_trials": 2}, ValueError, "num_trials must be at least 3"),
        ({"trial_steps": 0}, ValueError, "trial_steps must be at least 1"),
        ({"search_fraction": 0.7}, ValueError, "search_fraction"),
        ({**PAPER, "search_fraction": 0.1}, ValueError, 'search_fraction is for preset="peak"'),
        ({"schedule": "sawtooth"}, ValueError, "schedule must be one of"),
        ({"preset": "best"}, ValueError, '"peak" or "paper"'),
        ({"stage_steps": 10}, ValueError, "stage_steps is for"),
        (
            {"warmup_steps": 111},
            ValueError,
            "warmup_steps must not exceed the 86 updates after the search, got 111",
        ),
        ({**PAPER, "trial_steps": None, "total_steps": 20}, ValueError, "first stage needs"),
        ({**PAPER, "trial_steps": 3}, ValueError, "at least 4 updates to forecast"),
        ({"snapshot": "disk"}, ValueError, "snapshot|placement"),
        ({"extra_state": [object()]}, TypeError, "state_dict"),
        ({"extra_state": torch.amp.GradScaler("cpu")}, TypeError, r"got GradScaler: pass \[it\]"),
        ({"extra_state": None}, TypeError, "got NoneType: leave it out"),
        ({"search_fraction": "0.1"}, TypeError, "search_fraction must be a number, got '0.1'"),
        ({"schedule": lrs_ext.rex}, TypeError, "must be a name, .* or a Schedule, got <function"),
        ({"schedule": None}, TypeError, "must be a name, .* or a Schedule, got None"),
        (
            {"schedule": lrs_ext.inverse_sqrt(0.1, warmup_steps=5)},
            ValueError,
            "can be stretched to the budget, unlike .*got inverse_sqrt",
        ),
        ({"val_loss": torch.ones(())}, TypeError, "val_loss must be a function"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({**PAPER, "stage_steps": [30, "60"]}, TypeError, "stage_steps must be an integer"),
        ({**PAPER, "stage_steps": 0}, ValueError, "stage_steps must be at least 1, got 0"),
        ({**PAPER, "stage_steps": []}, ValueError, "stage_steps must have at least one entry"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        controller(**options)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_validation_leaves_the_modes_of_the_modules_alone(preset):
    model = make_model()
    model[1].eval()  # a frozen normalisation
    optimizer = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    before = [module.training for module in model.modules()]

    def validate():
        model.eval()
        return model(torch.ones(8, 4)).square().mean()

    auto = lrs_ext.AutoLRS(optimizer, model, (1e-4, 1e-1), val_loss=validate, **PRESETS[preset])
    for inputs, targets in auto.batches(list_of_batches()):
        assert [module.training for module in model.modules()] == before
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        auto.step(loss.detach())
    assert auto.phase == "train"


def test_integers_may_be_those_of_numpy():
    options = {"total_steps": 150, "trial_steps": 5, "warmup_steps": 9, "seed": 1}
    auto = controller(**{name: np.int64(value) for name, value in options.items()})
    plan = dict(auto.state_dict()["plan"])
    assert {name: type(value) for name, value in plan.items() if name in options} == {
        "total_steps": int,
        "warmup_steps": int,
        "seed": int,
    }
    auto.load_state_dict(controller(**options).state_dict())
    assert controller(**{**PAPER, "stage_steps": np.int64(30)}).total_steps == 170


@pytest.mark.parametrize("model", [None, make_model().parameters()])
def test_the_model_comes_second(model):
    opt = lrs_ext.AdamW(make_model().parameters(), lr=1e-3)
    with pytest.raises(TypeError, match=r"must be the model, a torch.nn.Module, got"):
        lrs_ext.AutoLRS(opt, model, (1e-4, 1e-1), **PEAK)


def test_the_optimizer_comes_first():
    model = torch.nn.Linear(2, 1)
    optimizer = lrs_ext.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="first argument must be an optimizer, got Linear"):
        lrs_ext.AutoLRS(model, optimizer, (1e-3, 1.0), 100)


@pytest.mark.parametrize(
    ("loss", "error", "way_out"),
    [
        (1.0, TypeError, r"leave out \.item"),
        (None, TypeError, "compute and return it"),
        (torch.ones(1), ValueError, "take its mean"),
        (torch.ones(2), ValueError, "take its mean"),
        (torch.tensor(1), ValueError, r"convert it by \.float"),
    ],
)
def test_a_loss_must_be_a_0d_floating_tensor(loss, error, way_out):
    run = Training().run(3)
    before = run.weights()
    with pytest.raises(error, match=f"the loss must be .*{way_out}"):
        run.auto.step(loss)
    assert same(run.weights(), before)
    run.run()
    assert same(run.weights(), Training().run().weights())


def test_a_step_follows_one_update():
    run = Training().run(3)
    with pytest.raises(RuntimeError, match=r"follows one optimizer\.step"):
        run.auto.step(torch.ones(()))
    run.run()
    assert same(run.weights(), Training().run().weights())
    with pytest.raises(RuntimeError, match="budget of 150 updates is used up"):
        run.auto.step(torch.ones(()))


@pytest.mark.parametrize("kind", ["adamw", "torch adam"])
def test_a_loop_without_auto_step_ends(kind):
    run = Training(kind).run(3)
    with pytest.raises(RuntimeError, match=r"2 updates since the last auto.step\(loss\): call it"):  # noqa: PT012
        for inputs, _ in run.stream:
            run.model(inputs).square().mean().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert run.auto.metrics()["autolrs/updates"] == 3


def test_the_state_of_something_else_is_refused():
    run = Training()
    with pytest.raises(ValueError, match=r"not what AutoLRS.state_dict\(\) .*param_groups"):
        run.auto.load_state_dict(run.optimizer.state_dict())


def test_one_controller_an_optimizer():
    run = Training()
    with pytest.raises(RuntimeError, match="has an AutoLRS already"):
        lrs_ext.AutoLRS(run.optimizer, run.model, (1e-4, 1e-1), **PEAK)
    model, opt = run.model, run.optimizer
    del run
    gc.collect()
    lrs_ext.AutoLRS(opt, model, (1e-4, 1e-1), **PEAK)


@pytest.mark.parametrize("make_lr", [lambda: lrs_ext.rex(0.1, 10), lambda: torch.tensor(0.1)])
def test_the_optimizer_needs_float_learning_rates(make_lr):
    model = make_model()
    opt = lrs_ext.AdamW(model.parameters(), lr=make_lr())
    with pytest.raises(ValueError, match="give the optimizer a float"):
        lrs_ext.AutoLRS(opt, model, (1e-4, 1e-1), **PEAK)


@pytest.mark.parametrize(
    ("total_steps", "trials", "steps"),
    [(240, 6, 4), (480, 6, 8), (500, 6, 8), (560, 7, 8), (640, 8, 8), (1000, 8, 10), (9000, 8, 10)],
)
def test_trials_stay_within_the_search_fraction(total_steps, trials, steps):
    timetable = search_then_train(total_steps, 0.1, None, None)
    first, *_ = timetable.segments
    assert (timetable.num_trials, first.steps) == (trials, steps)
    assert timetable.search_steps <= total_steps / 10


@pytest.mark.parametrize("lrs", [(0.0, 1e-3), (1e-3, 0.0)])
@pytest.mark.parametrize("kind", [lrs_ext.AdamW, torch.optim.AdamW])
def test_a_learning_rate_of_zero_has_no_ratio(kind, lrs):
    model = make_model()
    first, *others = model.parameters()
    opt = kind([{"params": [first], "lr": lrs[0]}, {"params": others, "lr": lrs[1]}])
    auto = lrs_ext.AutoLRS(opt, model, (1e-4, 1e-1), **PEAK)
    message = rf"group {lrs.index(0.0)} has 0\.0: give the optimizer lr=1e-3"
    with pytest.raises(ValueError, match=message):
        next(auto.batches(list_of_batches()))
    with pytest.raises(ValueError, match=message):
        auto.step(torch.ones(()))


def test_a_loader_that_runs_dry_in_a_trial():
    run = Training(loader=iter(list_of_batches())).run(7)
    before = run.weights()
    with pytest.raises(RuntimeError, match="in the middle of a trial: pass something that can be"):
        run.update()
    assert same(run.weights(), before)


def test_a_checkpoint_of_another_plan_is_refused():
    state = Training().run(20).auto.state_dict()
    other = Training(num_trials=3)
    with pytest.raises(ValueError, match="num_trials=8, this AutoLRS has 3"):
        other.auto.load_state_dict(state)


def test_the_found_schedule_is_there_after_the_search():
    run = Training().run(20)
    with pytest.raises(RuntimeError, match="search has not ended"):
        run.auto.to_schedule()
