"""What the step kernels read on one device: numbers of the groups, addresses of the parameters."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lrs_ext import ops, reference
from lrs_ext.group_numbers import GroupNumbers
from lrs_ext.layout import dense_copies
from lrs_ext.local_part import LocalPart, by_spread
from lrs_ext.rule import Rule
from lrs_ext.shards import WHOLE, Spread, is_dtensor, local, spread_of
from lrs_ext.step_parts import Selection, StridedPart, Table
from lrs_ext.tensor_checks import check_numbers

# What a row of the group table holds: learning rates, numbers, rows of numbers that move.
Written = tuple[Tensor | None, dict[str, float], Mapping[str, Tensor]]
States = dict[Tensor, dict[str, Any]]
Part = Table | StridedPart | LocalPart


class DeviceTables:
    """The group table and the step tables of an optimizer's parameters on one device.

    Args:
        rule: the optimizer's update.
        numbers: of the groups.
        place: the number of the device among those of `numbers`.
        backend: that of the launches.

    Attributes:
        groups: the group table.
        table: that of the last step, None if it must be made anew.
        copies: dense ones, of the parameters with gaps.
    """

    def __init__(
        self,
        rule: Rule,
        numbers: GroupNumbers,
        place: int,
        backend: str,
    ) -> None:
        self._algorithm, self._storage = rule.algorithm, rule.storage
        self._label = f"lrs_ext::{rule.name.lower()}_step[{backend}]"
        self._numbers = numbers
        self._place = place
        self._step = list(numbers.rates.buffers.values())[place].step
        self._backend = backend
        self.groups = ops.GroupTable(len(numbers), self._step.device)
        self.table: Table | None = None
        self.copies: dict[Tensor, Tensor] = {}
        self._local_parts: list[LocalPart] = []  # of all parameters, if some are DTensors
        self._local_params: list[Tensor] = []
        self._names: list[list[str]] = []
        self._singles: dict[Tensor, tuple[Table | LocalPart, list[list[Tensor]], States]] = {}
        self.forget_numbers()

    # The numbers of the groups

    def write(self, index: int, hyper: dict[str, float]) -> None:
        """Writes the row of a group where it has changed.

        Args:
            hyper: the fixed numbers by native names.
        """
        row = self._numbers.rates.row(index, self._place)
        moving = self._numbers.hyper_schedules.rows(index, self._place)
        written_row, written_hyper, written_moving = self._written[index]
        if row is not written_row or moving is not written_moving or hyper != written_hyper:
            check_numbers(hyper)
            self.groups.write(index, row, hyper, moving)
            self._written[index] = (row, hyper, moving)

    def has_written(self, index: int, hyper: dict[str, float]) -> bool:
        """Returns whether the row of a group holds these fixed numbers."""
        return self._written[index][1] == hyper

    def forget_numbers(self) -> None:
        """Makes the next `write` of each group write."""
        self._written: list[Written] = [(None, {}, {}) for _ in range(len(self._numbers))]

    def has_named(self, names: list[list[str]]) -> bool:
        """Returns whether these are the arrays that the present tables read."""
        return names == self._names

    def name_states(self, names: list[list[str]]) -> None:
        """Says, for each group, which arrays of its states the update reads."""
        if not self.has_named(names):
            self._names = names
            self.table = None
            self._local_parts = []
            self._singles.clear()

    # Tables of all parameters

    def current_parts(
        self,
        param_lists: list[list[Tensor]],
        state: States,
        gradients: list[Tensor | None] | None = None,
    ) -> list[Part] | None:
        """Returns what a step launches, None if it has to be made up anew by `parts`."""
        if self._local_parts:
            is_current = gradients is None and self._has_local_parts_of(param_lists)
            is_current = is_current and all(part.refresh(state) for part in self._local_parts)
            return [*self._local_parts] if is_current else None
        table = self.table
        if self.copies or table is None or not table.refresh(param_lists, state, gradients):
            return None
        return [table]

    def copy_strided(self, params: list[Tensor]) -> None:
        """Makes dense copies of the parameters with gaps; first of all."""
        self.copies = dense_copies(map(local, params), self.copies)

    def has_state(self, param: Tensor, state: States, index: int) -> bool:
        """Returns whether a parameter in group `index` has all arrays of its state."""
        needed = self._storage.arrays(param, self._names[index])
        return needed.keys() <= state.get(param, {}).keys()

    def complete_state(self, param: Tensor, state: States, index: int) -> bool:
        """Creates missing arrays of a parameter in group `index` and converts foreign ones.

        Returns:
            Whether any was missing.
        """
        names = self._names[index]
        if not self._storage.has_arrays(param, names):
            return False
        dense = param if is_dtensor(param) else self.copies.get(param, param)
        return self._storage.complete(dense, state[param], names)

    def parts(self, every: Selection, frozen: str | None) -> list[Part]:
        """Returns what a step launches.

        Args:
            every: all parameters, with complete states.
            frozen: why the present table must serve, None if it need not.

        Raises:
            RuntimeError: it does not serve, and says `frozen`.
        """
        if any(map(is_dtensor, itertools.chain.from_iterable(every.param_lists))):
            return self._refreshed_local_parts(every)
        self._local_parts = []
        if not self.copies:
            return [self._refreshed_table(every, frozen)]
        strided = every.only(lambda param: param in self.copies)
        dense = every.only(lambda param: param not in self.copies)
        return [
            self._refreshed_table(dense, frozen),
            StridedPart(strided, self.copies, self._make_table),
        ]

    def _refreshed_table(self, selection: Selection, frozen: str | None) -> Table:
        table = self.table
        refreshed = (selection.param_lists, selection.state, selection.gradients)
        if table is None or not table.refresh(*refreshed):
            self._check_free(frozen)
            table = self.table = self._make_table(selection)
        return table

    def _check_free(self, frozen: str | None) -> None:
        # The reference has no table on the device: it is made anew for every step.
        if frozen is not None and self._backend != "reference":
            raise RuntimeError(frozen)

    # Tables of what this rank holds of DTensors

    @property
    def has_local_parts(self) -> bool:
        """Whether parameters are DTensors."""
        return bool(self._local_parts)

    def _has_local_parts_of(self, param_lists: list[list[Tensor]]) -> bool:
        params, known = [*itertools.chain.from_iterable(param_lists)], self._local_params
        return len(params) == len(known) and all(map(operator.is_, params, known))

    def _refreshed_local_parts(self, every: Selection) -> list[Part]:
        selections = by_spread(every)
        parts = self._local_parts if self._has_local_parts_of(every.param_lists) else []
        if len(parts) != len(selections) or not all(
            part.refresh(selection.state, selection.gradients)
            for part, (_, selection) in zip(parts, selections, strict=True)
        ):
            self._local_params = [*itertools.chain.from_iterable(every.param_lists)]
            self._local_parts = [
                LocalPart(selection, spread, self._make_table) for spread, selection in selections
            ]
        return [*self._local_parts]

    # Tables of one dense parameter

    def current_single(self, param: Tensor, state: States) -> Table | LocalPart | None:
        """Returns the table of one parameter, None if it has to be made anew by `single`."""
        table, param_lists, own_state = self._singles.get(param, (None, [], {}))
        if table is None or own_state.get(param) is not state.get(param):
            return None
        if isinstance(table, LocalPart):
            return table if table.refresh(own_state) else None
        return table if table.refresh(param_lists, own_state) else None

    def forget_all_but(self, params: list[Tensor]) -> None:
        """Lets go of the tables of single parameters that are not among these."""
        present = set(params) if self._singles else ()
        self._singles = {p: single for p, single in self._singles.items() if p in present}

    def has_single(self, param: Tensor) -> bool:
        """Returns whether there is a table of this parameter, current or not."""
        return param in self._singles

    def single(self, selection: Selection, frozen: str | None) -> Table | LocalPart:
        """Returns the table of one parameter; see `parts`."""
        self._check_free(frozen)
        param = next(param for params in selection.param_lists for param in params)
        table: Table | LocalPart
        if is_dtensor(param):
            table = LocalPart(selection, spread_of(param), self._make_table)
        else:
            table = self._make_table(selection)
        self._singles[param] = (table, selection.param_lists, selection.state)
        return table

    def _make_table(self, selection: Selection, spread: Spread = WHOLE) -> Table:
        if self._backend == "reference":
            updates = self._updates_of(selection)
            return reference.ReferenceTable(
                self._algorithm, updates, self._step, self._storage, spread, self._label
            )
        table = ops.StepTable(
            backend=self._backend,
            algorithm=self._algorithm,
            param_lists=selection.param_lists,
            positions=selection.positions,
            state=selection.state,
            state_names=self._names,
            steps=selection.steps,
            groups=self.groups,
            step=self._step,
            storage=self._storage,
            spread=spread,
            label=self._label,
        )
        if not table.refresh(selection.param_lists, selection.state, selection.gradients):
            raise RuntimeError(ops.CHANGED_WHILE_READ)
        return table

    def _updates_of(self, selection: Selection) -> list[reference.TensorUpdate]:
        updates = []
        rates, hyper_schedules = self._numbers.rates, self._numbers.hyper_schedules
        rows = zip(selection.positions, selection.steps, selection.gradients, strict=True)
        for index, params in enumerate(selection.param_lists):
            lr, fixed = rates.current(index, self._place), self._written[index][1]
            hyper = hyper_schedules.current(index, fixed, self._step, self._place)
            for param in params:
                position, count, grad = next(rows)
                if count is None or grad is None:
                    continue
                state, names = selection.state.get(param, {}), self._names[index]
                updates.append(
                    reference.TensorUpdate(param, grad, state, names, count, lr, hyper, position)
                )
        return updates
