"""The tables of an optimizer's parameters, on each device its own."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from lrs_ext import ops, param_devices
from lrs_ext.device_tables import DeviceTables, Part, States
from lrs_ext.grad_scaling import GradScaling
from lrs_ext.group_numbers import GroupNumbers
from lrs_ext.rule import Rule
from lrs_ext.step_parts import Selection

Launches = list[list[Part]]  # for each device, what a step launches there


class TableSet:
    """The `DeviceTables` of all devices; a step is one launch on each.

    Args:
        rule: the optimizer's update.
        numbers: of the groups.
        backends: that of each device.

    Attributes:
        all: those of the first parameter's device first.
        known_groups: tells whether the rows hold all that the groups do.
    """

    def __init__(
        self,
        rule: Rule,
        numbers: GroupNumbers,
        backends: Mapping[torch.device, str],
    ) -> None:
        self.known_groups = ops.KnownGroups()
        self._buffers = numbers.rates.buffers
        self._by_device = {
            device: DeviceTables(rule, numbers, place, backend)
            for place, (device, backend) in enumerate(backends.items())
        }
        self.all = list(self._by_device.values())
        # A launch on the CPU returns when it is done: meanwhile, the others are at work.
        self._launch_order = sorted(enumerate(backends), key=lambda item: item[1].type == "cpu")
        self._parts_of_params: list[list[list[Tensor]]] = []  # by device and group
        self._params: list[list[Tensor]] = []  # by group, as they were divided

    def of(self, param: Tensor) -> DeviceTables:
        """Returns the tables on the parameter's device."""
        return self._by_device[param_devices.device_of(param)]

    def has_written(self, index: int, hyper: dict[str, float]) -> bool:
        """Returns whether the rows of a group hold these fixed numbers."""
        return all(tables.has_written(index, hyper) for tables in self.all)

    def forget_numbers(self) -> None:
        """Makes the next `write` of each group write."""
        self.known_groups.forget()
        for tables in self.all:
            tables.forget_numbers()

    def forget_all_but(self, params: list[Tensor]) -> None:
        """Lets go of the tables of single parameters that are not among these."""
        for tables in self.all:
            tables.forget_all_but(params)

    def copy_strided(self, params: list[Tensor]) -> None:
        """Makes dense copies of the parameters with gaps; first of all."""
        for device, tables in self._by_device.items():
            tables.copy_strided([p for p in params if param_devices.device_of(p) == device])

    def current(
        self,
        param_lists: list[list[Tensor]],
        state: States,
        gradients: list[Tensor | None] | None = None,
    ) -> Launches | None:
        """Returns what a step launches, None if it has to be made up anew by `renewed`.

        Args:
            gradients: in the place of the parameters' own.
        """
        if len(self.all) == 1:
            parts = self.all[0].current_parts(param_lists, state, gradients)
            return None if parts is None else [parts]
        if gradients is not None or not self._are_divided(param_lists):
            return None
        launches = []
        for tables, own_lists in zip(self.all, self._parts_of_params, strict=True):
            parts = tables.current_parts(own_lists, state)
            if parts is None:
                return None
            launches.append(parts)
        return launches

    def renewed(self, every: Selection, frozen: str | None) -> Launches:
        """Returns what a step launches; see `DeviceTables.parts`."""
        if len(self.all) == 1:
            return [self.all[0].parts(every, frozen)]

        def share_of(device: torch.device) -> Selection:
            return every.only(lambda param: param_devices.device_of(param) == device)

        shares = list(map(share_of, self._by_device))
        self._params = [list(params) for params in every.param_lists]
        self._parts_of_params = [share.param_lists for share in shares]
        return [tables.parts(share, frozen) for tables, share in zip(self.all, shares, strict=True)]

    def _are_divided(self, param_lists: list[list[Tensor]]) -> bool:
        """Returns whether the parameters are those that have last been divided by device."""
        return len(param_lists) == len(self._params) and all(
            len(present) == len(known) and all(map(operator.is_, present, known))
            for present, known in zip(param_lists, self._params, strict=True)
        )

    def run(self, launches: Launches, scaling: GradScaling | None) -> None:
        """Updates all parameters that have a gradient, and advances the schedule everywhere.

        Args:
            launches: parts with gradients; where there are none, the schedule advances too.
            scaling: on any devices.
        """
        # All waiting comes first: a CPU does not wait for the launches of this step.
        scalings = None if scaling is None else [scaling_on(scaling, d) for d in self._by_device]
        for place, device in self._launch_order:
            parts, own = launches[place], None if scalings is None else scalings[place]
            for part in parts:
                part.run(own, commits_step=part is parts[-1])
            if not parts:
                _advance(self._buffers[device].step, None if own is None else own.found_inf)


def scaling_on(scaling: GradScaling, device: torch.device) -> GradScaling:
    """Returns what a step reads on `device`, of which the CPU waits for what comes from others."""
    return GradScaling(
        *(None if t is None else param_devices.on_device(t, device) for t in scaling.tensors())
    )


def _advance(step: Tensor, found_inf: Tensor | None) -> None:
    if found_inf is None:
        step.add_(1)
    else:
        step.add_((found_inf == 0.0).reshape(()))
