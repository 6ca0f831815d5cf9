"""A copy of the training state to roll back to, in place and without waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrs_ext.autolrs.live_state import (
    Access,
    access,
    copied,
    is_like,
    is_plain_module,
    module_tensors,
    params_of,
    reshard,
    restore_tensors_where,
    state_entries,
    state_to_come,
    tensors_in,
    unwrapped,
)
from lrs_ext.autolrs.random_state import on_host, random_state, set_random_state
from lrs_ext.learning_rates import Mark
from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.shards import is_dtensor, like, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PLACEMENTS = ("device", "pinned")
_SCHEDULE_STEP = "schedule step"
_PLACES = "places"
_MEMORY_ERRORS = (MemoryError, RuntimeError)  # torch.OutOfMemoryError is the latter


class Snapshot:
    """Parameters, buffers, optimizer and extra state, and all random generators.

    All memory is taken at the start. Tensors are restored into the storage that they have, so that
    captured graphs stay valid. Only where a buffer or a state has changed its shape or dtype or is
    gone, it is put back as a new tensor. A buffer that was not there when the state was copied is
    taken for a cache, which follows from the rest, and stays.

    Reading a GradScaler or a module in `extra_state` never waits; other objects, and modules with
    ``get_extra_state``, are asked for their state.

    Args:
        model: parameters, buffers, and what its ``get_extra_state`` returns.
        optimizer: its state, and parameters that the model does not have.
        extra_state: objects with ``state_dict`` and ``load_state_dict``.
        placement: "device", beside each tensor, or "pinned", in page-locked host memory, where
            only the states of extra objects that are no modules stay beside them.

    Raises:
        ValueError: there is no such placement, or several elements of a tensor share memory.
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
        if placement not in PLACEMENTS:
            raise ValueError(f"snapshot must be one of {PLACEMENTS}, got {placement!r}")
        for extra in extra_state:
            if not (hasattr(extra, "state_dict") and hasattr(extra, "load_state_dict")):
                raise TypeError(
                    "extra_state must have objects with state_dict and load_state_dict, got "
                    f"{type(extra).__name__}"
                )
        self._model, self._optimizer, self._placement = unwrapped(model), optimizer, placement
        self._extra_state = dict(enumerate(extra_state))
        self._memory: dict[str, Tensor] = {}
        self._homes: dict[str, torch.device] = {}  # where training has what a copy is of
        self._captured: set[str] = set()
        self._numbers: dict[str, Any] = {}  # entries of the optimizer's state that are no tensors
        self._extra: dict[int | str, Any] = {}
        self._random: dict[str, Any] = {}
        self._mark = Mark(0)  # of an optimizer of `lrs_ext`, on the host
        live, to_come = self._live_tensors(), state_to_come(optimizer)
        # What every run with this model and optimizer has, whenever it is saved.
        self._foretold = {name for name in (*to_come, *live) if _kind(name) != "counter"}
        homes = self._homes_by_param(to_come)
        homes |= _devices({name: t for name, t in to_come.items() if not t.is_meta} | live)
        self._reserve(to_come | live, homes, self._states())

    @property
    def nbytes(self) -> int:
        """Memory that the copies take: of parameters, buffers, optimizer and extra state."""
        return _bytes([*self._memory.values(), *tensors_in(self._extra)])

    def leave(self, extra: Any) -> None:
        """Keeps an object of `extra_state` out of roll-backs: somebody else looks after it."""
        self._extra_state = {i: kept for i, kept in self._extra_state.items() if kept is not extra}

    @torch.no_grad()
    def capture(self) -> None:
        """Copies the present state."""
        live = self._live_tensors()
        self._extra.clear()
        self._reserve(live, _devices(live), self._states())
        _copy_all((self._memory[name], tensor) for name, tensor in live.items())
        self._captured = set(live)
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
        """
        live = self._live_tensors()
        _check_fit({name: self._memory[name] for name in self._captured}, live, ("parameter",))
        changed = {
            name
            for name in self._captured
            if _kind(name) != "parameter"
            and not (name in live and is_like(live[name], self._memory[name]))
        }
        self._rebind(sorted(changed))  # the buffers, for which it may fail, before the states
        known = self._captured - changed
        _copy_all((tensor, self._memory[name]) for name, tensor in live.items() if name in known)
        if isinstance(self._optimizer, ScheduledOptimizer):
            self._optimizer.roll_back_(self._mark)
            for name in live.keys() - self._captured:
                if _kind(name) in ("state", "counter"):
                    live[name].zero_()
            if is_resumed:  # a momentum buffer that was loaded counts as one that has begun
                self._forget_younger_states()
        else:
            self._restore_torch_state()
        for key, (_, set_state) in self._extras().items():
            if key in self._extra:
                set_state(copied(self._extra[key]))
        set_random_state(self._random)

    @torch.no_grad()
    def restore_where(self, bad: Tensor) -> None:
        """Puts back tensors where `bad`, bool, 0-d, is true; schedules and random numbers go on.

        Optimizer state that is younger than the copy becomes zero, where it starts in torch too;
        only numbers other than the step, such as NAdam's product of momenta, which starts at one,
        stay. A buffer that is younger or has changed its shape stays.
        """
        for name, tensor in self._live_tensors().items():
            before = self._before(name, tensor)
            if before is not None:
                before = before.to(tensor.device, non_blocking=True)
                tensor.copy_(torch.where(bad.to(tensor.device), before, tensor))
        for key, (get_state, _) in self._extras().items():
            restore_tensors_where(bad, get_state(), self._extra.get(key))

    def state_dict(self) -> dict[str, Any]:
        """Returns the copies; waits for the device if they are in host memory.

        "tensors" has the same names in every run with this model and optimizer, so that checkpoints
        that read into what a new run has find all of them; what was not there to be copied is 0.
        The rest is in tuples, which they take as they are. What parameters are spread over ranks as
        DTensors, so are their copies. All is the same on every rank but `of_this_rank`.
        """
        if any(tensor.is_pinned() for tensor in self._memory.values()):
            torch.cuda.synchronize()
        spread, saved = self._spread_tensors(), {}
        for name in sorted(self._foretold | self._captured):
            part = self._memory[name]
            part = part.clone() if name in self._captured else torch.zeros_like(part)
            saved[name] = like(spread[name], part) if name in spread else part
        portable = self._by_param(saved, ScheduledOptimizer.saved_state)
        saved |= portable
        own = saved.keys() - spread.keys() - portable.keys()
        own = {name for name in own if self._is_of_a_part(name)}
        foretold, younger = self._foretold - own, self._captured - self._foretold - own
        return {
            "tensors": {name: saved[name] for name in sorted(foretold)} | {_PLACES: self._places()},
            "captured": tuple(sorted(self._captured)),
            "younger": tuple((name, saved[name]) for name in sorted(younger)),
            "numbers": tuple(copy.deepcopy(self._numbers).items()),
            "extra": tuple(copied(self._extra).items()),
            "of_this_rank": {
                "random": self._random,
                "parts": {name: saved[name] for name in sorted(own & self._captured)},
            },
        }

    def load_state_dict(self, state: dict[str, Any], is_own: bool = True) -> None:
        """Takes over the copies; each goes to where training has what it is a copy of.

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
        alien = [name for name in lost if self._is_of_a_part(name)]
        if not is_own:  # only what is in "tensors" is brought to each rank
            alien += [name for name, tensor in state["younger"] if is_dtensor(tensor)]
        places = tensors.pop(_PLACES)
        if is_dtensor(places) and not _is_same(local(places), local(self._places())):
            alien.append("the copy of the training state")
        if alien:
            raise ValueError(
                f"{alien[0]} belongs to what another rank has of the parameters: save and load "
                "AutoLRS.state_dict on each rank, or with torch.distributed.checkpoint"
            )
        if lost:
            raise ValueError(
                f"the checkpoint has no {lost[0]}, which the optimizer of the saved run had: make "
                "an update before AutoLRS is made and the checkpoint is loaded into it"
            )
        saved = {name: tensors[name] for name in state["captured"]}
        saved |= self._by_param(saved, ScheduledOptimizer.loaded_state)
        saved = {name: local(tensor) for name, tensor in saved.items()}
        live = self._live_tensors()
        _check_fit(saved, live, ("parameter", "buffer"))
        self._reserve(saved, self._homes_by_param(saved) | self._homes | _devices(live), {})
        for name, tensor in saved.items():
            self._memory[name].copy_(tensor)
        self._captured = set(saved)
        if _SCHEDULE_STEP in saved:
            self._mark = Mark(int(saved[_SCHEDULE_STEP]))
        self._numbers = copy.deepcopy(dict(state["numbers"]))
        present = self._states()
        self._extra = {key: copied(value, present.get(key)) for key, value in state["extra"]}
        self._random = on_host(state["of_this_rank"]["random"]) if is_own else random_state()

    def _live_tensors(self) -> dict[str, Tensor]:
        """Returns this rank's part of `_live`."""
        return {name: local(tensor) for name, tensor in self._live().items()}

    def _spread_tensors(self) -> dict[str, DTensor]:
        """Returns the DTensors among what is copied, and parameters in place of states to come."""
        live, params = self._live(), params_of(self._optimizer)
        for name, part in self._memory.items():
            if name not in live and _kind(name) == "state":
                param = params[int(name.split(" ")[1])]
                if part.dim() > 0 and part.shape == local(param).shape:
                    live[name] = param
        return {name: tensor for name, tensor in live.items() if is_dtensor(tensor)}

    def _by_param(
        self,
        tensors: dict[str, Tensor],
        convert: Callable[[ScheduledOptimizer, Tensor, dict[str, Tensor]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Returns what `convert` makes of the arrays of each parameter that is a DTensor.

        An optimizer of `lrs_ext` may keep them in blocks of each rank's part.
        """
        if not isinstance(self._optimizer, ScheduledOptimizer):
            return {}
        converted: dict[str, Tensor] = {}
        for index, param in enumerate(params_of(self._optimizer)):
            if is_dtensor(param):
                prefix = f"state {index} "
                arrays = {n: t for n, t in tensors.items() if n.startswith(prefix) and t.dim() > 0}
                arrays = {n.removeprefix(prefix): t.to(param.device) for n, t in arrays.items()}
                arrays = convert(self._optimizer, param, arrays)
                converted |= {prefix + name: array for name, array in arrays.items()}
        return converted

    def _places(self) -> Tensor:
        """Returns numbers of which each part of the parameters has others.

        In a file of another rank they are that rank's.
        """
        numbers = torch.arange(1 << 12, dtype=torch.int32)
        for param in params_of(self._optimizer):
            if is_dtensor(param):
                from torch.distributed.tensor import Replicate, Shard, distribute_tensor

                placements = [Shard(0) if p.is_shard() else Replicate() for p in param.placements]
                numbers = numbers.to(param.device)
                return distribute_tensor(numbers, param.device_mesh, placements, src_data_rank=None)
        return numbers

    def _is_of_a_part(self, name: str) -> bool:
        """Whether it is an array of one rank's part of a parameter, such as scales of its blocks.

        A DTensor says itself whose part it is.
        """
        if _kind(name) != "state" or name not in self._memory or self._memory[name].dim() == 0:
            return False
        return is_dtensor(params_of(self._optimizer)[int(name.split(" ")[1])])

    def _live(self) -> dict[str, Tensor]:
        """Returns everything that is copied in place, by a name that every process gives it.

        Its first word says what it is: a parameter, a buffer, a cache (a buffer that is in no
        checkpoint), a state or counter of the optimizer, or the schedule.
        """
        for module in self._modules().values():
            reshard(module)
        tensors: dict[str, Tensor] = {}
        own: set[Tensor] = set()
        for owner, module in self._modules().items():
            for name, tensor in module_tensors(module, owner):
                if tensor not in own:
                    own.add(tensor)
                    tensors[name] = tensor
        for index, param in enumerate(params_of(self._optimizer)):
            if param not in own:
                tensors[f"parameter optimizer[{index}]"] = param
        tensors.update(state_entries(self._optimizer, True))
        if isinstance(self._optimizer, ScheduledOptimizer):
            tensors[_SCHEDULE_STEP] = self._optimizer.schedule_buffer.step
            for index, param in enumerate(params_of(self._optimizer)):
                if param in self._optimizer.step_counters:
                    tensors[f"counter {index}"] = self._optimizer.step_counters[param]
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def _modules(self) -> dict[str, nn.Module]:
        """Returns the modules that are copied in place, by what comes before their names."""
        modules = {"": self._model}
        for index, extra in self._extra_state.items():
            if is_plain_module(extra):
                modules[f"extra_state[{index}]."] = extra
        return modules

    def _extras(self) -> dict[int | str, Access]:
        """Returns access to all states that are not copied in place."""
        extras: dict[int | str, Access] = {
            index: access(extra)
            for index, extra in self._extra_state.items()
            if not is_plain_module(extra)
        }
        for owner, module in self._modules().items():
            for path, part in module.named_modules():
                if type(part).get_extra_state is not nn.Module.get_extra_state:
                    extras[f"{owner}{path}"] = (part.get_extra_state, part.set_extra_state)
        return extras

    def _states(self) -> dict[int | str, Any]:
        return {key: get_state() for key, (get_state, _) in self._extras().items()}

    def _homes_by_param(self, names: Iterable[str]) -> dict[str, torch.device]:
        """Returns the device of the parameter that each name belongs to, else of the first one."""
        devices = [param.device for param in params_of(self._optimizer)]
        of_param = ("state", "counter")
        return {
            name: devices[int(name.split(" ")[1]) if _kind(name) in of_param else 0]
            for name in names
        }

    def _rebind(self, names: Sequence[str]) -> None:
        """Puts buffers and states back as new tensors."""
        modules, params = self._modules(), params_of(self._optimizer)
        places: list[tuple[dict[str, Any], str, str]] = []
        for name in names:
            kind, _, path = name.partition(" ")
            if kind == "state":
                index, _, key = path.partition(" ")
                places.append((self._optimizer.state[params[int(index)]], key, name))
            elif kind in ("buffer", "cache"):
                owner = max((o for o in modules if path.startswith(o)), key=len)
                module, _, key = path.removeprefix(owner).rpartition(".")
                places.append((modules[owner].get_submodule(module)._buffers, key, name))
        for place, key, name in places:
            empty = torch.empty_like(self._memory[name], device=self._homes[name])
            place[key] = empty.copy_(self._memory[name], non_blocking=True)

    def _before(self, name: str, tensor: Tensor) -> Tensor | None:
        """Returns what a tensor goes back to; None if it stays."""
        if name == _SCHEDULE_STEP:
            return None
        if name in self._captured:
            copied = self._memory[name]
            return copied if copied.shape == tensor.shape else None
        is_zero = tensor.dim() > 0 or name.endswith(" step")
        is_young_state = _kind(name) == "counter" or (_kind(name) == "state" and is_zero)
        return torch.zeros_like(tensor) if is_young_state else None

    def _forget_younger_states(self) -> None:
        captured = {name.split(" ")[1] for name in self._captured if _kind(name) == "state"}
        for index, param in enumerate(params_of(self._optimizer)):
            if str(index) not in captured:
                self._optimizer.state.pop(param, None)

    def _restore_torch_state(self) -> None:
        for index, param in enumerate(params_of(self._optimizer)):
            state = self._optimizer.state.get(param, {})
            for key in list(state):
                name = f"state {index} {key}"
                if name not in self._captured and name not in self._numbers:
                    del state[key]
                elif name in self._numbers:
                    state[key] = copy.deepcopy(self._numbers[name])
            if not state:
                self._optimizer.state.pop(param, None)

    def _reserve(
        self,
        tensors: dict[str, Tensor],
        homes: dict[str, torch.device],
        states: dict[int | str, Any],
    ) -> None:
        """Takes the memory for copies of tensors that do not have any yet, and copies `states`.

        Args:
            homes: where training has, or will have, each tensor.
        """
        missing = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in self._memory
            or not is_like(self._memory[name], tensor)
            or self._homes[name] != homes[name]
        }
        _check_overlaps(missing)
        extra = list(tensors_in(states))
        needed = _bytes([*missing.values(), *extra])
        try:
            host = [t for n, t in missing.items() if self._device(homes[n]).type == "cpu"]
            host += [tensor for tensor in extra if tensor.device.type == "cpu"]
            if host and _bytes(host) > (available := available_host_memory()):
                raise MemoryError(f"{available:,} bytes of host memory are available")
            for name, tensor in missing.items():
                self._memory.pop(name, None)
                home, device = homes[name], self._device(homes[name])
                self._homes[name] = home
                self._memory[name] = torch.empty_like(
                    tensor, device=device, pin_memory=device != home
                )
            if states:
                self._extra = {key: copied(state) for key, state in states.items()}
        except _MEMORY_ERRORS as error:
            self._memory.clear()
            self._extra.clear()
            way_out = (
                'snapshot="pinned" keeps it in host memory, or take a smaller model'
                if self._placement == "device"
                else "it needs more host memory or a smaller model"
            )
            raise RuntimeError(
                f"the copy of the training state takes {needed:,} bytes, which do not fit: {error}."
                f" AutoLRS rolls back to it after every trial; {way_out}"
            ) from error

    def _device(self, home: torch.device) -> torch.device:
        """Returns where the copy is of a tensor that training has on `home`."""
        is_moved = self._placement == "pinned" and home.type == "cuda"
        return torch.device("cpu") if is_moved else home


def available_host_memory() -> int:
    """Returns how many bytes the host can still give, as far as the system says."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**63 - 1


def _kind(name: str) -> str:
    return name.partition(" ")[0]


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second.to(first.device))


def _devices(tensors: dict[str, Tensor]) -> dict[str, torch.device]:
    return {name: tensor.device for name, tensor in tensors.items()}


def _check_overlaps(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if any(
            n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, is expanded: "
                "its elements share memory and cannot be rolled back; make it with .clone() or "
                ".contiguous()"
            )


def _check_fit(saved: dict[str, Tensor], live: dict[str, Tensor], kinds: Sequence[str]) -> None:
    """Raises ValueError if saved tensors of these kinds are not those of the model.

    The model may have made buffers since that were not there when the saved state was copied.
    """
    both = sorted(name for name in saved.keys() & live.keys() if _kind(name) in kinds)
    differences = {
        "only in the copy": sorted(n for n in saved.keys() - live.keys() if _kind(n) in kinds),
        "only here": sorted(n for n in live.keys() - saved.keys() if _kind(n) == "parameter"),
        "of another shape": [name for name in both if saved[name].shape != live[name].shape],
    }
    found = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in differences.items()
        if names
    ]
    if found:
        raise ValueError(
            f"the copy of the training state belongs to another model: {', '.join(found)}. Give "
            "AutoLRS the model and the extra_state that the copy was made of, in the same modules "
            "(one around it may put 'module.' before the names; DistributedDataParallel and "
            "torch.compile do not count), and add no parameters in the middle of a trial"
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies into the first of each pair from the second; torch is fast for tensors of one kind."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        kind = (target.dtype, source.dtype, target.device, source.device)
        targets, sources = groups.setdefault(kind, ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources, non_blocking=True)
