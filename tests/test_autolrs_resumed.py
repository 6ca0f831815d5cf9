"""AutoLRS made when the optimizer has loaded its checkpoint, as loops that resume do."""

import io

import pytest
import torch
from torch import nn

import lrs_ext

BOUNDS = (1e-4, 1.0)
PRESETS = {
    "peak": {"total_steps": 32, "num_trials": 3, "trial_steps": 5},
    "paper": {
        "preset": "paper",
        "total_steps": 36,
        "num_trials": 2,
        "stage_steps": 8,
        "trial_steps": 4,
        "warmup_steps": 3,
    },
}
OPTIMIZERS = {
    "adamw": lrs_ext.AdamW,
    "sgd": lrs_ext.SGD,
    "torch adamw": torch.optim.AdamW,
    "torch sgd": torch.optim.SGD,
}
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [torch.randn(8, 4, generator=GENERATOR) for _ in range(5)]


class Run:
    """A small job; what a checkpoint has is loaded first, and AutoLRS made last.

    Args:
        breaks_at: which validation is interrupted, from 0; None judges by training losses.
    """

    def __init__(self, optimizer, lrs=(1e-3,), state=None, breaks_at=None, **options):
        torch.manual_seed(0 if state is None else 1)
        self.model = nn.Linear(4, 2)
        params = list(self.model.parameters())
        groups = [{"params": params}]
        if len(lrs) == 2:
            groups = [{"params": params[:1]}, {"params": params[1:]}]
        groups = [group | {"lr": lr} for group, lr in zip(groups, lrs, strict=True)]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if breaks_at is not None:
            self.left = breaks_at
            options["val_loss"] = self.validate
        self.auto = lrs_ext.AutoLRS(self.optimizer, self.model, BOUNDS, **options)
        if state is not None:
            self.auto.load_state_dict(state["auto"])
        self.stream = self.auto.batches(BATCHES)

    def validate(self):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return self.model(BATCHES[0]).square().mean()

    def run(self, updates=1000):
        while updates and not self.auto.done:
            loss = self.model(next(self.stream)).sub(1.0).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.auto.step(loss.detach())
            updates -= 1
        return self

    def saved(self):
        file = io.BytesIO()
        parts = ("model", "optimizer", "auto")
        torch.save({name: getattr(self, name).state_dict() for name in parts}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def weights(self):
        return torch.cat([param.detach().flatten() for param in self.model.parameters()])

    def outcome(self):
        history = self.auto.history
        return (
            self.weights().tolist(),
            history.losses.tolist(),
            history.learning_rates.tolist(),
            [trial.objective for stage in history.stages for trial in stage.trials],
        )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lrs", [(1e-3,), (3e-3, 1e-2)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_resumes_at_every_update(optimizer, lrs, preset):
    options = {"lrs": lrs} | PRESETS[preset]
    whole = Run(optimizer, **options).run().outcome()
    run = Run(optimizer, **options)
    for updates in range(PRESETS[preset]["total_steps"] + 1):
        resumed = Run(optimizer, state=run.saved(), **options)
        again = Run(optimizer, state=resumed.saved(), **options)
        assert again.run().outcome() == whole, updates
        run.run(1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_keeps_what_the_host_has_put_into_a_group(optimizer):
    options = {"lrs": (3e-3, 1e-2)} | PRESETS["peak"]
    run = Run(optimizer, **options).run(20)
    run.optimizer.param_groups[1]["lr"] = 0.125
    resumed = Run(optimizer, state=run.saved(), **options)
    assert resumed.optimizer.param_groups[1]["lr"] == 0.125
    assert resumed.run().outcome() == run.run().outcome()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_ratios_are_refused(optimizer):
    state = Run(optimizer, lrs=(3e-3, 1e-2), **PRESETS["peak"]).saved()
    run = Run(optimizer, lrs=(3e-3, 1.0001e-2), **PRESETS["peak"])
    with pytest.raises(ValueError, match=r"saved with ratios=\[1\.0, 3\.33.*, this AutoLRS has"):
        run.auto.load_state_dict(state["auto"])


def interrupted(breaks_at, **options):
    """Returns a run up to its interrupted validation, None if it has none."""
    run = Run(breaks_at=breaks_at, **options)
    try:
        run.run()
    except KeyboardInterrupt:
        return run
    return None


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", ["adamw", "torch sgd"])
def test_an_interrupted_validation_is_made_up_for(optimizer, preset):
    """By the next draw, by the next `step`, or in a resumed run."""
    options = {"optimizer": optimizer} | PRESETS[preset]
    whole = Run(breaks_at=1000, **options).run().outcome()
    breaks_at = 1 if preset == "peak" else 0  # the first one of "peak" is the constructor's
    while run := interrupted(breaks_at, **options):
        state = run.saved()
        assert Run(state=state, breaks_at=1000, **options).run().outcome() == whole
        assert run.run().outcome() == whole
        run = interrupted(breaks_at, **options)
        run.left = 0
        with pytest.raises(KeyboardInterrupt):
            run.auto.step(torch.ones(()))
        run.auto.step(torch.ones(()))
        with pytest.raises(RuntimeError, match="there was none since the last call"):
            run.auto.step(torch.ones(()))
        assert run.run().outcome() == whole
        breaks_at += 1
    assert breaks_at >= 4


def test_an_update_in_between_does_not_count():
    """A loop that draws no batches here has made one when a resumed run hears of it."""
    options = {"optimizer": "torch sgd"} | PRESETS["peak"]
    run = Run(state=interrupted(1, **options).saved(), breaks_at=1000, **options)
    run.model(BATCHES[0]).square().mean().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.auto.step(torch.tensor(torch.nan))
    assert run.run().outcome() == Run(breaks_at=1000, **options).run().outcome()
