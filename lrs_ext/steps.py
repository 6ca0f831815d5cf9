"""The steps of an optimizer: of all groups, or of one parameter in the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from lrs_ext.grad_scaling import StepScaling
from lrs_ext.gradient_release import GradientRelease
from lrs_ext.layout import is_dense
from lrs_ext.local_part import total_norm
from lrs_ext.param_devices import params_of
from lrs_ext.positions import Group
from lrs_ext.preparation import Preparation
from lrs_ext.shards import Spread, local, spread_of
from lrs_ext.table_set import Launches
from lrs_ext.takeover import sync
from lrs_ext.wrappers import others_have_gradients, whole_optimizer


class Steps:
    """Launches what has been made ready, and follows it on the host.

    The optimizer comes with each call: its groups and states are there, and what a GradScaler
    lends it.

    Args:
        preparation: of what is launched.
        update_one: the optimizer's method that calls the one here; see `GradientRelease`.

    Attributes:
        committed: steps made by this object, rolled back or not; not those of CUDA graphs.
        may_have_skipped: whether a flag on the device decided on the last one.
    """

    def __init__(self, preparation: Preparation, update_one: Callable[[Tensor], bool]) -> None:
        self._preparation = preparation
        self.committed, self.may_have_skipped = 0, False
        self._scaling = StepScaling()
        self._released = GradientRelease(update_one)
        # A kernel lets other threads run, whose step would free the gradients that it reads.
        self._lock = threading.RLock()

    def forget_graphs(self) -> None:
        """Says that no captured CUDA graph holds a step any more; see `ScheduledOptimizer`."""
        self._preparation.was_captured = False
        self._scaling.forget_capture()
        self._released.forget_capture()

    def launches(self, optimizer: Optimizer, is_captured: bool) -> Launches:
        """Returns what a step launches: parts with what the host has changed and with gradients.

        Args:
            is_captured: whether that happens in the capture of a CUDA graph.
        """
        preparation, groups = self._preparation, optimizer.param_groups
        if is_captured:
            preparation.check_capture(groups, self._released.is_in_force)
        if not preparation.has_written(groups):
            sync(preparation, groups, optimizer.state)
        return preparation.launches(groups, optimizer.state)

    def update_all(self, optimizer: Optimizer) -> None:
        """Updates every parameter that has a gradient, and advances the schedule."""
        with self._lock:
            preparation = self._preparation
            is_captured = preparation.is_captured
            may_be_blank = not optimizer.state and not is_captured  # a capture makes no states
            launches = self.launches(optimizer, is_captured)
            has_released = self._released.finish(is_captured)
            if not any(launches) and not has_released and not others_have_gradients(optimizer):
                self._scaling = StepScaling()  # a limit was for this step
                return
            if may_be_blank and not has_released and self._are_zeroed(optimizer.param_groups):
                # Distributed checkpoints make an optimizer create its states by a step with zero
                # gradients and a zero learning rate. It must not count as an update.
                preparation.counters.are_blank = True
                return
            self._run(optimizer, launches, is_captured)

    def _are_zeroed(self, groups: list[Group]) -> bool:
        """Returns whether all learning rates and all gradients, on all ranks, are 0; may wait."""
        if not self._preparation.numbers.rates.zeroed_by_host:
            return False
        found: dict[Spread, bool] = {}
        for param in params_of(groups):
            if param.grad is not None:
                spread = spread_of(param)
                found[spread] = bool(local(param.grad).any()) or found.get(spread, False)
        return sum(spread.any(here) for spread, here in found.items()) == 0

    def _run(self, optimizer: Optimizer, launches: Launches, is_captured: bool) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        loss_scale = getattr(optimizer, "grad_scale", None)
        scaling = self._scaling.take(loss_scale, found_inf, is_captured)
        is_released = self._released.is_in_force
        if is_released and scaling is not None:
            raise RuntimeError(
                "gradients released in the backward pass can no longer be unscaled or clipped: use "
                "bfloat16 without a GradScaler, or step() without step_in_backward()"
            )
        preparation, groups = self._preparation, optimizer.param_groups
        tables, numbers = preparation.tables, preparation.numbers
        committed, host_step = self.committed, numbers.rates.step
        try:
            tables.run(launches, scaling)
            if is_released and not is_captured:
                self._released.note_step(preparation.backends)
            preparation.counters.are_blank = False
            self.may_have_skipped = found_inf is not None
            if is_captured:  # no update before the first replay
                preparation.was_captured = True
                return
            self.committed += 1
            numbers.advance(groups, tables.known_groups, found_inf)
        except KeyboardInterrupt:  # it waits for a kernel on the CPU, which has advanced the step
            if not is_captured:
                numbers.follow_device(groups)
                self.committed = committed + (numbers.rates.step > host_step)
            raise

    def clip(self, optimizer: Optimizer, max_norm: float | Tensor) -> Tensor:
        """Limits the norm of the gradients in the next step; see `lrs_ext.clip_grad_norm_`."""
        if self._released.is_in_force:
            raise RuntimeError(
                "gradients released in the backward pass cannot be clipped together: take "
                "step_in_backward() back by remove()"
            )
        if whole_optimizer(optimizer) is not None:
            raise RuntimeError(
                "in ZeroRedundancyOptimizer each rank's optimizer sees only its own share of the "
                "gradients: use torch.nn.utils.clip_grad_norm_ for those of the model"
            )
        is_captured = self._preparation.is_captured
        with self._lock:
            launches = self.launches(optimizer, is_captured)
            norms = [(part.grad_norm(), part.spread) for parts in launches for part in parts]
        norm = total_norm(norms, self._preparation.numbers.rates.buffer.step.device)
        self._scaling.clip(norm, max_norm, is_captured)
        return norm

    # In the backward pass

    def release(self, optimizer: Optimizer) -> GradientRelease:
        """Updates each dense parameter in the backward pass; see `step_in_backward`."""
        if self._released.is_in_force:
            raise RuntimeError("step_in_backward is in force already: remove() its handle first")
        preparation, all_params = self._preparation, params_of(optimizer.param_groups)
        params = [param for param in all_params if param.requires_grad]
        if not preparation.was_captured:
            preparation.keep_only(all_params)
        if preparation.rule.algorithm == "lamb" and any(spread_of(p).groups for p in params):
            raise RuntimeError(
                "the norms that LAMB takes of parameters on several ranks cannot be exchanged in "
                "the backward pass: use step() without step_in_backward()"
            )
        self._released.begin(param for param in params if is_dense(local(param)))
        return self._released

    def update_one(self, optimizer: Optimizer, param: Tensor) -> bool:
        """Updates one dense parameter from its gradient, without advancing the schedule.

        Returns:
            Whether a CUDA graph captures that.
        """
        preparation, groups = self._preparation, optimizer.param_groups
        is_captured = preparation.is_captured
        if is_captured:
            preparation.check_capture_of(param)
        with self._lock:  # a backward pass has a thread for each device
            self._released.wait_for_numbers()
            if not preparation.has_written(groups):
                if not is_captured:
                    self._released.wait_for_step()
                sync(preparation, groups, optimizer.state)
                self._released.note_numbers(preparation.backends)
            table = preparation.single(param, groups, optimizer.state)
            table.run(commits_step=False)
        return is_captured
