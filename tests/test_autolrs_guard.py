"""AutoLRS where losses are noisy, training diverges, or something else is out of the ordinary."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from autolrs_runs import PAPER, PEAK, PRESETS, Training, list_of_batches, make_model
from torch import nn

import lrs_ext
from lrs_ext.autolrs.guard import good_level, has_diverged


def train(model, optimizer, auto, batches):
    for inputs, targets in auto.batches(batches):
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        auto.step(loss.detach())


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("seed", range(4))
def test_noise_is_not_taken_for_divergence(seed, batch_size):
    """Fine-tuning from a good start, where one loss says little."""
    torch.manual_seed(seed)
    wanted, inputs = torch.randn(16, 1), torch.randn(1024, 16)
    targets = inputs @ wanted + torch.randn(1024, 1)
    model = nn.Linear(16, 1)
    with torch.no_grad():
        model.weight.copy_(wanted.T + 0.3 * torch.randn(1, 16))
    before = model.weight.detach().clone()
    data = torch.utils.data.TensorDataset(inputs, targets)
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True)
    optimizer = lrs_ext.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    auto = lrs_ext.AutoLRS(optimizer, model, (1e-5, 1e-1), 500)
    train(model, optimizer, auto, loader)
    assert not torch.equal(model.weight, before)
    rates = auto.history.learning_rates[auto.history.stages[0].start :]
    best = auto.history.stages[0].best_lr
    assert rates.max() == pytest.approx(best)
    # Nothing was rolled back and halved: the track is the schedule's.
    assert np.allclose(rates, auto.to_schedule().values(0, len(rates)), rtol=1e-6)


def test_what_counts_as_a_divergence():
    copies = [torch.ones(2), torch.ones(0), torch.tensor([-math.inf, 0.0])]

    def judged(losses, start=1.0, std=0.0, level=0.0, params=copies):
        pairs = list(zip(params, copies, strict=True))
        numbers = map(torch.tensor, (losses, start, std, level))
        return bool(has_diverged(*numbers, pairs))

    assert not judged([1.0, 1.5, 1.9])
    assert judged([1.0, 1.5, 4.0])
    assert not judged([1.0, 1.5, 4.0], std=1.0)
    assert judged([1.0, 1.5, 7.0], std=1e9)
    assert judged([math.nan, 1.0, 1.0])
    assert judged([1.0, math.inf, 1.0])
    assert judged([1.0], params=[torch.tensor([1.0, math.nan]), *copies[1:]])
    assert not judged([1.0], params=[*copies[:2], torch.tensor([math.nan, 1.0])])
    assert judged([1.0], params=[*copies[:2], torch.tensor([-math.inf, -math.inf])])
    assert not has_diverged(torch.ones(1), *torch.ones(3), [])
    assert not judged([-3.0, -4.0], start=-1.0, level=-2.0)
    # A spike is no divergence, what stays is one, wherever it has begun.
    assert not judged([1.0, 90.0, 1.0, 1.0, 1.0, 1.0, 1.0, 90.0])
    assert not judged(13 * [1.0] + [90.0, 1.0, 1.0])
    assert judged(13 * [1.0] + 3 * [3.0])
    assert judged(16 * [3.0])
    # A harder task is none either: its losses were as high with weights that were good.
    assert not judged([3.0], level=1.6)
    assert judged([3.0], level=1.4)
    assert not judged([7.0], std=0.5, level=1.8)
    assert judged([3.0], level=math.nan)


def test_the_level_of_a_good_state():
    before, losses = torch.tensor(6 * [1.0] + [2.0, 9.0]), torch.tensor(7 * [4.0] + [5.0])
    assert good_level(before, losses, torch.tensor(False)) == 2.0
    assert good_level(before, losses, torch.tensor(True)) == 4.0
    assert good_level(before[:1], losses[:1], torch.tensor(False)) == 1.0
    assert good_level(before[:1], losses[:1], torch.tensor(True)) == 4.0


def test_a_first_trial_that_diverges_hides_no_divergence_of_the_training():
    """The first trial of "paper" has any rate; here its losses grow to a finite 1e9."""
    weight = nn.Parameter(torch.ones(4))
    model = nn.ParameterList([weight])
    optimizer = lrs_ext.SGD([weight], lr=1e-2)
    auto = lrs_ext.AutoLRS(optimizer, model, (1e-3, 3.0), **PAPER | {"stage_steps": 40}, seed=14)
    last = auto._timetable.segments[-1]
    for _ in auto.batches([0]):
        loss = weight.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        auto.step(loss.detach())
        if auto._updates == last.start + last.look_steps:
            good = weight.detach().clone()
            with torch.no_grad():
                weight.fill_(30.0)  # a loss 900 times that of the start
        elif auto._updates == last.start + 2 * last.look_steps:
            assert torch.equal(weight, good)
    assert 1e4 < auto.history.stages[0].trials[0].losses[-1] < math.inf
    assert auto._guard.scales[-1].tolist() == [1.0, 0.5] + 8 * [1.0]


@pytest.mark.parametrize("seed", range(3))
def test_spikes_are_not_taken_for_divergence(seed):
    """A tenth of the batches have some 25 times the loss of the others."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(300):
        inputs = torch.randn(16, 4, generator=generator)
        is_spike = torch.rand((), generator=generator) < 0.1
        batches.append((inputs, inputs.sum(1, keepdim=True) + 10.0 * is_spike))
    torch.manual_seed(seed)
    model = nn.Linear(4, 1)
    optimizer = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    auto = lrs_ext.AutoLRS(optimizer, model, (1e-5, 1e-1), 300)
    train(model, optimizer, auto, batches)
    assert auto._guard.scales.eq(1.0).all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("is_gradual", [True, False])
