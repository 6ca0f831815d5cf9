"""Lightning: AutoLRS as a callback. Schedules need nothing: they are in the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import DataLoader

from lrs_ext.autolrs.batches import set_epoch
from lrs_ext.autolrs.controller import AutoLRS
from lrs_ext.integrations.framework_search import FrameworkSearch
from lrs_ext.wrappers import unwrapped

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "lrs_ext.integrations.lightning needs lightning or pytorch-lightning: "
            "pip install 'lrs_ext[lightning]'"
        ) from error


class SizedLoader(Protocol):
    """What yields batches, and says how many."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class AutoLRSCallback(Callback):
    """Searches the learning rate of a module with automatic optimisation and one optimizer.

    The budget is ``trainer.estimated_stepping_batches``; trials are part of it, ``global_step``
    never goes back. The search is part of Lightning's checkpoints, with the copy of the training
    state that trials start from, and resumes from there. `AutoLRS.metrics` go to the loggers every
    ``log_every_n_steps``.

    Args:
        lr_bounds: see `lrs_ext.AutoLRS`.
        options: the other options of `lrs_ext.AutoLRS`. A GradScaler of Lightning is rolled back
            without being named in ``extra_state``.

    Raises:
        TypeError: ``total_steps`` is given, which is the Trainer's.
    """

    def __init__(self, lr_bounds: tuple[float, float], **options: Any) -> None:
        if "total_steps" in options:
            raise TypeError("total_steps follows from the Trainer's max_steps or max_epochs")
        self._lr_bounds, self._options = lr_bounds, options
        self._search: FrameworkSearch | None = None
        self._loaded: dict[str, Any] | None = None
        self._trainer: Any = None
        self._updates = 0  # of the Trainer, of which the search has been told

    @property
    def auto(self) -> AutoLRS:
        """The controller.

        Raises:
            RuntimeError: training has not begun.
        """
        if self._search is None:
            raise RuntimeError("there is no AutoLRS before trainer.fit() has begun")
        return self._search.auto

    def replayed(self, loader: SizedLoader) -> Replayed:
        """Returns the loader for `trainer.fit`, with a trial's batches again in every trial.

        Without it trials see different batches, and their losses tell the rates apart less well.
        A loader with ``state_dict`` and ``load_state_dict``, such as torchdata's
        `StatefulDataLoader`, stays one: Lightning then resumes it within an epoch.
        """
        is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        return (StatefulReplayed if is_stateful else Replayed)(loader, self)

    def batch(self, fresh: Any) -> Any:
        """Returns what to train on in place of a fresh batch; see `FrameworkSearch.batch`."""
        return fresh if self._search is None else self._search.batch(fresh)

    def begin_epoch(self, loader: SizedLoader) -> None:
        """Tells a loader that is replayed the epoch, as Lightning tells its own."""
        if self._trainer is not None:
            set_epoch(loader, self._trainer.current_epoch)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the controller, when all that a checkpoint brings is in place."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise RuntimeError(
                "AutoLRSCallback serves automatic optimisation with one optimizer; in manual "
                "optimisation call AutoLRS.step after the optimizer's step yourself"
            )
        if trainer.lr_scheduler_configs:
            raise RuntimeError(
                "a scheduler would write over the learning rates of AutoLRS: return the optimizer "
                "alone from configure_optimizers"
            )
        self._trainer = trainer
        if isinstance(trainer.train_dataloader, Replayed):
            trainer.train_dataloader.check_divided(trainer)
        total_steps = trainer.estimated_stepping_batches
        if not math.isfinite(total_steps) or total_steps < 1:
            raise ValueError(
                f"AutoLRS needs a budget, the Trainer has {total_steps} updates: give it max_steps "
                "or max_epochs"
            )
        self._search = None  # that of an earlier fit() drives the optimizer no more
        options = dict(self._options)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            options["extra_state"] = (*options.get("extra_state", ()), scaler)
        optimizer = unwrapped(trainer.optimizers[0])
        auto = AutoLRS(optimizer, pl_module, self._lr_bounds, int(total_steps), **options)
        self._search = FrameworkSearch(auto)
        if self._loaded is not None:
            self._search.load_state_dict(self._loaded)
            self._loaded = None
        self._updates = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follows an update, if the batch has completed one."""
        assert self._search is not None
        loss = outputs if isinstance(outputs, Tensor) else (outputs or {}).get("loss")
        if loss is not None:
            self._search.add_loss(loss)
        if trainer.global_step == self._updates:
            return
        self._updates = trainer.global_step
        if not self._search.has_loss:  # a training_step may return None: there is no update then
            return
        self._search.end_update()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(self.auto.metrics(), step=trainer.global_step - 1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the search; Lightning saves it."""
        return {} if self._search is None else {"autolrs": self._search.auto.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a saved state until training starts; Lightning loads callbacks first."""
        self._loaded = state_dict.get("autolrs")


class Replayed:
    """A loader whose batches come again in every trial; see `AutoLRSCallback.replayed`."""

    def __init__(self, loader: SizedLoader, callback: AutoLRSCallback) -> None:
        if not hasattr(loader, "__len__"):
            raise TypeError(
                f"{type(loader).__name__} has no length: Lightning would draw a batch ahead of it, "
                "before a trial's end is known; pass it to trainer.fit as it is"
            )
        self._loader: Any = loader
        self._callback = callback

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._callback.begin_epoch(self._loader)
        for batch in self._loader:
            yield self._callback.batch(batch)

    def check_divided(self, trainer: Any) -> None:
        """Raises RuntimeError if all processes would get the same batches.

        Lightning gives a sampler of its own to each `DataLoader`, but to nothing around one.
        """
        connector = trainer._data_connector
        if isinstance(self._loader, DataLoader) and connector._requires_distributed_sampler(
            self._loader
        ):
            raise RuntimeError(
                "all processes would train on the same batches, as Lightning divides up those of a "
                "DataLoader that it gets itself only: return replayed(DataLoader(dataset, ..., "
                "sampler=DistributedSampler(dataset))) from train_dataloader"
            )


class StatefulReplayed(Replayed):
    """The same for a loader that can be resumed where it was."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loader.load_state_dict(state_dict)
