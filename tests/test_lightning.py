"""Lightning: the closure path, the monitor, checkpoints, AutoLRS as a callback."""

import logging
import warnings

import pytest
import torch
from framework_jobs import (
    BOUNDS,
    INPUTS,
    POINTS,
    RATES,
    REX,
    SEARCH,
    STEPS,
    make_net,
    mse,
    same_search,
)
from framework_jobs import weights as weights_of
from packaging.version import Version

import lrs_ext

pl = pytest.importorskip(
    "lightning.pytorch", reason="lightning is not installed: lrs_ext[lightning]"
)
from lightning.pytorch.callbacks import (  # noqa: E402
    BaseFinetuning,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from lrs_ext.integrations import OwnSchedule  # noqa: E402
from lrs_ext.integrations.lightning import AutoLRSCallback  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Regression(pl.LightningModule):
    def __init__(self, configure, dropout=0.0):
        super().__init__()
        self.net = make_net(dropout)
        self.configure = configure
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch[0].clone())
        return mse(self.net, batch)

    def configure_optimizers(self):
        return self.configure(self.parameters())


class StatefulLoader:
    """The points in order, and how far an epoch has come, as torchdata's loader keeps it."""

    def __init__(self):
        self.loader = torch.utils.data.DataLoader(POINTS, batch_size=4)
        self.drawn = 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        skipped = self.drawn % len(self)
        self.drawn = skipped
        for index, batch in enumerate(self.loader):
            if index >= skipped:
                self.drawn += 1
                yield batch

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


def with_schedule(params):
    return lrs_ext.AdamW(params, lr=REX, weight_decay=0.1)


def with_number(params):
    return lrs_ext.AdamW(params, lr=1e-3)


def with_two_rates(params):
    first, *others = params
    groups = [{"params": [first], "lr": 3e-3}, {"params": others, "lr": 1e-2}]
    return torch.optim.AdamW(groups)


@pytest.fixture
def fit(tmp_path):
    """Trains in a folder of its own; returns module, Trainer and the folder."""
    runs = iter(range(100))

    def fit(
        configure=with_schedule,
        callback=None,
        replayed=True,
        resume=None,
        every=10,
        dropout=0.0,
        loader=None,
        **options,
    ):
        folder = tmp_path / str(next(runs))
        torch.manual_seed(0)
        module = Regression(configure, dropout)
        loader = loader or StatefulLoader()
        checkpoints = ModelCheckpoint(
            folder,
            "{step}",
            save_top_k=-1,
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
        )
        options = {"max_steps": STEPS, "max_epochs": -1} | options
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=CSVLogger(folder),
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[LearningRateMonitor("step"), checkpoints, *([callback] if callback else [])],
            **options,
        )
        data = callback.replayed(loader) if callback and replayed else loader
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            trainer.fit(module, data, ckpt_path=resume)
        return module, trainer, folder

    return fit


def logged(trainer):
    """What the monitor and the search have logged: a list of values by name."""
    values = {}
    for row in trainer.logger.experiment.metrics:
        for name, value in row.items():
            if name != "step":
                values.setdefault(name, []).append(value)
    return values


@pytest.fixture
def rows(monkeypatch):
    """Keeps the rows that a CSV logger would drop once they are written."""
    from lightning.fabric.loggers.csv_logs import _ExperimentWriter

    monkeypatch.setattr(_ExperimentWriter, "save", lambda self: None)


# Schedules.


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.usefixtures("rows")
def test_logged_learning_rates_are_those_of_the_schedule(fit, accumulation):
    _, trainer, _ = fit(accumulate_grad_batches=accumulation)
    assert logged(trainer)["lr-AdamW"][::accumulation] == RATES
    optimizer = trainer.optimizers[0]
    assert type(optimizer) is lrs_ext.AdamW
    assert optimizer.schedule_buffer.step.item() == STEPS


