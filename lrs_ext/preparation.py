"""What comes before a launch: numbers of the groups, states, counts and tables are made ready."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrs_ext import capture_checks
from lrs_ext.backends import select_backends
from lrs_ext.device_tables import States
from lrs_ext.group_numbers import GroupNumbers
from lrs_ext.local_part import LocalPart
from lrs_ext.param_devices import device_of, devices_of, params_of
from lrs_ext.positions import Group
from lrs_ext.rule import Rule
from lrs_ext.step_counters import StepCounters
from lrs_ext.step_parts import Selection, Table
from lrs_ext.table_set import Launches, TableSet
from lrs_ext.tensor_checks import check_params, checked_gradient, number


class Preparation:
    """Makes ready what the steps of an optimizer launch.

    Groups and states are the optimizer's and come with each call.

    Args:
        rule: the optimizer's update.
        counters: of the parameters' updates.
        groups: the parameter groups.
        step: committed updates so far.
        capacity: the least length of a row of learning rates.

    Attributes:
        rule, counters: as given.
        numbers: of the groups.
        backends: that in use on each device.
        tables: what the kernels read.
        was_captured: whether a CUDA graph holds a step.
    """

    def __init__(
        self, rule: Rule, counters: StepCounters, groups: list[Group], step: int, capacity: int
    ) -> None:
        self.rule = rule
        self.counters = counters
        self.was_captured = False
        self.take_groups(groups, step, capacity)

    def take_groups(self, groups: list[Group], step: int, capacity: int) -> None:
        """Begins anew with other groups."""
        self.backends = self._select_backends(groups)
        self.numbers = GroupNumbers(self.rule, groups, list(self.backends), step, capacity)
        self.forget_tables()

    def forget_tables(self) -> None:
        """Makes the next step make all tables anew."""
        self._is_on_gpu = any(device.type == "cuda" for device in self.backends)
        self.tables = TableSet(self.rule, self.numbers, self.backends)

    def add_group(self, groups: list[Group]) -> None:
        """Takes in a group that has been added to `groups`."""
        self.backends = self._select_backends(groups)
        self.numbers.add_group(groups, list(self.backends))
        self.forget_tables()

    def _select_backends(self, groups: list[Group]) -> dict[torch.device, str]:
        return select_backends(self.rule.requested_backend, params_of(groups))

    # The numbers of the groups

    def has_written(self, groups: list[Group]) -> bool:
        """Returns whether the devices are known to have all numbers of the groups."""
        schedules = self.numbers.rates.buffer.schedules
        return self.tables.known_groups.are_unchanged(groups, schedules)

    def write(self, groups: list[Group]) -> None:
        """Writes what has changed in the groups to the devices, without waiting.

        Raises:
            ValueError: a number is invalid.
            RuntimeError: something has changed in the capture of a CUDA graph, whose replays would
                write it again; or a graph reads other states than a step would now.
        """
        if self.is_captured:
            self._check_written(groups)
        if self.was_captured:
            names = [self.rule.state_names(group) for group in self._fixed(groups)]
            capture_checks.check_state_names(self.tables, names)
        known = self.tables.known_groups
        known.look_at(groups, self.numbers.rates.buffer.schedules)
        names = []
        for index, group in enumerate(groups):
            fixed = self.numbers.sync(index, group)
            hyper = self._hyper(fixed)
            for tables in self.tables.all:
                tables.write(index, hyper)
            names.append(self.rule.state_names(fixed))
        for tables in self.tables.all:
            tables.name_states(names)
        if all(_is_constant(group.get(key)) for group in groups for key in self.rule.defaults):
            known.confirm()

    def _fixed(self, groups: list[Group]) -> list[Group]:
        return [self.numbers.hyper_schedules.fixed(i, group) for i, group in enumerate(groups)]

    def _hyper(self, fixed: Group) -> dict[str, float]:
        # Tensors may change in their place, so that only their numbers can be compared later.
        return {name: number(value) for name, value in self.rule.hyper(fixed).items()}

    # The capture of a CUDA graph

    @property
    def is_captured(self) -> bool:
        """Whether what is launched now goes into a CUDA graph."""
        return self._is_on_gpu and torch.cuda.is_current_stream_capturing()

    def check_capture(self, groups: list[Group], is_released: bool) -> None:
        """Checks that replays of the step now captured would do as it does.

        Args:
            is_released: whether parameters are updated in the backward pass.

        Raises:
            RuntimeError: they would not.
        """
        if not is_released:
            capture_checks.check_gradients(params_of(groups))
        capture_checks.check_tables(self.tables, is_released)
        [device] = self.backends
        capture_checks.check_device(device, torch.cuda.current_device())

    def check_capture_of(self, param: Tensor) -> None:
        """Checks the same for the update of one parameter in the backward pass."""
        if device_of(param) not in self.backends or not self.tables.of(param).has_single(param):
            raise RuntimeError(self._frozen)

    @property
    def _frozen(self) -> str | None:
        """Why tables and states must stay as they are, None if they need not."""
        return capture_checks.frozen(self.is_captured, self.was_captured)

    def _check_written(self, groups: list[Group]) -> None:
        for index, fixed in enumerate(self._fixed(groups)):
            capture_checks.check_on_host(index, self.rule.hyper(fixed))
            is_written = self.tables.has_written(index, self._hyper(fixed))
            is_synced = is_written and self.numbers.is_synced(index, groups[index])
            capture_checks.check_synced(index, is_synced)
            capture_checks.check_in_place(index, self.numbers.rates.is_copied(index))

    # All parameters

    def launches(self, groups: list[Group], states: States) -> Launches:
        """Returns what a step launches, once `write` has written: parts with gradients.

        All parameters that have a gradient then have states. Everything is checked before anything
        is changed.

        Raises:
            RuntimeError: tables and states do not serve, and must stay as they are for a CUDA
                graph; or a parameter or a gradient has a dtype, layout or device that the kernels
                do not serve.
        """
        launches = self.tables.current([group["params"] for group in groups], states)
        if launches is None:
            launches = self._renewed(groups, states)
        return [[part for part in parts if part.has_gradients] for parts in launches]

    @torch.no_grad()
    def _renewed(self, groups: list[Group], states: States) -> Launches:
        for fixed in self._fixed(groups):
            check_params(fixed["params"], self.rule.name)
            self.rule.storage.check(fixed["params"], self.rule.state_names(fixed))
        params = params_of(groups)
        gradients = [checked_gradient(param, self.rule.name) for param in params]
        if all(gradient is None for gradient in gradients):
            return [[] for _ in self.backends]
        param_lists = [group["params"] for group in groups]
        launches = self.tables.current(param_lists, states, gradients)
        if launches is not None:  # gradients in another layout were all that was in the way
            return launches
        frozen = self._frozen
        if devices_of(params) != list(self.backends):
            self._follow_params(groups, states, frozen)
        indices = [index for index, group in enumerate(groups) for _ in group["params"]]
        rows = list(zip(params, indices, gradients, strict=True))
        if frozen is not None:
            for param, index, gradient in rows:
                self._check_known(param, index, gradient, states, frozen)
        self.tables.copy_strided(params)
        if frozen is None:
            self.keep_only(params)
        steps = [self._step_of(param, index, gradient, states) for param, index, gradient in rows]
        every = Selection(param_lists, list(range(len(params))), states, steps, gradients)
        return self.tables.renewed(every, frozen)

    def keep_only(self, params: list[Tensor]) -> None:
        """Lets go of parameters that have left the groups."""
        self.counters.keep_only(set(params))
        self.tables.forget_all_but(params)

    def _step_of(
        self, param: Tensor, index: int, gradient: Tensor | None, states: States
    ) -> Tensor | None:
        """Returns the step counter of a parameter in group `index`, with its state completed.

        It is None where the parameter has never had a gradient.
        """
        if gradient is None and param not in states and not self.counters.has(param, states):
            return None
        is_new = self.tables.of(param).complete_state(param, states, index)
        return self.counters.of(param, states, is_new)

    def _check_known(
        self, param: Tensor, index: int, gradient: Tensor | None, states: States, frozen: str
    ) -> None:
        """Raises RuntimeError if a parameter in group `index` has its first gradient."""
        has_count = self.counters.has(param, states)
        is_known = has_count and self.tables.of(param).has_state(param, states, index)
        if gradient is not None and not is_known:
            raise RuntimeError(frozen)

    def _follow_params(self, groups: list[Group], states: States, frozen: str | None) -> None:
        """Moves everything to the devices to which the parameters have been moved."""
        if frozen is not None:
            raise RuntimeError(frozen)
        self.backends = self._select_backends(groups)
        self.numbers.move(groups, list(self.backends))
        for param in filter(states.__contains__, params_of(groups)):
            state = states[param]
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.to(param.device)
        self.counters.follow_params()
        self.forget_tables()
        self.write(groups)

    # One parameter

    @torch.no_grad()
    def single(self, param: Tensor, groups: list[Group], states: States) -> Table | LocalPart:
        """Returns the table of one dense parameter with a gradient; see `launches`."""
        frozen = self._frozen
        if device_of(param) not in self.backends:
            self._follow_params(groups, states, frozen)
        tables = self.tables.of(param)
        table = tables.current_single(param, states)
        if table is not None:
            return table
        check_params([param], self.rule.name)
        gradient = checked_gradient(param, self.rule.name)
        index, position = _place_of(param, groups)
        if not tables.has_single(param):
            frozen = None  # no graph reads a table of this parameter
        if frozen is not None:
            self._check_known(param, index, gradient, states, frozen)
        param_lists = [[param] if i == index else [] for i in range(len(groups))]
        step = self._step_of(param, index, gradient, states)
        state = {param: states[param]} if param in states else {}
        return tables.single(Selection(param_lists, [position], state, [step], [gradient]), frozen)


def _place_of(param: Tensor, groups: list[Group]) -> tuple[int, int]:
    """Returns the group of a parameter and its position among all parameters."""
    position = 0
    for index, group in enumerate(groups):
        for other in group["params"]:
            if other is param:
                return index, position
            position += 1
    raise RuntimeError("a parameter with a hook of step_in_backward has left the optimizer")


def _is_constant(value: Any) -> bool:
    """Returns whether a value of a group only changes by being replaced."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str))
