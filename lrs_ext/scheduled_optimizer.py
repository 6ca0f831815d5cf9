"""The base of the optimizers: `torch.optim.Optimizer` on top of one step table."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lrs_ext import capture_checks
from lrs_ext.backends import select_backends
from lrs_ext.buffer import ScheduleBuffer
from lrs_ext.capture_checks import CAPTURE_AGAIN
from lrs_ext.checkpoint import (
    check_complete,
    last_step,
    replace_states,
    unwrap_states,
    wrap_tensors,
)
from lrs_ext.functional import FEWEST_STATES, HYPER_NAMES, STATE_NAMES
from lrs_ext.grad_scaling import StepScaling
from lrs_ext.gradient_release import GradientRelease
from lrs_ext.group_numbers import GroupNumbers, put_all_schedules
from lrs_ext.hyper_schedules import numbers_of, with_peaks
from lrs_ext.layout import is_dense
from lrs_ext.learning_rates import Mark, at_height_of, check_learning_rate
from lrs_ext.local_part import total_norm
from lrs_ext.param_devices import devices_of, params_of, read_all
from lrs_ext.positions import Group, check_note
from lrs_ext.preparation import Preparation
from lrs_ext.rule import Rule
from lrs_ext.schedules import Schedule
from lrs_ext.shards import Spread, is_dtensor, local, spread_of
from lrs_ext.state_storage import REMAINDER, Storage
from lrs_ext.step_counters import StepCounters
from lrs_ext.step_hooks import watched_step
from lrs_ext.table_set import Launches
from lrs_ext.tensor_checks import check_numbers, check_params
from lrs_ext.wrappers import whole_optimizer


class ScheduledOptimizer(torch.optim.Optimizer):
    """One launch a step for every tensor of every group on a device.

    A leaf class says which update it is, which arrays it keeps and which numbers are in range.
    """

    algorithm: ClassVar[str]
    _counts_in_state: ClassVar[bool] = True
    committed_steps: int  # by this object, roll-backs or not; not those of CUDA graphs
    was_captured: bool  # whether a step has been captured into a CUDA graph
    _released: GradientRelease
    _has_blank_states: bool  # all 0, made for a distributed checkpoint
    may_have_skipped: bool  # whether a flag on the device decided on the last step

    # A GradScaler then leaves it to `step` to undo its scale and to skip an overflow, for which it
    # lends the optimizer the attributes `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        backend: str | None,
        storage: Storage | None = None,
    ) -> None:
        if defaults["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`; use torch.optim")
        if defaults["fused"] and defaults["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        check_learning_rate(defaults["lr"])
        self._movable = numbers_of(defaults)
        self._check(with_peaks(self._movable, defaults))
        self._requested_backend = backend
        self._storage = storage or Storage()
        self._is_started = self.was_captured = False
        super().__init__(params, defaults)
        self._start(StepCounters(self._counts_in_state))

    # What a leaf class says; see `Rule`

    @staticmethod
    def _check(group: Group) -> None:
        raise NotImplementedError

    @staticmethod
    def _state_names(group: Group) -> list[str]:
        raise NotImplementedError

    # What users see

    def __repr__(self) -> str:
        """Returns what torch does, with the schedules that are in charge of each group."""
        lines = [f"{type(self).__name__} ("]
        places = self._numbers.new_order(self.param_groups)
        for index, group in enumerate(self.param_groups):
            place = index if places is None else places[index]
            is_known = place < self._preparation.tables.num_groups  # else it waits for a load
            shown = {**group, "schedule": self._numbers.schedules(place) if is_known else {}}
            lines.append(f"Parameter Group {index}")
            lines += [f"    {key}: {shown[key]}" for key in sorted(shown) if key != "params"]
        return "\n".join([*lines, ")"])

    @property
    def backend(self) -> str:
        """The name of the backend in use on the first parameter's device."""
        return next(iter(self._preparation.backends.values()))

    @property
    def backends(self) -> dict[torch.device, str]:
        """The name of the backend in use, by device."""
        return dict(self._preparation.backends)

    @property
    def schedule_buffer(self) -> ScheduleBuffer:
        """The learning rates on the first parameter's device: row g belongs to group g."""
        self._take_loaded_groups()
        return self._numbers.rates.buffer

    @property
    def schedule_buffers(self) -> dict[torch.device, ScheduleBuffer]:
        """The learning rates on each device: twins, of which all get what one is given."""
        self._take_loaded_groups()
        return dict(self._numbers.rates.buffers)

    def lr_tensor(self, group: int = 0) -> Tensor:
        """Returns what the next update of a group will use: float32, 0-d, without a sync.

        Raises:
            IndexError: there is no such group.
        """
        self._check_index(group)
        self._take_loaded_groups()
        rates = self._numbers.rates
        if self._preparation.is_captured:
            is_synced = rates.is_synced(group, self.param_groups[group])
            capture_checks.check_synced(group, is_synced)
            capture_checks.check_in_place(group, rates.is_copied(group))
        rates.sync(group, self.param_groups[group])
        return rates.current(group)

    def current_lr(self) -> list[float]:
        """Returns what the next update of each group will use; waits for the device.

        From then on ``group["lr"]`` knows of updates that only the device had seen so far: replayed
        from a CUDA graph, or skipped under a GradScaler.
        """
        self._take_loaded_groups()
        self._numbers.follow_device(self.param_groups, self._check)
        rates = self._numbers.rates
        return read_all([rates.current(index) for index in range(len(self.param_groups))])

    def set_schedule(self, schedule: Schedule, group: int | None = None) -> None:
        """Puts another schedule in charge from the current step on, in one group or in all.

        A schedule is a function of the absolute step: ``rex(3e-4, total_steps=20_000)`` set at
        step 5,000 goes on with its value at 5,000, which is how a run gets a longer budget. A group
        with ``lr_scale`` gets it scaled; groups added later get what all have been given. Rows are
        rewritten in place, also under a captured CUDA graph; where they are too short, the buffer
        is replaced by a longer one.

        Raises:
            TypeError: it is no schedule.
            IndexError: there is no such group.
            RuntimeError: the rows are too short and a CUDA graph reads them.

        >>> import lrs_ext
        >>> opt = lrs_ext.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
        >>> opt.set_schedule(lrs_ext.rex(0.3, total_steps=100))
        >>> opt.param_groups[0]["lr"]
        0.3
        """
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"set_schedule takes a Schedule, got {schedule!r}: write a number into group['lr']"
            )
        if group is not None:
            self._check_index(group)
        self._take_loaded_groups()
        indices = range(len(self.param_groups)) if group is None else [group]
        self._numbers.rates.check_room(schedule, self.was_captured)
        if self._numbers.lengthen(self.param_groups, schedule.capacity):
            self._preparation.forget_tables(self.param_groups)
        rates = self._numbers.rates
        for index in indices:
            scaled = at_height_of(self.param_groups[index], schedule)
            rates.withdraw(index, self.param_groups[index])
            rates.buffer.fill_(index, scaled)
        if group is None:
            self.defaults["lr"] = schedule  # of groups to come
        self.sync_groups()

    def _check_index(self, group: int) -> None:
        if group not in range(len(self.param_groups)):
            raise IndexError(f"group {group} is not one of {len(self.param_groups)} groups")

    def sync_groups(self) -> None:
        """Writes what has changed in `param_groups` to the device, without waiting.

        Every step does so first. A loop that only replays a CUDA graph, which holds a step, does it
        after a change of a learning rate, a weight decay or other numbers of a group.

        Raises:
            ValueError: a number is invalid.
            RuntimeError: something has changed, and a CUDA graph is being captured.

        >>> import lrs_ext
        >>> opt = lrs_ext.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
        >>> opt.param_groups[0]["weight_decay"] = lrs_ext.linear(0.1, total_steps=100)
        >>> opt.sync_groups()
        >>> opt.param_groups[0]["weight_decay"]
        0.1
        """
        if not self._preparation.has_written(self.param_groups):
            if self._preparation.is_captured:
                self._preparation.check_written(self.param_groups)
            self._take_loaded_groups()
            self._preparation.write(self.param_groups, self.was_captured)

    def forget_graphs(self) -> None:
        """Says that no captured CUDA graph holds a step any more, so that everything may change.

        Until then, what such a graph would not notice is an error: new groups, other tensors. What
        a capture that has failed leaves to its step, a norm or released gradients, goes as well.
        """
        self.was_captured = False
        self._scaling.forget_capture()
        self._released.forget_capture()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; the schedules go on where they are.

        Raises:
            RuntimeError: a parameter has a dtype, layout or device that the kernels do not serve,
                or a CUDA graph holds a step.
        """
        if self.was_captured:
            raise RuntimeError(f"a new group is not in the captured CUDA graph: {CAPTURE_AGAIN}")
        if self._is_started:
            self._take_loaded_groups()
        super().add_param_group(param_group)
        try:
            self._check_new(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        if self._is_started:
            self._preparation.add_group(self.param_groups)

    def _check_new(self, group: Group) -> None:
        check_learning_rate(group["lr"])
        if isinstance(group["lr"], Schedule):
            at_height_of(group, group["lr"])
        check_note(group)
        fixed = with_peaks(self._movable, group)
        self._check(fixed)
        check_numbers(self._hyper(fixed))
        if fixed["params"]:
            select_backends(self._requested_backend, fixed["params"])
        check_params(fixed["params"], type(self).__name__)
        self._storage.check(fixed["params"], self._state_names(fixed))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one update of every parameter that has a gradient, and advances the schedule.

        Without any gradient nothing happens. The host does not wait for the device.

        Args:
            closure: as in torch: evaluates the model and returns the loss, which is returned.

        Raises:
            RuntimeError: a gradient is sparse, or differs from its parameter in dtype or device.
            ValueError: somebody put a negative learning rate, or another number that is not finite,
                into a parameter group; more is not checked there, as in torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._step_lock:
            self._update_all()
        return loss

    def step_in_backward(self) -> GradientRelease:
        """Updates each parameter in the backward pass, as soon as its gradient is there.

        The gradient is then freed, so that there are never many of them. `step()` after each
        backward pass advances the schedule, which is the same for all parameters until then, and
        updates what has a gradient left. There is one launch a parameter.

        Returns:
            A handle; its `remove()` ends this.

        Raises:
            RuntimeError: it is in force already.

        >>> import torch, lrs_ext
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = lrs_ext.AdamW(model.parameters(), lr=lrs_ext.rex(0.1, total_steps=10))
        >>> handle = opt.step_in_backward()
        >>> model(torch.ones(2)).sum().backward()
        >>> opt.step()
        >>> model.weight.grad is None, int(opt.schedule_buffer.step)
        (True, 1)
        """
        if self._released.is_in_force:
            raise RuntimeError("step_in_backward is in force already: remove() its handle first")
        all_params = params_of(self.param_groups)
        params = [param for param in all_params if param.requires_grad]
        dense = [param for param in params if is_dense(local(param))]
        if not self.was_captured:
            self._preparation.keep_only(all_params)
        if self.algorithm == "lamb" and any(spread_of(param).groups for param in params):
            raise RuntimeError(
                "the norms that LAMB takes of parameters on several ranks cannot be exchanged in "
                "the backward pass: use step() without step_in_backward()"
            )
        self._released.begin(dense)
        return self._released

    def clip_(self, max_norm: float | Tensor) -> Tensor:
        """Limits the norm of the gradients in the next step; see `lrs_ext.clip_grad_norm_`."""
        if self._released.is_in_force:
            raise RuntimeError(
                "gradients released in the backward pass cannot be clipped together: take "
                "step_in_backward() back by remove()"
            )
        if whole_optimizer(self) is not None:
            raise RuntimeError(
                "in ZeroRedundancyOptimizer each rank's optimizer sees only its own share of the "
                "gradients: use torch.nn.utils.clip_grad_norm_ for those of the model"
            )
        is_captured = self._preparation.is_captured
        with self._step_lock:
            launches = self._ready_launches(is_captured)
            norms = [(part.grad_norm(), part.spread) for parts in launches for part in parts]
        norm = total_norm(norms, self.schedule_buffer.step.device)
        self._scaling.clip(norm, max_norm, is_captured)
        return norm

    profile_hook_step = staticmethod(watched_step)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as in torch; each group also has its schedules and position.

        Reads the position, and with it the learning rates, from the device.
        """
        self._take_loaded_groups()
        shown = [dict(group) for group in self.param_groups]
        self._numbers.follow_device(self.param_groups, self._check)
        state_dict = super().state_dict()
        for index, param in enumerate(params_of(self.param_groups)):
            if index in state_dict["state"]:
                saved = self.saved_state(param, state_dict["state"][index])
                state_dict["state"][index] = saved
        self._numbers.save(state_dict["param_groups"], last_step(state_dict["state"]), shown)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer or of its namesake in `torch.optim`.

        States are copied into the present tensors, whose addresses stay, and keep float32. A
        checkpoint of this optimizer brings its schedule and position; one from torch leaves the
        schedules as they are, at the position of its `step`. One of torch's SGD has none, and moves
        nothing: ``schedule_buffer.set_step_(n)`` and then `current_lr()` do. Other groups than
        before, more or fewer, may have been put into `param_groups`, as Lightning's
        `BaseFinetuning` does.

        Raises:
            ValueError: the parameter groups do not match, as in torch, or states do not.
            RuntimeError: there are more or fewer than before, or states without a counterpart in
                the checkpoint, and a CUDA graph holds a step.
        """
        self._complete(self.param_groups)
        self._follow_places()
        if self._numbers.are_elsewhere(self.param_groups):
            if self.was_captured:
                raise RuntimeError(f"other groups are not in the captured graph: {CAPTURE_AGAIN}")
            for group in self._numbers.unknown(self.param_groups):
                self._check_new(group)
            self._numbers.put_schedules(self.param_groups, self._check)
            rates, counters = self._numbers.rates, self._preparation.counters
            self._take_groups(counters, int(rates.buffer.step), rates.buffer.capacity)
        for index, group in enumerate(self.param_groups):
            # A schedule that was put there, or put aside for a while and back, is in charge.
            self._numbers.sync(index, group, self._check)
        handle = self.register_load_state_dict_pre_hook(wrap_tensors)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    # What AutoLRS needs

    @property
    def step_counters(self) -> dict[Tensor, Tensor]:
        """Step counters, float32, 0-d, for which the state of `torch.optim` has no place."""
        return self._preparation.counters.own

    def state_to_come(self) -> list[dict[str, Tensor]]:
        """Returns what arrays are kept for each parameter, on the meta device."""
        fixed = map(self._numbers.hyper_schedules.fixed, itertools.count(), self.param_groups)
        return [
            self._storage.arrays(param, self._state_names(group))
            for group in fixed
            for param in group["params"]
        ]

    def saved_state(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the state of a parameter for a checkpoint; see `Storage.saved`."""
        return self._storage.saved(param, state)

    def loaded_state(self, param: Tensor, saved: dict[str, Tensor]) -> dict[str, Any]:
        """Returns the arrays that `saved_state` had as they are kept; see `Storage.loaded`."""
        return self._storage.loaded(param, saved, STATE_NAMES[self.algorithm])

    def reserve_(self, capacity: int) -> None:
        """Makes the rows of the schedule buffer at least `capacity` values long.

        Raises:
            ValueError: a schedule or a tensor is in charge of a group.
            RuntimeError: a CUDA graph reads the shorter rows.
        """
        self._take_loaded_groups()
        if self.was_captured and capacity > self.schedule_buffer.capacity:
            raise RuntimeError(f"a CUDA graph reads the schedule buffer as it is: {CAPTURE_AGAIN}")
        if self._numbers.reserve(self.param_groups, capacity):
            self._preparation.forget_tables(self.param_groups)

    def drive_(self, refill: Callable[[], None]) -> None:
        """Lets somebody else write the schedule buffer; see `LearningRates.drive`."""
        self._numbers.rates.drive(self.param_groups, refill)

    def driven_groups(self) -> list[int]:
        """Returns the groups whose rows the driver may write; see `LearningRates.driven`."""
        self._take_loaded_groups()
        return self._numbers.rates.driven(self.param_groups)

    def write_driven_(self, values: Tensor) -> None:
        """Writes the rows that the driver may write; see `LearningRates.write_driven`."""
        self._take_loaded_groups()
        self._numbers.rates.write_driven(self.param_groups, values)

    def show_(self, lrs: Sequence[float]) -> None:
        """Shows each driven group's learning rate; see `LearningRates.show`."""
        self._numbers.rates.show(self.param_groups, lrs)

    def mark(self) -> Mark:
        """Returns where the host stands, for a later `roll_back_`."""
        return self._numbers.rates.mark()

    def roll_back_(self, mark: Mark) -> None:
        """Follows on the host the schedule buffer's step, which has been put back."""
        self._numbers.roll_back(self.param_groups, mark)

    # The parts of a step

    @classmethod
    def _hyper(cls, group: Group) -> dict[str, float]:
        """Returns the numbers that the update reads, by their native names."""
        names = HYPER_NAMES[cls.algorithm]
        if "beta1" in names:
            beta1, beta2 = group["betas"]
            group = {**group, "beta1": beta1, "beta2": beta2}
        return {name: group[name] for name in names}

    def _start(self, counters: StepCounters, step: int = 0, capacity: int = 1) -> None:
        self._take_groups(counters, step, capacity)
        self._scaling = StepScaling()
        self._released = GradientRelease(self._update_one)
        # A kernel lets other threads run, whose step would free the gradients that it reads.
        self._step_lock = threading.RLock()
        self.committed_steps, self.was_captured, self.may_have_skipped = 0, False, False
        self._has_blank_states = False
        self._is_started = True

    def _take_groups(self, counters: StepCounters, step: int, capacity: int) -> None:
        groups = self.param_groups
        devices = devices_of(params_of(groups))
        self._numbers = GroupNumbers(self._movable, groups, devices, step, capacity)
        rule = Rule(
            self.algorithm,
            type(self).__name__,
            self._check,
            self._state_names,
            self._hyper,
            tuple(self.defaults),
        )
        self._preparation = Preparation(
            rule, self._storage, self._requested_backend, self._numbers, counters, groups
        )

    def _ready_launches(self, is_captured: bool) -> Launches:
        """Returns what a step launches: parts with what the host has changed and with gradients.

        Args:
            is_captured: whether that happens in the capture of a CUDA graph.
        """
        if is_captured:
            self._preparation.check_capture(self.param_groups, self._released.is_in_force)
        self.sync_groups()
        param_lists = [group["params"] for group in self.param_groups]
        launches = self._preparation.tables.current(param_lists, self.state)
        if launches is None:
            frozen = capture_checks.frozen(is_captured, self.was_captured)
            launches = self._preparation.renewed(self.param_groups, self.state, frozen)
        return [[part for part in parts if part.has_gradients] for parts in launches]

    def _update_all(self) -> None:
        """Updates every parameter that has a gradient, and advances the schedule."""
        is_captured = self._preparation.is_captured
        may_be_blank = not self.state and not is_captured  # a capture makes no states
        launches = self._ready_launches(is_captured)
        has_released = self._released.finish(is_captured)
        if not any(launches) and not has_released and not self._others_step():
            self._scaling = StepScaling()  # a limit was for this step
            return
        may_be_blank = may_be_blank and not has_released and self._numbers.rates.zeroed_by_host
        if may_be_blank and not self._any_gradient():
            # Distributed checkpoints make an optimizer create its states by a step with zero
            # gradients and a zero learning rate. It must not count as an update.
            self._has_blank_states = True
            return
        found_inf = getattr(self, "found_inf", None)
        loss_scale = getattr(self, "grad_scale", None)
        scaling = self._scaling.take(loss_scale, found_inf, is_captured)
        if self._released.is_in_force and scaling is not None:
            raise RuntimeError(
                "gradients released in the backward pass can no longer be unscaled or clipped: use "
                "bfloat16 without a GradScaler, or step() without step_in_backward()"
            )
        committed_steps, host_step = self.committed_steps, self._numbers.rates.step
        try:
            self._preparation.tables.run(launches, scaling)
            if self._released.is_in_force and not is_captured:
                self._released.note_step(self._preparation.backends)
            self._has_blank_states = False
            self.may_have_skipped = found_inf is not None
            if is_captured:  # no update before the first replay
                self.was_captured = True
                return
            self.committed_steps += 1
            known = self._preparation.tables.known_groups
            self._numbers.advance(self.param_groups, known, found_inf)
        except KeyboardInterrupt:  # it waits for a kernel on the CPU, which has advanced the step
            if not is_captured:
                self._numbers.follow_device(self.param_groups, self._check)
                self.committed_steps = committed_steps + (self._numbers.rates.step > host_step)
            raise

    def _update_one(self, param: Tensor) -> bool:
        """Updates one dense parameter from its gradient, without advancing the schedule.

        Returns:
            Whether a CUDA graph captures that.
        """
        is_captured = self._preparation.is_captured
        frozen = capture_checks.frozen(is_captured, self.was_captured)
        if is_captured and frozen is not None:
            self._preparation.check_capture_of(param, frozen)
        with self._step_lock:  # a backward pass has a thread for each device
            self._released.wait_for_numbers()
            if not self._preparation.has_written(self.param_groups):
                if not is_captured:
                    self._released.wait_for_step()
                self.sync_groups()
                self._released.note_numbers(self._preparation.backends)
            table = self._preparation.single(param, self.param_groups, self.state, frozen)
            table.run(commits_step=False)
        return is_captured

    def _others_step(self) -> bool:
        """Returns whether this is a part of a step with gradients on other ranks only."""
        whole = whole_optimizer(self)
        if whole is None:
            return not params_of(self.param_groups)
        return any(param.grad is not None for param in params_of(whole.param_groups))

    def _any_gradient(self) -> bool:
        """Returns whether any gradient has an entry that is not zero, on any rank; waits."""
        found: dict[Spread, bool] = {}
        for param in params_of(self.param_groups):
            if param.grad is not None:
                spread = spread_of(param)
                found[spread] = bool(local(param.grad).any()) or found.get(spread, False)
        return sum(spread.any(here) for spread, here in found.items()) > 0

    # Pickling, copying, loading

    def __getstate__(self) -> dict[str, Any]:
        self._take_loaded_groups()
        self._numbers.follow_device(self.param_groups, self._check)
        return {
            **super().__getstate__(),
            "_requested_backend": self._requested_backend,
            "_storage": self._storage,
            "_counters": self.step_counters,
            "_schedules": [self._numbers.schedules(i) for i in range(len(self.param_groups))],
            "_schedule_step": self._numbers.rates.step,
            "_values": self.schedule_buffer.values,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled optimizer, or, from `load_state_dict`, states and groups alone."""
        if "defaults" not in state:
            self._load(state["state"], state["param_groups"])
            return
        state = dict(state)
        schedules, step = state.pop("_schedules"), state.pop("_schedule_step")
        values, counters = state.pop("_values"), state.pop("_counters")
        super().__setstate__(state)
        self._movable = numbers_of(self.defaults)
        for group, in_charge in zip(self.param_groups, schedules, strict=True):
            put_all_schedules(self._movable, group, in_charge)
        self._start(StepCounters(self._counts_in_state, counters), step, values.shape[1])
        for buffer in self.schedule_buffers.values():
            buffer.values.copy_(values)  # what write_ has put there is in no schedule

    def _take_loaded_groups(self) -> None:
        """Follows a wrapper that has loaded a checkpoint into groups and states by itself."""
        if self._numbers.are_in_place(self.param_groups):
            return
        self._follow_places()
        if self._numbers.are_loaded(self.param_groups):
            self._load(dict(self.state), self.param_groups)

    def _follow_places(self) -> None:
        """Follows whoever has removed groups, or has put them in another order."""
        places = self._numbers.new_order(self.param_groups)
        if places is not None:
            if self.was_captured:
                raise RuntimeError(f"other groups are not in the captured graph: {CAPTURE_AGAIN}")
            self._numbers.rearrange(self.param_groups, places)
            self._preparation.forget_tables(self.param_groups)

    def _complete(self, groups: list[Group]) -> None:
        """Gives groups that somebody else has made the options that they lack."""
        for group in groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    @torch.no_grad()
    def _load(self, saved_state: dict[Any, Any], groups: list[Group]) -> None:
        # Whatever can be wrong with the checkpoint comes to light before anything is changed.
        self._complete(groups)
        names = STATE_NAMES[self.algorithm]
        states = unwrap_states(saved_state, self.state, self._storage, names)
        needed = names[: FEWEST_STATES[self.algorithm]]
        if len(needed) > 1:  # most implementations of Lion, which has one, keep no count
            check_complete(states, ["step", *needed])
        updates = last_step(states)
        in_place = groups is self.param_groups
        positions = self._numbers.resume(groups, updates, in_place)
        for position in positions:
            if position is not None and position.schedule is not None:
                self._numbers.rates.check_room(position.schedule, self.was_captured)
        if self.was_captured:
            capture_checks.check_loaded_states(self.state, states, [*names, REMAINDER])
        for group in groups:
            fixed = with_peaks(self._movable, group)
            self._check(fixed)
            self._storage.check(fixed["params"], self._state_names(fixed))
            check_numbers(self._hyper(fixed))
        # A checkpoint of torch's SGD has no step, but may have momentum.
        is_unused = all(position is not None and position.step == 0 for position in positions)
        is_unused = is_unused and not any(map(_has_content, states.values()))
        with torch.inference_mode():  # only so it may write to states that were made in that mode
            replace_states(self.state, states)
            self._preparation.counters.load(self.state, 0.0 if is_unused else 1.0)
        self._has_blank_states = is_unused
        buffer = self._numbers.rates.buffer
        self._numbers.load(groups, positions, updates)
        self.param_groups = groups
        if self._numbers.rates.buffer is buffer:
            self._preparation.tables.forget_numbers()
        else:  # the tables count in another
            self._preparation.forget_tables(groups)
        self.sync_groups()


def _has_content(state: Any) -> bool:
    """Returns whether any array of a parameter's state that is whole here is not all 0; waits."""
    arrays = [v for v in state.values() if isinstance(v, Tensor)] if isinstance(state, dict) else []
    return any(bool(array.any()) for array in arrays if not is_dtensor(array))
