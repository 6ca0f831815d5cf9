"""The base of the optimizers: `torch.optim.Optimizer` on top of one step table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lrs_ext import capture_checks, takeover
from lrs_ext.buffer import ScheduleBuffer
from lrs_ext.capture_checks import CAPTURE_AGAIN
from lrs_ext.checkpoint import last_step, wrap_tensors
from lrs_ext.functional import HYPER_NAMES, STATE_NAMES
from lrs_ext.gradient_release import GradientRelease
from lrs_ext.group_numbers import GroupNumbers, put_all_schedules
from lrs_ext.hyper_schedules import numbers_of, with_peaks
from lrs_ext.learning_rates import Mark, at_height_of, check_learning_rate
from lrs_ext.param_devices import params_of, read_all
from lrs_ext.positions import Group
from lrs_ext.preparation import Preparation
from lrs_ext.rule import Rule
from lrs_ext.schedules import Schedule
from lrs_ext.state_storage import Storage
from lrs_ext.step_counters import StepCounters
from lrs_ext.step_hooks import watched_step
from lrs_ext.steps import Steps


class ScheduledOptimizer(torch.optim.Optimizer):
    """One launch a step for every tensor of every group on a device.

    A leaf class says which update it is, which arrays it keeps and which numbers are in range.
    """

    algorithm: ClassVar[str]
    _counts_in_state: ClassVar[bool] = True

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
        self._check(with_peaks(numbers_of(defaults), defaults))
        self._rule = self._rule_of(defaults, backend, storage or Storage())
        self._is_started = False
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
            is_known = place < len(self._numbers)  # else it waits for a load
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
        self._numbers.follow_device(self.param_groups)
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
            self._preparation.forget_tables()
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
            takeover.sync(self._preparation, self.param_groups, self.state)

    def forget_graphs(self) -> None:
        """Says that no captured CUDA graph holds a step any more, so that everything may change.

        Until then, what such a graph would not notice is an error: new groups, other tensors. What
        a capture that has failed leaves to its step, a norm or released gradients, goes as well.
        """
        self._steps.forget_graphs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; the schedules go on where they are.

        Raises:
            RuntimeError: a parameter has a dtype, layout or device that the kernels do not serve,
                or a CUDA graph holds a step.
        """
        if self._is_started:
            if self.was_captured:
                raise RuntimeError(
                    f"a new group is not in the captured CUDA graph: {CAPTURE_AGAIN}"
                )
            self._take_loaded_groups()
        super().add_param_group(param_group)
        try:
            self._rule.check_new_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        if self._is_started:
            self._preparation.add_group(self.param_groups)

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
        self._steps.update_all(self)
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
        return self._steps.release(self)

    def clip_(self, max_norm: float | Tensor) -> Tensor:
        """Limits the norm of the gradients in the next step; see `lrs_ext.clip_grad_norm_`."""
        return self._steps.clip(self, max_norm)

    profile_hook_step = staticmethod(watched_step)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as in torch; each group also has its schedules and position.

        Reads the position, and with it the learning rates, from the device.
        """
        self._take_loaded_groups()
        shown = [dict(group) for group in self.param_groups]
        self._numbers.follow_device(self.param_groups)
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
        takeover.expect_load(self._preparation, self.param_groups)
        handle = self.register_load_state_dict_pre_hook(wrap_tensors)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    # What AutoLRS needs

    @property
    def committed_steps(self) -> int:
        """The steps made by this object, rolled back or not; not those of CUDA graphs."""
        return self._steps.committed

    @property
    def may_have_skipped(self) -> bool:
        """Whether a flag on the device decided on the last step."""
        return self._steps.may_have_skipped

    @property
    def was_captured(self) -> bool:
        """Whether a step has been captured into a CUDA graph."""
        return self._preparation.was_captured

    @property
    def step_counters(self) -> dict[Tensor, Tensor]:
        """Step counters, float32, 0-d, for which the state of `torch.optim` has no place."""
        return self._preparation.counters.own

    def state_to_come(self) -> list[dict[str, Tensor]]:
        """Returns what arrays are kept for each parameter, on the meta device."""
        fixed = map(self._numbers.hyper_schedules.fixed, itertools.count(), self.param_groups)
        return [
            self._rule.storage.arrays(param, self._state_names(group))
            for group in fixed
            for param in group["params"]
        ]

    def saved_state(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the state of a parameter for a checkpoint; see `Storage.saved`."""
        return self._rule.storage.saved(param, state)

    def loaded_state(self, param: Tensor, saved: dict[str, Tensor]) -> dict[str, Any]:
        """Returns the arrays that `saved_state` had as they are kept; see `Storage.loaded`."""
        return self._rule.storage.loaded(param, saved, STATE_NAMES[self.algorithm])

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
            self._preparation.forget_tables()

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

    # What it is made of

    def _rule_of(self, defaults: dict[str, Any], backend: str | None, storage: Storage) -> Rule:
        return Rule(
            self.algorithm,
            type(self).__name__,
            self._check,
            self._state_names,
            self._hyper,
            defaults,
            numbers_of(defaults),
            storage,
            backend,
        )

    @classmethod
    def _hyper(cls, group: Group) -> dict[str, float]:
        """Returns the numbers that the update reads, by their native names."""
        names = HYPER_NAMES[cls.algorithm]
        if "beta1" in names:
            beta1, beta2 = group["betas"]
            group = {**group, "beta1": beta1, "beta2": beta2}
        return {name: group[name] for name in names}

    def _start(self, counters: StepCounters, step: int = 0, capacity: int = 1) -> None:
        groups = self.param_groups
        self._preparation = Preparation(self._rule, counters, groups, step, capacity)
        self._steps = Steps(self._preparation, self._update_one)
        self._is_started = True

    @property
    def _numbers(self) -> GroupNumbers:
        return self._preparation.numbers

    def _update_one(self, param: Tensor) -> bool:
        return self._steps.update_one(self, param)

    # Pickling, copying, loading

    def __getstate__(self) -> dict[str, Any]:
        self._take_loaded_groups()
        self._numbers.follow_device(self.param_groups)
        return {
            **super().__getstate__(),
            "_requested_backend": self._rule.requested_backend,
            "_storage": self._rule.storage,
            "_counters": self.step_counters,
            "_schedules": [self._numbers.schedules(i) for i in range(len(self.param_groups))],
            "_schedule_step": self._numbers.rates.step,
            "_values": self.schedule_buffer.values,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled optimizer, or, from `load_state_dict`, states and groups alone."""
        if "defaults" not in state:
            groups, saved = state["param_groups"], state["state"]
            takeover.load(self._preparation, groups, self.state, saved, in_place=False)
            self.param_groups = groups
            self._preparation.write(groups)
            return
        state = dict(state)
        schedules, step = state.pop("_schedules"), state.pop("_schedule_step")
        values, counters = state.pop("_values"), state.pop("_counters")
        backend, storage = state.pop("_requested_backend"), state.pop("_storage")
        super().__setstate__(state)
        self._rule = self._rule_of(self.defaults, backend, storage)
        for group, in_charge in zip(self.param_groups, schedules, strict=True):
            put_all_schedules(self._rule.movable, group, in_charge)
        self._start(StepCounters(self._counts_in_state, counters), step, values.shape[1])
        for buffer in self.schedule_buffers.values():
            buffer.values.copy_(values)  # what write_ has put there is in no schedule

    def _take_loaded_groups(self) -> None:
        """Follows a wrapper that has loaded a checkpoint into groups and states by itself."""
        takeover.follow(self._preparation, self.param_groups, self.state)