def test_the_result_is_that_of_a_plain_loop(fit):
    module, _, _ = fit(gradient_clip_val=None)
    torch.manual_seed(0)
    net = make_net(0.0)
    opt = with_schedule(net.parameters())
    batches = list(torch.utils.data.DataLoader(POINTS, batch_size=4))
    for k in range(STEPS):
        opt.zero_grad()
        mse(net, batches[k % len(batches)]).backward()
        opt.step()
    assert torch.equal(weights_of(module), weights_of(net))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("own", [True, False])
def test_schedulers_are_accepted_too(fit, own):
    def configure(params):
        if own:
            opt = with_schedule(params)
            return {"optimizer": opt, "lr_scheduler": OwnSchedule(opt)}  # once an epoch: no matter
        opt = torch.optim.AdamW(params, lr=REX.lr)
        scheduler = lrs_ext.ScheduleLR(opt, REX)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    _, trainer, _ = fit(configure)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(REX(STEPS))
    assert logged(trainer)["lr-AdamW"] == RATES


@pytest.mark.parametrize("step", [10, 24])  # within an epoch of 24 batches, and at its end
def test_a_run_resumes_to_the_bit(fit, step):
    whole, _, folder = fit(every=step)
    resumed, trainer, _ = fit(resume=folder / f"step={step}.ckpt")
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert trainer.global_step == STEPS
    torch.load(folder / f"step={step}.ckpt", weights_only=True)


class Unfreezing(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer)


def test_a_run_that_has_unfrozen_a_layer_resumes(fit):
    def configure(params):
        return with_schedule([param for param in params if param.requires_grad])

    _, whole, folder = fit(configure, Unfreezing(), replayed=False, every=30)
    path = folder / "step=30.ckpt"
    _, resumed, _ = fit(configure, Unfreezing(), replayed=False, resume=path)
    whole, resumed = whole.optimizers[0], resumed.optimizers[0]
    assert len(resumed.param_groups) == 2
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in whole.param_groups]
    assert resumed.schedule_buffer.step.item() == STEPS


def test_gradients_are_released_through_the_wrapped_optimizer(fit, monkeypatch):
    class Manual(Regression):
        automatic_optimization = False

        def on_train_start(self):
            self.optimizers().step_in_backward()

        def training_step(self, batch, index):
            self.manual_backward(mse(self.net, batch))
            assert all(param.grad is None for param in self.net.parameters())
            self.optimizers().step()

    expected, _, _ = fit()
    monkeypatch.setitem(globals(), "Regression", Manual)
    module, trainer, _ = fit()
    assert torch.equal(weights_of(module), weights_of(expected))
    assert trainer.optimizers[0].schedule_buffer.step.item() == STEPS


