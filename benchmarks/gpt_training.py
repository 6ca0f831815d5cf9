"""One training run of the main job: build, update, evaluate, show, stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from gpt_config import Config, JobError
from gpt_data import Corpus, sample_batch, validation_batches
from gpt_model import GPT
from torch import Tensor
from tqdm import tqdm

import lrs_ext

SHOW_EVERY = 10  # updates; the loss is read from the device only then
EVALUATIONS = 12  # in a run, evenly spaced, the last one at its end
VALIDATION_BATCHES = 16
MAX_NORM = 1.0
WEIGHT_DECAY = {"adamw": 0.1, "adam": 0.0, "sgd": 0.0}


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; the run was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second one acts at once, as without this."""

    signum: int | None = None

    def __enter__(self) -> StopRequest:
        signals = (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, self.request) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        self.__exit__()


@dataclass
class History:
    """What a run did.

    Attributes:
        losses: float32 (steps,) on the run's device, NaN where not yet trained.
        learning_rates: float64 (steps,) on the host, the rate that each update used.
        validation: pairs (updates done, validation loss in nats per byte).
        seconds: training time, evaluation included.
        searched: updates of AutoLRS's trials, which come first.
    """

    losses: Tensor
    learning_rates: Tensor
    validation: list[tuple[int, float]]
    seconds: float
    searched: int = 0

    @staticmethod
    def empty(steps: int, device: str) -> History:
        losses = torch.full((steps,), math.nan, device=device)
        return History(losses, torch.full((steps,), math.nan, dtype=torch.float64), [], 0.0)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def from_dict(values: dict[str, Any], device: str) -> History:
        return History(**{**values, "losses": values["losses"].to(device)})


