"""Hugging Face's `Trainer`: schedules that stay in charge, and AutoLRS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lrs_ext.autolrs.controller import AutoLRS
from lrs_ext.drivers import driver_of
from lrs_ext.integrations.framework_search import FrameworkSearch
from lrs_ext.integrations.own_schedule import OwnSchedule
from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.wrappers import unwrapped

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "lrs_ext.integrations.transformers needs transformers and accelerate: "
        "pip install 'lrs_ext[transformers]'"
    ) from error


class AutoLRSCallback(transformers.TrainerCallback):
    """Lets a `Trainer` of this module (or a `ScheduleMixin`) search its learning rate.

    The budget is the Trainer's ``max_steps``; trials are part of it, ``global_step`` never goes
    back. Losses are those of `training_step`, summed over gradient accumulation. The search is
    saved in ``scheduler.pt`` of every checkpoint, with the copy of the training state that trials
    start from, and resumes from there.

    Args:
        lr_bounds: see `lrs_ext.AutoLRS`.
        options: the other options of `lrs_ext.AutoLRS`. A GradScaler of the Trainer is rolled back
            without being named in ``extra_state``.

    Raises:
        TypeError: ``total_steps`` is given, which is the Trainer's.
    """

    def __init__(self, lr_bounds: tuple[float, float], **options: Any) -> None:
        if "total_steps" in options:
            raise TypeError("total_steps is the max_steps of the TrainingArguments: leave it out")
        self._lr_bounds, self._options = lr_bounds, options
        self.search: FrameworkSearch | None = None

    @property
    def auto(self) -> AutoLRS:
        """The controller.

        Raises:
            RuntimeError: training has not begun.
        """
        if self.search is None:
            raise RuntimeError("there is no AutoLRS before trainer.train() has begun")
        return self.search.auto

    def begin(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        total_steps: int,
        scaler: Any | None,
    ) -> None:
        """Makes the controller; the `ScheduleMixin` calls it."""
        self.search = None  # that of an earlier train() drives the optimizer no more
        options = dict(self._options)
        if scaler is not None:
            options["extra_state"] = (*options.get("extra_state", ()), scaler)
        auto = AutoLRS(unwrapped(optimizer), model, self._lr_bounds, total_steps, **options)
        self.search = FrameworkSearch(auto)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that the Trainer hands over its batches and losses."""
        if self.search is None:
            raise RuntimeError(
                "AutoLRSCallback needs the Trainer of lrs_ext.integrations.transformers, or its "
                "ScheduleMixin as the first base of your own"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follows an update."""
        assert self.search is not None
        self.search.end_update()


class SearchedSchedule(OwnSchedule):
    """An `OwnSchedule` whose state has that of the search, so that the Trainer saves it."""

    def __init__(self, optimizer: torch.optim.Optimizer, callback: AutoLRSCallback) -> None:
        self._callback = callback
        super().__init__(optimizer)

    def get_last_lr(self) -> list[float | Tensor]:
        """Returns what each group has: `AutoLRS` follows an update after the Trainer has asked."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "autolrs": self._callback.auto.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "autolrs" not in state_dict:
            raise ValueError(
                "the checkpoint has no state of AutoLRS: it was saved without an AutoLRSCallback; "
                "resume it without one"
            )
        assert self._callback.search is not None
        self._callback.search.load_state_dict(state_dict["autolrs"])
        super().load_state_dict(state_dict)


class ScheduleMixin:
    """For a `Trainer`: optimizers of `lrs_ext` keep their schedules, and AutoLRS is served.

    ``class MyTrainer(ScheduleMixin, SFTTrainer)`` does it for a Trainer of your own. With other
    optimizers, or numbers as learning rates, and without an `AutoLRSCallback` nothing changes.
    """

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Makes the scheduler as in the Trainer; an `OwnSchedule` where others set the rates.

        Raises:
            RuntimeError: there is an `AutoLRSCallback` and the optimizer has another scheduler.
        """
        trainer: Any = self
        optimizer = trainer.optimizer if optimizer is None else optimizer
        callback = self._auto_lrs_callback
        if callback is not None:
            if trainer.lr_scheduler is not None and type(trainer.lr_scheduler) is not OwnSchedule:
                raise RuntimeError(
                    f"{type(trainer.lr_scheduler).__name__} would write over the learning rates of "
                    "AutoLRS: pass optimizers=(optimizer, None)"
                )
            if not isinstance(unwrapped(optimizer), ScheduledOptimizer):
                raise RuntimeError(
                    "AutoLRSCallback needs an optimizer of lrs_ext, whose learning rates need no "
                    f"scheduler, got {type(unwrapped(optimizer)).__name__}"
                )
            scaler = getattr(trainer.accelerator, "scaler", None)
            callback.begin(optimizer, trainer.model, num_training_steps, scaler)
            trainer.lr_scheduler = SearchedSchedule(optimizer, callback)
        elif trainer.lr_scheduler is None and _sets_own_rates(unwrapped(optimizer)):
            trainer.lr_scheduler = OwnSchedule(optimizer)
        else:
            return super().create_scheduler(  # type: ignore[misc]
                num_training_steps, optimizer=optimizer
            )
        trainer._created_lr_scheduler = True  # the next train() makes another
        return trainer.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """Draws the batches of an update; in a trial those of the first trial come again."""
        drawn = super().get_batch_samples(  # type: ignore[misc]
            epoch_iterator, num_batches, device
        )
        callback = self._auto_lrs_callback
        if callback is None or callback.search is None:
            return drawn
        batches, num_items = drawn
        if not batches:  # the epoch is over before the Trainer has noticed
            return drawn
        # Collators return mappings of their own classes, which torch.load refuses in checkpoints.
        plain = [dict(batch) if isinstance(batch, Mapping) else batch for batch in batches]
        return callback.search.batch((plain, num_items))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Makes a step of the Trainer and keeps its loss for the search."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        callback = self._auto_lrs_callback
        if callback is not None and callback.search is not None:
            callback.search.add_loss(loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as the Trainer does, with `AutoLRS.metrics` beside the learning rate."""
        callback = self._auto_lrs_callback
        if callback is not None and callback.search is not None and "learning_rate" in logs:
            logs.update(callback.search.auto.metrics())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    @property
    def _auto_lrs_callback(self) -> AutoLRSCallback | None:
        trainer: Any = self
        callbacks = trainer.callback_handler.callbacks
        return next((c for c in callbacks if isinstance(c, AutoLRSCallback)), None)


def _sets_own_rates(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether a schedule or a driver sets the rates of an optimizer of `lrs_ext`."""
    if not isinstance(optimizer, ScheduledOptimizer):
        return False
    schedules = optimizer.schedule_buffer.schedules
    return driver_of(optimizer) is not None or any(s is not None for s in schedules)


class Trainer(ScheduleMixin, transformers.Trainer):
    """`transformers.Trainer` with a `ScheduleMixin`."""