def test_a_task_that_becomes_harder_is_no_divergence(preset, is_gradual):
    """Targets that grow tenfold, bit by bit or at once: this one costs a look."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    auto = lrs_ext.AutoLRS(optimizer, model, (1e-4, 1.0), **PRESETS[preset] | {"total_steps": 600})

    generator = torch.Generator().manual_seed(0)

    def batches():
        while True:
            done = auto._updates / 600
            height = 1.0 + 9.0 * (done if is_gradual else done > 0.6)
            inputs = torch.randn(32, 4, generator=generator)
            noise = torch.randn(32, 1, generator=generator)
            yield inputs, height * (inputs.sum(1, keepdim=True) + noise)

    train(model, optimizer, auto, batches())
    assert (auto._guard.scales < 1.0).sum() <= (0 if is_gradual else 1)


@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_training_is_judged_on_its_own_scale(preset, scale):
    """Whatever that of val_loss: good training goes on, bad training is rolled back."""
    inputs, targets = list_of_batches()[0]
    models = []

    def validate():
        return scale * (nn.functional.mse_loss(models[-1](inputs), targets) if models else 1.0)

    run = Training("sgd", **PRESETS[preset], val_loss=lambda: torch.as_tensor(validate()))
    models.append(run.model)
    last = run.auto._timetable.segments[-1]
    run.run(last.start + last.look_steps)
    good = run.weights()
    with torch.no_grad():
        run.model[-1].bias.fill_(20.0)  # a loss some hundred times that of the start
    run.run(last.look_steps)
    assert torch.equal(run.weights(), good)
    run.run()
    assert not torch.equal(run.weights(), good)
    assert run.auto._guard.scales[-1].tolist() == [1.0, 0.5] + 8 * [1.0]


@pytest.mark.parametrize("kind", [lrs_ext.SGD, torch.optim.SGD])
def test_what_is_not_finite_from_the_start_is_no_divergence(kind):
    torch.manual_seed(0)
    model = nn.Module()
    model.net = make_model()
    model.mask = nn.Parameter(torch.tensor([0.0, -math.inf]))
    model.forward = lambda inputs: model.net(inputs) + model.mask.exp()[1]
    optimizer = kind(model.parameters(), lr=1e-3)
    auto = lrs_ext.AutoLRS(optimizer, model, (1e-4, 1e-1), **PEAK)
    train(model, optimizer, auto, list_of_batches())
    assert auto._guard.scales.eq(1.0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_divergence_costs_a_look_not_the_stage(preset):
    run = Training("sgd", **PRESETS[preset])
    last = run.auto._timetable.segments[-1]
    run.run(last.start + 1)
    run.break_weights()
    before = None
    while not run.auto.done:
        run.update()
        if run.auto._updates == last.start + last.look_steps:
            before = run.weights().clone()
    assert before.isfinite().all()
    assert not torch.equal(run.weights(), before)
    assert run.weights().isfinite().all()
    # From then on at half the rate, and annealed all the same.
    rates = run.auto.history.learning_rates[last.start :]
    whole = Training("sgd", **PRESETS[preset])
    shapes = [whole.auto._shapes.of(last).at(k) for k in range(last.steps)]
    assert rates[-1] == pytest.approx(0.5 * run.auto.history.stages[-1].best_lr * shapes[-1])


def test_a_validation_loss_that_draws_random_numbers_leaves_trials_paired():
    torch.manual_seed(0)
    model = make_model()
    optimizer = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    validation = torch.randn(8, 4)
    auto = lrs_ext.AutoLRS(
        optimizer,
        model,
        (1e-4, 1e-1),
        val_loss=lambda: model(validation).square().mean(),  # with dropout
        **PAPER,
    )
    train(model, optimizer, auto, list_of_batches())
    for stage in auto.history.stages:
        assert len({trial.losses[0] for trial in stage.trials}) == 1
        assert stage.losses[0] == stage.trials[0].losses[0]


@pytest.mark.parametrize("kind", [torch.optim.SGD, lrs_ext.SGD])
def test_a_disabled_scaler_changes_nothing(kind):
    """It cannot skip an update either: a forgotten one is noticed."""
    weights = []
    for extra_state in ([], [torch.amp.GradScaler("cpu", enabled=False)]):
        torch.manual_seed(0)
        model = make_model()
        optimizer = kind(model.parameters(), lr=1e-3)
        auto = lrs_ext.AutoLRS(optimizer, model, (1e-4, 1e-1), extra_state=extra_state, **PEAK)
        with pytest.raises(
            RuntimeError, match=r"follows one optimizer\.step\(\), and there was none"
        ):
            auto.step(torch.ones(()))
        train(model, optimizer, auto, list_of_batches())
        auto.load_state_dict(auto.state_dict())
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(*weights)


KINDS = [lrs_ext.AdamW, torch.optim.AdamW]


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_group_without_parameters_changes_nothing(kind):
    weights = []
    for has_empty_group in (False, True):
        torch.manual_seed(0)
        model = make_model()
        groups = [{"params": []}] * has_empty_group + [{"params": list(model.parameters())}]
        optimizer = kind(groups, lr=1e-3)
        auto = lrs_ext.AutoLRS(optimizer, model, (1e-4, 1e-1), **PEAK)
        train(model, optimizer, auto, list_of_batches())
        auto.load_state_dict(auto.state_dict())
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_without_parameters_is_refused(kind):
    optimizer = kind([{"params": []}], lr=1e-3)
    with pytest.raises(ValueError, match="AdamW has no parameters to train: give them to it"):
        lrs_ext.AutoLRS(optimizer, make_model(), (1e-4, 1e-1), **PEAK)


def test_empty_parameters():
    torch.manual_seed(0)
    model = make_model()
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    optimizer = lrs_ext.SGD(model.parameters(), lr=1e-3)
    auto = lrs_ext.AutoLRS(optimizer, model, (1e-4, 1e-1), **PEAK)
    train(model, optimizer, auto, list_of_batches())
    assert auto.done


def test_a_controller_goes_when_nobody_holds_it():
    run = Training().run(60)
    model, optimizer, controller = run.model, run.optimizer, weakref.ref(run.auto)
    del run
    gc.collect()
    assert controller() is None
    lrs_ext.AutoLRS(optimizer, model, (1e-4, 1e-1), **PEAK)


def test_a_constructor_that_fails_leaves_the_optimizer_free():
    model = make_model()
    optimizer = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(TypeError, match="what val_loss returns must be a tensor") as held:
        lrs_ext.AutoLRS(optimizer, model, (1e-4, 1e-1), val_loss=lambda: 1.0, **PEAK)
    lrs_ext.AutoLRS(optimizer, model, (1e-4, 1e-1), **PEAK)
    assert held is not None


def test_an_optimizer_that_has_stepped_gets_its_schedule():
    model = make_model()
    optimizer = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        model(torch.ones(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    auto = lrs_ext.AutoLRS(optimizer, model, (1e-4, 1e-1), **PEAK)
    last = None
    for inputs, targets in auto.batches(list_of_batches()):
        last = optimizer.current_lr()[0]
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        auto.step(torch.ones(()))
    assert last == pytest.approx(auto.history.learning_rates[-1], rel=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_the_schedule_of_several_stages_is_what_was_trained_without_the_trials(warmup_steps):
    options = PAPER | {"total_steps": PAPER["total_steps"] + warmup_steps}
    run = Training(**options, warmup_steps=warmup_steps)
    used = []
    while not run.auto.done:
        is_trained, lr = run.auto.phase == "train", run.optimizer.current_lr()[0]
        run.update()
        if is_trained:
            used.append(lr)
    schedule = run.auto.to_schedule()
    assert schedule.total_steps == len(used) == 70 + warmup_steps
    assert schedule.values(0, len(used)).astype(np.float32).tolist() == used
    assert lrs_ext.Schedule.from_dict(schedule.to_dict()) == schedule
    assert len(set(used)) > 2


def test_the_schedule_of_several_stages_is_there_in_the_last_one():
    run = Training(**PAPER)
    for _ in range(120):
        with pytest.raises(RuntimeError, match=r"search has not ended.*in the last stage"):
            run.auto.to_schedule()
        run.update()
    early, late = run.auto.to_schedule(), run.run().auto.to_schedule()
    assert early.total_steps == late.total_steps == 70
    assert early.values(0, 21).tolist() == late.values(0, 21).tolist()


def test_a_rolled_back_training_is_in_the_schedule_of_several_stages():
    run = Training("sgd", **PAPER)
    while run.auto.phase == "search":
        run.update()
    run.update()
    run.break_weights()
    run.run()
    values = run.auto.to_schedule().values(0, 20)
    assert values[-1] == values[0] / 2


def test_any_profile_gives_the_shape():
    auto = Training(schedule="wsd").auto
    assert auto._shapes.schedule.profile == "wsd"


@pytest.mark.parametrize("schedule", ["one_cycle", lrs_ext.one_cycle(0.1, 10)])
def test_a_schedule_that_rises_by_itself_has_no_other_warmup(schedule):
    run = Training(schedule=schedule).run()
    rates = run.auto.history.learning_rates[64:]
    found = lrs_ext.one_cycle(run.auto.history.stages[0].best_lr, 86)
    assert rates == pytest.approx(found.values(0, 86), rel=1e-6, abs=1e-12)
    with pytest.raises(ValueError, match=r"warmup_steps must be 0 for one_cycle.* got 5"):
        Training(schedule=schedule, warmup_steps=5)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("sine", r"schedule must be one of \['constant', .*or a Schedule, got 'sine'"),
        (lrs_ext.from_values([0.1, 0.2]), "unlike a table, .*, got from_values"),
        (lrs_ext.join([lrs_ext.constant(0.1)], []), "unlike a table, .*, got join"),
        (lrs_ext.constant(0.0), "must have a positive lr"),
    ],
)
def test_what_gives_no_shape_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        Training(schedule=schedule)
