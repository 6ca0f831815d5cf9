"""What bench_rex.py trains: five settings on data that every machine has, twelve schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import autolrs_tasks
import torch
from autolrs_tasks import VAE, Batch, Draw, Kind, Split, Task, held_out
from gpt_training import MAX_NORM
from torch import Tensor, nn

import lrs_ext

BATCH_SIZE, HELD_OUT_DIGITS = 16, 2400
GPT_WINDOWS, CONTEXT, HELD_OUT_WINDOWS = 2, 32, 128
LR_FACTOR = 3.0

# The reported schedules and, where the paper tunes more than the learning rate, their variants: a
# plateau may last 5 or 10 % of the budget.
PLATEAU_PATIENCE = {"plateau 5 %": 0.05, "plateau 10 %": 0.1}
PLATEAU_FACTOR = 0.1
PLATEAU_CHECKS = 20  # of the validation loss in a run, evenly spaced
CURVES: Mapping[str, Callable[..., lrs_ext.Schedule]] = {
    "none": lrs_ext.constant,
    "step": lrs_ext.step_decay,
    "linear": lrs_ext.linear,
    "cosine": lrs_ext.cosine,
    "exponential": lrs_ext.exponential,
    "OneCycle": lrs_ext.one_cycle,
    "delayed 50 %": functools.partial(lrs_ext.delayed_linear, delay=0.5),
    "delayed 75 %": functools.partial(lrs_ext.delayed_linear, delay=0.75),
    "REX": lrs_ext.rex,
    "REX d=0.9": functools.partial(lrs_ext.rex, d=0.9),
    "WSD": lrs_ext.wsd,
    # What the paper's Table 2 calls step: an exponential that falls to a tenth in half of the run.
    "step-like": functools.partial(lrs_ext.exponential, gamma=-4.6),
}
SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "none": ("none",),
    "step": ("step",),
    "plateau": tuple(PLATEAU_PATIENCE),
    "linear": ("linear",),
    "cosine": ("cosine",),
    "exponential": ("exponential",),
    "OneCycle": ("OneCycle",),
    "delayed 50 %": ("delayed 50 %",),
    "delayed 75 %": ("delayed 75 %",),
    "REX": ("REX",),
    "REX d=0.9": ("REX d=0.9",),
    "WSD": ("WSD",),
}
# Table 2: the paper's three profiles, then three more.
PROFILES = ("step-like", "linear", "REX", "REX d=0.9", "cosine", "exponential")
EVERY_ITERATION = "every iteration"


@dataclass(frozen=True)
class Setting:
    """A model, its data and its optimizer, with the largest budget.

    Attributes:
        centre: the learning rate in the middle of the grid.
        max_steps: updates of the budget of 100 %.
        metric: of a model and a held-out batch, lower is better, 0-d.
        metric_name: what it is, with its unit.
        check_examples: of the validation set, for decay on plateau.
        microseconds: what an update of one model costs a core, for the progress bar.
        has_profiles: whether Table 2 is made of it, too.
        max_norm: gradients are clipped at, None to leave them.
    """

    name: str
    task: Task
    centre: float
    max_steps: int
    metric: Callable[[nn.Module, Batch], Tensor]
    metric_name: str
    check_examples: int
    microseconds: float
    has_profiles: bool = False
    max_norm: float | None = None

    def lr(self, exponent: int) -> float:
        """Returns the learning rate at a place of the grid, whose factor is 3."""
        return self.centre * LR_FACTOR**exponent

    def steps(self, percent: float, fraction: float = 1.0) -> int:
        """Returns the updates of a budget in percent of (a fraction of) the largest."""
        return max(1, round(self.max_steps * fraction * percent / 100))


def error_percent(model: nn.Module, batch: Batch) -> Tensor:
    wrong = model(batch["images"]).argmax(-1) != batch["labels"]
    return 100.0 * wrong.to(torch.float32).mean()


@functools.cache
def load_digits() -> tuple[Draw, dict[Split, Batch]]:
    draw, _ = autolrs_tasks.load_noisy_digits()
    return functools.partial(draw, count=BATCH_SIZE), held_out(
        lambda split, generator: draw(generator, split, HELD_OUT_DIGITS)
    )


@functools.cache
def load_latents() -> tuple[Draw, dict[Split, Batch]]:
    draw, _ = autolrs_tasks.load_digits_and_latents()
    return functools.partial(draw, count=BATCH_SIZE), held_out(
        lambda split, generator: draw(generator, split, HELD_OUT_DIGITS)
    )


@functools.cache
def load_text() -> tuple[Draw, dict[Split, Batch]]:
    return autolrs_tasks.load_windows(GPT_WINDOWS, CONTEXT, HELD_OUT_WINDOWS)


def _cnn(kind: Kind, centre: float, has_profiles: bool = False) -> Setting:
    name, title = f"CNN, {kind}", f"noisy digits: residual CNN with BatchNorm, {kind}"
    build = functools.partial(autolrs_tasks.build_cnn, channels=8)
    loss = autolrs_tasks.classification_loss
    return Setting(
        name,
        Task(name, title, kind, build, load_digits, loss),
        centre,
        max_steps=2000,
        metric=error_percent,
        metric_name="test error, %",
        check_examples=256,
        microseconds=320,
        has_profiles=has_profiles,
    )


def _vae(kind: Kind, centre: float, has_profiles: bool = False) -> Setting:
    name, title = f"VAE, {kind}", f"digits: variational autoencoder, {kind}"
    loss = autolrs_tasks.negative_elbo
    return Setting(
        name,
        Task(name, title, kind, functools.partial(VAE, width=64), load_latents, loss),
        centre,
        max_steps=2000,
        metric=loss,
        metric_name="test loss, nats",
        check_examples=256,
        microseconds=220,
        has_profiles=has_profiles,
    )


def _gpt(kind: Kind, centre: float) -> Setting:
    name, title = f"GPT, {kind}", f"source text: byte transformer, {kind}"
    loss = autolrs_tasks.every_byte_loss
    return Setting(
        name,
        Task(name, title, kind, autolrs_tasks.build_gpt, load_text, loss),
        centre,
        max_steps=1200,
        metric=loss,
        metric_name="test loss, nats per byte",
        check_examples=16,
        microseconds=1100,
        max_norm=MAX_NORM,
    )


SETTINGS = {
    setting.name: setting
    for setting in (
        _cnn("SGD", 0.1, has_profiles=True),
        _cnn("Adam", 1e-2),
        _vae("SGD", 1e-2, has_profiles=True),
        _vae("Adam", 1e-2),
        _gpt("AdamW", 1e-2),
    )
}
