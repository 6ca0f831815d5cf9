"""A copy of the training state to roll back to, in place and without waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrs_ext.autolrs.constants import Constants
from lrs_ext.autolrs.copy_memory import CopyMemory
from lrs_ext.autolrs.live_state import (
    SCHEDULE_STEP,
    LiveState,
    copied,
    is_like,
    kind,
    param_index,
    restore_tensors_where,
    share_memory,
    state_entries,
    state_to_come,
)
from lrs_ext.autolrs.random_state import on_host, random_state, set_random_state
from lrs_ext.autolrs.rank_parts import (
    arrays_of_parts,
    converted_states,
    is_same_part,
    numbers_of_parts,
    spread_tensors,
)
from lrs_ext.autolrs.state_fit import check_complete, check_fit
from lrs_ext.learning_rates import Mark
from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.shards import is_dtensor, like, local

_PLACES = "places"


class Snapshot:
    """Parameters, buffers, optimizer and extra state, and all random generators.

    All memory is taken at the start. Tensors are restored into the storage that they have, so that
    captured graphs stay valid. Only where a buffer or a state has changed its shape or dtype or is
    gone, it is put back as a new tensor. A buffer that was not there when the state was copied is
    taken for a cache, which follows from the rest, and stays.

    A frozen parameter, which requires no gradient and is in no parameter group, is not copied but
    watched: if training changes it, such as a target network, this is an error as soon as the host
    knows. With its module in `extra_state` it is copied, in the model too. Buffers always are.

    Reading a GradScaler or a module in `extra_state` never waits; other objects, and modules with
    ``get_extra_state``, are asked for their state.

    Args:
        model, optimizer, extra_state: see `LiveState`.
        placement: of the copies; see `CopyMemory`.

    Raises:
        ValueError: there is no such placement, several elements of a tensor share memory, or one is
            sparse.
        TypeError: an extra object has no ``state_dict`` or ``load_state_dict``.
        RuntimeError: the copy does not fit into memory; the message says how many bytes it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra_state: Sequence[Any],
        placement: str = "device",
    ) -> None:
        self._memory = CopyMemory(placement)
        self._live, self._optimizer = LiveState(model, optimizer, extra_state), optimizer
        self._captured: set[str] = set()
        self._constants = Constants()
        self._numbers: dict[str, Any] = {}  # entries of the optimizer's state that are no tensors
        self._random: dict[str, Any] = {}
        self._mark = Mark(0)  # of an optimizer of `lrs_ext`, on the host
        live = _without(self._live.local_tensors(), self._live.frozen())
        to_come = state_to_come(optimizer)
        # What every run with this model and optimizer has, whenever it is saved.
        self._foretold = {name for name in (*to_come, *live) if kind(name) != "counter"}
        homes = self._live.homes(to_come)
        homes |= _devices({name: t for name, t in to_come.items() if not t.is_meta} | live)
        self._memory.reserve(to_come | live, homes, self._live.extra_states())

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take: of parameters, buffers, optimizer and extra state."""
        return self._memory.nbytes

    def leave(self, extra: Any) -> None:
        """Keeps an object of `extra_state` out of roll-backs: somebody else looks after it."""
        self._live.leave(extra)

    @torch.no_grad()
    def capture(self) -> None:
        """Copies the present state."""
        everything, frozen = self._live.local_tensors(), self._live.frozen()
        live = _without(everything, frozen)
        self._memory.extra.clear()
        self._memory.reserve(live, _devices(live), self._live.extra_states())
        _copy_all((self._memory.tensors[name], tensor) for name, tensor in live.items())
        self._captured = set(live)
        self._constants.note({name: everything[name] for name in sorted(frozen)})
        if isinstance(self._optimizer, ScheduledOptimizer):
            self._mark = self._optimizer.mark()
        self._numbers = {
            name: copy.deepcopy(value) for name, value in state_entries(self._optimizer, False)
        }
        self._random = random_state()

    @torch.no_grad()
    def restore(self, is_resumed: bool = False) -> None:
        """Puts back the state of the last `capture`; optimizer state that is younger starts again.

        It is then zero in an optimizer of `lrs_ext`, whose captured graphs keep its addresses, and
        not there at all in one of torch, or if it has just been loaded.

        Args:
            is_resumed: whether nothing has been trained since a checkpoint was loaded.

        Raises:
            ValueError: a parameter is new, gone or of another shape; nothing has been changed.
            RuntimeError: a frozen parameter has changed.
        """
        live, copies = self._live.local_tensors(), self._memory.tensors
        self._constants.check(live)
        constants = (self._constants.names | self._live.frozen()) - self._captured
        known = {name: copies[name] for name in self._captured}
        check_fit(known, _without(live, constants), ("parameter",))
        changed = {
            name
            for name in self._captured
            if kind(name) != "parameter"
            and not (name in live and is_like(live[name], copies[name]))
        }
        # The buffers, for which it may fail, before the states.
        for owner, entry, name in self._live.places(sorted(changed)):
            owner[entry] = self._memory.at_home(name)
        alike = known.keys() - changed
        _copy_all((tensor, copies[name]) for name, tensor in live.items() if name in alike)
        if isinstance(self._optimizer, ScheduledOptimizer):
            self._optimizer.roll_back_(self._mark)
            for name in live.keys() - self._captured:
                if kind(name) in ("state", "counter"):
                    live[name].zero_()
            if is_resumed:  # a momentum buffer that was loaded counts as one that has begun
                self._forget_younger_states()
        else:
            self._restore_torch_state()
        for key, (_, set_state) in self._live.extras().items():
            if key in self._memory.extra:
                set_state(copied(self._memory.extra[key]))
        set_random_state(self._random)

    @torch.no_grad()
    def restore_where(self, bad: Tensor) -> None:
        """Puts back tensors where `bad`, bool, 0-d, is true; schedules and random numbers go on.

        An extra object whose state has copies of its floating-point tensors gets it back, `bad` or
        not. A loader, whose random numbers are bytes, does not: it might start from there again.

        Optimizer state that is younger than the copy becomes zero, where it starts in torch too;
        only numbers other than the step, such as NAdam's product of momenta, which starts at one,
        stay. A buffer that is younger or has changed its shape stays.

        Raises:
            RuntimeError: a frozen parameter has changed.
        """
        live = self._live.local_tensors()
        self._constants.check(live)
        for name, tensor in live.items():
            before = self._before(name, tensor)
            if before is not None:
                before = before.to(tensor.device, non_blocking=True)
                tensor.copy_(torch.where(bad.to(tensor.device), before, tensor))
        for key, (get_state, set_state) in self._live.extras().items():
            state = get_state()
            restore_tensors_where(bad, state, self._memory.extra.get(key))
            if not share_memory(state, get_state()):  # they were copies
                set_state(state)

    def trained(self) -> list[tuple[Tensor, Tensor]]:
        """Returns this rank's part of each of the optimizer's parameters, and the copy of it."""
        live, copies = self._live.local_tensors(), self._memory.tensors
        names = self._live.trained() & self._captured
        return [(live[name], copies[name]) for name in sorted(names)]

    def state_dict(self) -> dict[str, Any]:
        """Returns the copies; waits for the device if they are in host memory.

        "tensors" has the same names in every run with this model and optimizer, so that checkpoints
        that read into what a new run has find all of them; what was not there to be copied is 0.
        The rest is in tuples, which they take as they are. What parameters are spread over ranks as
        DTensors, so are their copies. All is the same on every rank but `of_this_rank`.
        """
        memory, copies, params = self._memory, self._memory.tensors, self._live.params
        memory.wait()
        spread, saved = spread_tensors(self._live, copies), {}
        for name in sorted(self._foretold | self._captured):
            part = copies[name]
            part = part.clone() if name in self._captured else torch.zeros_like(part)
            saved[name] = like(spread[name], part) if name in spread else part
        portable = converted_states(self._optimizer, saved, ScheduledOptimizer.saved_state)
        saved |= portable
        own = arrays_of_parts(saved.keys() - spread.keys() - portable.keys(), copies, params)
        foretold, younger = self._foretold - own, self._captured - self._foretold - own
        places = {_PLACES: numbers_of_parts(params)}
        return {
            "tensors": {name: saved[name] for name in sorted(foretold)} | places,
            "captured": tuple(sorted(self._captured)),
            "younger": tuple((name, saved[name]) for name in sorted(younger)),
            "numbers": tuple(copy.deepcopy(self._numbers).items()),
            "extra": tuple(copied(memory.extra).items()),
            "of_this_rank": {
                "random": self._random,
                "parts": {name: saved[name] for name in sorted(own & self._captured)},
            },
        }

    def load_state_dict(self, state: dict[str, Any], is_own: bool = True) -> None:
        """Takes over the copies; each goes to where training has what it is a copy of.

        Waits for the device if they are in host memory.

        Args:
            is_own: whether it was saved by this rank: another's random numbers are not taken over,
                but those of now.

        Raises:
            ValueError: the parameters or persistent buffers are not those of the model; nothing has
                been changed.
        """
        tensors = state["tensors"] | dict(state["younger"])
        if is_own:
            tensors = tensors | state["of_this_rank"]["parts"]
        lost = sorted(set(state["captured"]) - tensors.keys())
        alien = sorted(arrays_of_parts(lost, self._memory.tensors, self._live.params))
        if not is_own:  # only what is in "tensors" is brought to each rank
            alien += [name for name, tensor in state["younger"] if is_dtensor(tensor)]
        if not is_same_part(tensors.pop(_PLACES), self._live.params):
            alien.append("the copy of the training state")
        check_complete(lost, alien)
        saved = {name: tensors[name] for name in state["captured"]}
        saved |= converted_states(self._optimizer, saved, ScheduledOptimizer.loaded_state)
        saved = {name: local(tensor) for name, tensor in saved.items()}
        live = _without(self._live.local_tensors(), self._live.frozen() - saved.keys())
        check_fit(saved, live, ("parameter", "buffer"))
        homes = self._live.homes(saved) | self._memory.homes | _devices(live)
        self._memory.reserve(saved, homes, {})
        self._memory.wait()
        for name, tensor in saved.items():
            self._memory.tensors[name].copy_(tensor)
        self._captured = set(saved)
        self._constants.forget()  # the model may load its parameters now or later
        if SCHEDULE_STEP in saved:
            self._mark = Mark(int(saved[SCHEDULE_STEP]))
        self._numbers = copy.deepcopy(dict(state["numbers"]))
        present = self._live.extra_states()
        self._memory.extra = {key: copied(value, present.get(key)) for key, value in state["extra"]}
        self._random = on_host(state["of_this_rank"]["random"]) if is_own else random_state()

    def _before(self, name: str, tensor: Tensor) -> Tensor | None:
        """Returns what a tensor goes back to; None if it stays."""
        if name == SCHEDULE_STEP:
            return None
        if name in self._captured:
            copied = self._memory.tensors[name]
            return copied if copied.shape == tensor.shape else None
        is_zero = tensor.dim() > 0 or name.endswith(" step")
        is_young_state = kind(name) == "counter" or (kind(name) == "state" and is_zero)
        return torch.zeros_like(tensor) if is_young_state else None

    def _forget_younger_states(self) -> None:
        captured = {param_index(name) for name in self._captured if kind(name) == "state"}
        for index, param in enumerate(self._live.params):
            if index not in captured:
                self._optimizer.state.pop(param, None)

    def _restore_torch_state(self) -> None:
        for index, param in enumerate(self._live.params):
            state = self._optimizer.state.get(param, {})
            for key in list(state):
                name = f"state {index} {key}"
                if name not in self._captured and name not in self._numbers:
                    del state[key]
                elif name in self._numbers:
                    state[key] = copy.deepcopy(self._numbers[name])
            if not state:
                self._optimizer.state.pop(param, None)


def _without(tensors: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _devices(tensors: dict[str, Tensor]) -> dict[str, torch.device]:
    return {name: tensor.device for name, tensor in tensors.items()}


def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies into the first of each pair from the second; torch is fast for tensors of one kind."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        alike = (target.dtype, source.dtype, target.device, source.device)
        targets, sources = groups.setdefault(alike, ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources, non_blocking=True)
