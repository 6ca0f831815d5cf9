"""Whether the optimizer has made an update, as far as the host can see."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from lrs_ext.param_devices import first_device
from lrs_ext.scheduled_optimizer import ScheduledOptimizer


class StepWatch:
    """Compares the optimizer's updates with those that have been followed.

    Args:
        may_skip: whether updates may fail to come, because a GradScaler leaves them out.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, may_skip: bool) -> None:
        self._optimizer, self._may_skip = optimizer, may_skip
        self._seen = 0
        self._is_captured = False
        if not isinstance(optimizer, ScheduledOptimizer):
            watch = weakref.ref(self)

            def count(*_: Any) -> None:
                self = watch()
                if self is not None:
                    self._seen += 1
                    self._is_captured |= _is_capturing(self._optimizer)

            weakref.finalize(self, optimizer.register_step_post_hook(count).remove)
        self._followed = self._updates

    def follow(self) -> None:
        """Takes the updates so far for followed."""
        self._followed = self._updates

    def check(self) -> None:
        """Checks that there has been an update since the last `follow`.

        Replays of a captured step cannot be seen, so after a capture there is nothing to check.

        Raises:
            RuntimeError: there has been none.
        """
        if self._updates == self._followed and not (self._may_skip or self._is_replayed):
            raise RuntimeError(
                "auto.step() follows one optimizer.step(), and there was none since the last call: "
                "without any gradient it makes no update; if a GradScaler skipped it, pass the "
                "scaler in extra_state; if a CUDA graph makes it, make AutoLRS before the capture"
            )

    def check_followed(self) -> None:
        """Checks that at most one update waits for `follow`.

        Raises:
            RuntimeError: there are more: a loop without `auto.step` would never end.
        """
        waiting = self._updates - self._followed
        if waiting > 1:
            raise RuntimeError(
                f"the optimizer has made {waiting} updates since the last auto.step(loss): call it "
                "after each optimizer.step()"
            )

    @property
    def _updates(self) -> int:
        optimizer = self._optimizer
        if isinstance(optimizer, ScheduledOptimizer):
            return optimizer.committed_steps
        return self._seen

    @property
    def _is_replayed(self) -> bool:
        optimizer = self._optimizer
        if isinstance(optimizer, ScheduledOptimizer):
            return optimizer.was_captured
        return self._is_captured


def _is_capturing(optimizer: torch.optim.Optimizer) -> bool:
    is_on_gpu = first_device(optimizer).type == "cuda"
    return is_on_gpu and torch.cuda.is_current_stream_capturing()