def build_optimizer(
    model: GPT, schedule: str, config: Config, storage: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    """The optimizer with its schedule inside; weight decay on matrices only.

    Args:
        storage: keywords that say how parameters and states are kept.
    """
    if config.lr is None:
        rate = math.sqrt(math.prod(config.lr_bounds))  # AutoLRS replaces it
    else:
        rate = getattr(lrs_ext, schedule)(
            config.lr, total_steps=config.steps, warmup_steps=config.warmup_steps
        )
    parameters = list(model.parameters())
    decay = WEIGHT_DECAY[config.optimizer]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    options = {"backend": config.backend, **(storage or {})}
    if config.optimizer == "sgd":
        return lrs_ext.SGD(groups, lr=rate, momentum=0.9, **options)
    make = {"adamw": lrs_ext.AdamW, "adam": lrs_ext.Adam}[config.optimizer]
    return make(groups, lr=rate, betas=(0.9, 0.99), **options)


def build_auto(
    model: GPT, optimizer: torch.optim.Optimizer, schedule: str, config: Config
) -> lrs_ext.AutoLRS | None:
    """The search for the peak of the schedule, if the job is to find it."""
    if config.lr is not None:
        return None
    return lrs_ext.AutoLRS(
        optimizer,
        model,
        config.lr_bounds,
        config.steps,
        schedule=schedule,
        warmup_steps=config.warmup_steps,
    )


class Run:
    """A model in training under one schedule; ``state_dict`` is all it takes to go on later."""

    def __init__(self, schedule: str, config: Config, corpus: Corpus) -> None:
        self.schedule, self.config = schedule, config
        try:
            self.train_text = corpus.train.to(config.device)
            self.validation_text = corpus.validation.to(config.device)
            torch.manual_seed(config.seed)
            size = {"layers": config.layers, "width": config.width, "context": config.context}
            self.model = GPT(**size).to(config.device)
            self.optimizer = build_optimizer(self.model, schedule, config)
            self.auto = build_auto(self.model, self.optimizer, schedule, config)
            self.history = History.empty(config.steps, config.device)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise JobError(str(error)) from error
        self.step = 0
        self.batch_numbers = self.number_batches()

    def number_batches(self) -> Iterator[int]:
        """The numbers of the batches to come: AutoLRS repeats those of a trial."""
        if self.auto is None:
            return iter(range(self.step, self.config.steps))
        return self.auto.batches(range(self.config.steps))

    def state_dict(self) -> dict[str, Any]:
        rng = {"cpu": torch.get_rng_state()}
        if self.train_text.is_cuda:
            rng["cuda"] = torch.cuda.get_rng_state(self.train_text.device)
        return {
            "schedule": self.schedule,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "auto": None if self.auto is None else self.auto.state_dict(),
            "history": self.history.to_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.auto is not None:
            self.auto.load_state_dict(state["auto"])
        self.batch_numbers = self.number_batches()
        self.history = History.from_dict(state["history"], self.config.device)
        torch.set_rng_state(state["rng"]["cpu"])
        if self.train_text.is_cuda:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.train_text.device)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        kind = inputs.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            return self.model.loss(inputs, targets)

    def update(self) -> None:
        """One optimizer update; enqueues work and reads nothing back."""
        config = self.config
        inputs, targets = sample_batch(
            self.train_text,
            seed=config.seed,
            step=next(self.batch_numbers),
            batch_size=config.batch_size,
            context=config.context,
        )
        loss = self.loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.history.losses[self.step] = loss.detach()
        self.history.learning_rates[self.step] = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.auto is not None:
            self.auto.step(loss.detach())
        self.step += 1

    def read_losses(self, first: int) -> list[float]:
        """The losses from update ``first`` on: the only place that waits for the device."""
        losses = self.history.losses[first : self.step].tolist()
        if self.auto is None:  # which copes with rates that are too high
            for step, loss in enumerate(losses, first):
                self.check_finite("loss", loss, step)
        return losses

    def evaluate(self) -> float:
        """Mean validation loss over fixed windows, also added to the history."""
        config = self.config
        total = torch.zeros((), device=config.device)
        with torch.no_grad():
            for inputs, targets in validation_batches(
                self.validation_text,
                batches=VALIDATION_BATCHES,
                batch_size=config.batch_size,
                context=config.context,
            ):
                total += self.loss(inputs, targets)
        loss = total.item() / VALIDATION_BATCHES
        if self.auto is not None:
            track = torch.from_numpy(self.auto.history.learning_rates)
            self.history.learning_rates[: self.step] = track
        if self.auto is None or self.auto.done:
            self.check_finite("validation loss", loss, self.step - 1)
        self.history.validation.append((self.step, loss))
        return loss

    def check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            lr = self.history.learning_rates.nan_to_num(0.0).max().item()
            lower = f"a lower peak, e.g. --lr {lr / 10:g} (it was {lr:g})"
            if self.auto is not None:
                lower = "lower --lr-bounds"
            raise JobError(
                f"the {what} is {value} at step {step} ({self.schedule}, learning rate"
                f" {self.history.learning_rates[step].item():.3g}): training stopped."
                f" Start again with {lower}, or a longer --warmup-steps"
            )


def train(run: Run, stop: StopRequest, save: Callable[[], None]) -> None:
    """Train to the end of the budget, saving at every evaluation.

    Raises:
        Interrupted: ``stop`` was requested; the run is saved.
        JobError: a loss that is not finite, seen when it is shown; nothing was saved after it.
    """
    steps = run.config.steps
    tokens = run.config.batch_size * run.config.context
    shown, began = run.step, time.perf_counter()
    with tqdm(total=steps, initial=run.step, desc=run.schedule, unit="step") as bar:
        while run.step < steps:
            run.update()
            last = run.step == steps
            due = run.step * EVALUATIONS // steps > (run.step - 1) * EVALUATIONS // steps
            stopping = stop.signum is not None and not last
            if not (due or stopping or run.step % SHOW_EVERY == 0):
                continue
            losses = run.read_losses(shown)
            seconds = time.perf_counter() - began
            if run.auto is not None:
                bar.set_description(f"{run.schedule}, {run.auto.progress}")
            bar.set_postfix(
                {
                    "loss": f"{sum(losses) / len(losses):.3f}",
                    "lr": f"{run.history.learning_rates[run.step - 1].item():.2e}",
                    "tokens/s": f"{tokens * len(losses) / seconds:,.0f}",
                },
                refresh=False,
            )
            bar.update(len(losses))
            if due:
                run.evaluate()
            run.history.seconds += time.perf_counter() - began
            if due or stopping:
                save()
            if stopping:
                raise Interrupted(stop.signum)
            shown, began = run.step, time.perf_counter()