def test_clipping_by_the_step_goes_through_the_closure(fit, monkeypatch):
    clipped, trainer, _ = fit(gradient_clip_val=0.5)
    norms = []

    def clip(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norms.append(lrs_ext.clip_grad_norm_(optimizer, gradient_clip_val))

    monkeypatch.setattr(Regression, "configure_gradient_clipping", clip)
    module, trainer, _ = fit(gradient_clip_val=0.5)
    assert len(norms) == STEPS
    torch.testing.assert_close(weights_of(module), weights_of(clipped))
    module, trainer, _ = fit(gradient_clip_val=0.5, precision="bf16-mixed")
    assert weights_of(module).isfinite().all()
    assert trainer.optimizers[0].schedule_buffer.step.item() == STEPS


def test_lightning_refuses_to_clip_what_a_step_unscales(fit):
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(gradient_clip_val=0.5, precision="bf16-mixed")


# AutoLRS.


def search(**options):
    return AutoLRSCallback(BOUNDS, **SEARCH | options)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_search_sees_the_losses_and_its_batches_again(fit, accumulation):
    callback = search()
    module, trainer, _ = fit(
        with_number, callback, dropout=0.1, accumulate_grad_batches=accumulation
    )
    auto = callback.auto
    assert trainer.global_step == STEPS == auto.total_steps
    assert auto.done
    trials = auto.history.stages[0].trials
    assert len(trials) == 4
    seen = torch.stack(module.seen).reshape(STEPS, accumulation, -1)
    first = seen[:4]
    for trial in trials:
        assert torch.equal(seen[trial.start : trial.start + 4], first)
        assert trial.losses[0] == trials[0].losses[0]  # the same weights, batches and dropout
    assert torch.equal(seen[16:20], first)
    assert not any(torch.equal(seen[20], batch) for batch in first)


def test_a_search_is_that_of_a_plain_loop(fit):
    callback = search()
    module, _, _ = fit(with_number, callback)
    torch.manual_seed(0)
    net = make_net(0.0)
    opt = with_number(net.parameters())
    auto = lrs_ext.AutoLRS(opt, net, BOUNDS, STEPS, **SEARCH)
    batches = list(torch.utils.data.DataLoader(POINTS, batch_size=4))
    for k in range(STEPS):
        # A trial's batches come again; the loader has gone on meanwhile.
        loss = mse(net, batches[k % 4 if k < 20 else k % len(batches)])
        opt.zero_grad()
        loss.backward()
        opt.step()
        auto.step(loss.detach())
    assert same_search(auto, callback.auto)
    assert torch.equal(weights_of(module), weights_of(net))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_that_a_module_skips_is_no_update(fit, monkeypatch, accumulation):
    class Skipping(Regression):
        def training_step(self, batch, index):
            return None if index in (4, 5, 12) else super().training_step(batch, index)

    monkeypatch.setitem(globals(), "Regression", Skipping)
    callback = search()
    _, trainer, _ = fit(with_number, callback, accumulate_grad_batches=accumulation)
    updates = callback.auto.metrics()["autolrs/updates"]
    assert trainer.global_step == STEPS
    assert updates == trainer.optimizers[0].committed_steps < STEPS


@pytest.mark.usefixtures("rows")
def test_loggers_get_the_numbers_of_the_search(fit):
    callback = search()
    _, trainer, _ = fit(with_number, callback)
    values = logged(trainer)
    assert values["autolrs/searching"] == [1.0] * 15 + [0.0] * 25
    used = callback.auto.history.learning_rates.tolist()
    assert values["lr-AdamW"][1:] == pytest.approx(used[1:], rel=1e-6)
    assert values["autolrs/best_lr"][-1] == callback.auto.history.stages[0].best_lr


def test_a_loader_that_is_replayed_is_told_the_epoch(fit):
    class Sampler(torch.utils.data.SequentialSampler):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    sampler = Sampler(POINTS)
    loader = torch.utils.data.DataLoader(POINTS, batch_size=4, sampler=sampler)
    fit(with_number, search(), loader=loader)
    assert sampler.epochs == (0, 1)


def test_processes_that_would_train_on_the_same_batches_are_refused(fit, monkeypatch):
    """Lightning divides up what loaders of torch yield, but not what is around them."""
    connector = "trainer.connectors.accelerator_connector._AcceleratorConnector.is_distributed"
    monkeypatch.setattr(f"{pl.__name__}.{connector}", True)
    loader = torch.utils.data.DataLoader(POINTS, batch_size=4)
    with pytest.raises(RuntimeError, match=r"same batches.*sampler=DistributedSampler"):
        fit(with_number, search(), loader=loader)
    sampler = torch.utils.data.DistributedSampler(POINTS, num_replicas=2, rank=1, shuffle=False)
    loader = torch.utils.data.DataLoader(POINTS, batch_size=4, sampler=sampler)
    module, _, _ = fit(with_number, search(), loader=loader)
    assert torch.equal(module.seen[0], POINTS[1:8:2][0])
    fit(with_number, search(), loader=list(torch.utils.data.DataLoader(POINTS, batch_size=4)))


def test_without_replays_the_trials_see_fresh_batches(fit):
    callback = search()
    module, _, _ = fit(with_number, callback, replayed=False)
    assert callback.auto.done
    assert not torch.equal(module.seen[0], module.seen[4])


@pytest.mark.parametrize(("step", "accumulation"), [(6, 2), (14, 1), (30, 1)])
def test_a_search_resumes_to_the_bit(fit, step, accumulation):
    callbacks = search(), search()
    options = {"accumulate_grad_batches": accumulation}
    whole, _, folder = fit(with_number, callbacks[0], every=step, **options)
    resumed, _, _ = fit(
        with_number, callbacks[1], resume=folder / f"step={step}.ckpt", every=step, **options
    )
    assert same_search(callbacks[0].auto, callbacks[1].auto)
    assert torch.equal(weights_of(resumed), weights_of(whole))


def of_another_rank(checkpoint):
    """Makes a checkpoint what the first of two ranks has saved, as the second one finds it."""
    saved = torch.load(checkpoint, weights_only=False)
    (search,) = [state["autolrs"] for state in saved["callbacks"].values() if "autolrs" in state]
    search["of_this_rank"] = ((1, 2), search["of_this_rank"][1])
    torch.save(saved, checkpoint)
    return checkpoint


def test_what_another_rank_has_drawn_is_not_made_up(fit):
    """Training begins with the batches of the trials; the rest of them is left out here."""
    whole, _, folder = fit(with_number, search(), every=6)
    with pytest.raises(RuntimeError, match=r"another rank.*before the search or after it"):
        fit(with_number, search(), resume=of_another_rank(folder / "step=6.ckpt"))
    resumed, _, _ = fit(with_number, search(), resume=of_another_rank(folder / "step=18.ckpt"))
    fresh = torch.stack([INPUTS[4 * k] for k in range(18, 24)])
    assert torch.equal(torch.stack(resumed.seen[:6])[:, 0], fresh)
    assert torch.equal(torch.stack(resumed.seen[6:]), torch.stack(whole.seen[24:]))


@pytest.mark.parametrize("step", [4, 30])  # before the last update of a trial, at rate 0
@pytest.mark.parametrize("configure", [with_number, with_two_rates])
def test_a_search_resumes_whatever_rates_the_optimizer_has_loaded(fit, configure, step):
    callbacks = [search(num_trials=3, trial_steps=5) for _ in range(2)]
    whole, _, folder = fit(configure, callbacks[0], every=step)
    resumed, _, _ = fit(configure, callbacks[1], resume=folder / f"step={step}.ckpt", every=step)
    assert same_search(callbacks[0].auto, callbacks[1].auto)
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_what_cannot_work_says_so(fit, monkeypatch):
    with pytest.raises(TypeError, match="follows from the Trainer's max_steps"):
        search(total_steps=100)
    with pytest.raises(RuntimeError, match=r"before trainer.fit\(\) has begun"):
        search().auto  # noqa: B018
    with pytest.raises(TypeError, match="generator has no length"):
        search().replayed(batch for batch in [])
    with pytest.raises(ValueError, match="needs a budget, the Trainer has inf updates"):
        fit(with_number, search(), max_steps=-1)

    def scheduled(params):
        opt = with_number(params)
        return [opt], [OwnSchedule(opt)]

    with pytest.raises(RuntimeError, match="return the optimizer alone"):
        fit(scheduled, search())
    monkeypatch.setattr(Regression, "automatic_optimization", False)
    with pytest.raises(RuntimeError, match="serves automatic optimisation with one optimizer"):
        fit(with_number, search())


def test_a_trainer_of_pytorch_lightning_takes_the_callback(tmp_path):
    other = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    if Version(other.__version__) < Version("2.6"):
        pytest.skip("before 2.6 it took callbacks of its own package only")

    class Module(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def training_step(self, batch, index):
            return mse(self.net, batch)

        def configure_optimizers(self):
            return with_number(self.parameters())

    callback = search()
    trainer = other.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(Module(), callback.replayed(torch.utils.data.DataLoader(POINTS, batch_size=4)))
    assert callback.auto.done
