"""A copy of the training state to roll back to, in place and without waiting for the device."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrs_ext.autolrs.random_state import random_state, set_random_state
from lrs_ext.scheduled_optimizer import ScheduledOptimizer

PLACEMENTS = ("device", "pinned")
_SCHEDULE_STEP = "schedule step"
_MEMORY_ERRORS = (MemoryError, RuntimeError)  # torch.OutOfMemoryError is the latter


class Snapshot:
    """Parameters, buffers, optimizer and extra state, and all random generators.

    All memory is taken at the start. Tensors are restored into the storage that they have, so that
    captured graphs stay valid. Reading a GradScaler or a module in `extra_state` never waits; other
    objects are asked for their ``state_dict``.

    Args:
        model: parameters and buffers.
        optimizer: its state, and parameters that the model does not have.
        extra_state: objects with ``state_dict`` and ``load_state_dict``.
        placement: "device", beside each tensor, or "pinned", in page-locked host memory.

    Raises:
        ValueError: there is no such placement.
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
        self._model, self._optimizer, self._placement = model, optimizer, placement
        self._extra_state = dict(enumerate(extra_state))
        self._memory: dict[str, Tensor] = {}
        self._captured: set[str] = set()
        self._numbers: dict[str, Any] = {}  # entries of the optimizer's state that are no tensors
        self._extra: dict[int, dict[str, Any]] = {}
        self._random: dict[str, Any] = {}
        self._reserve(self._live_tensors() | _state_to_come(optimizer))

    @property
    def nbytes(self) -> int:
        """Memory that the copies of parameters, buffers and optimizer state take."""
        return _bytes(self._memory)

    def leave(self, extra: Any) -> None:
        """Keeps an object of `extra_state` out of roll-backs: somebody else looks after it."""
        self._extra_state = {i: kept for i, kept in self._extra_state.items() if kept is not extra}

    @torch.no_grad()
    def capture(self) -> None:
        """Copies the present state."""
        live = self._live_tensors()
        self._reserve(live)
        _copy_all([self._memory[name] for name in live], list(live.values()))
        self._captured = set(live)
        self._numbers = {
            name: copy.deepcopy(value) for name, value in _state_entries(self._optimizer, False)
        }
        self._extra = {i: _copied(_state_of(extra)) for i, extra in self._extra_state.items()}
        self._random = random_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back the state of the last `capture`; state that is younger goes back to its start.

        That is zero in an optimizer of `lrs_ext`, whose captured graphs keep its addresses, and
        nothing at all in one of torch.
        """
        live = self._live_tensors()
        known = [name for name in live if name in self._captured]
        _copy_all([live[name] for name in known], [self._memory[name] for name in known])
        for name in live.keys() - self._captured:
            if isinstance(self._optimizer, ScheduledOptimizer):
                live[name].zero_()
        if not isinstance(self._optimizer, ScheduledOptimizer):
            self._restore_torch_state(live)
        for index, extra in self._extra_state.items():
            _set_state(extra, _copied(self._extra[index]))
        set_random_state(self._random)

    @torch.no_grad()
    def restore_where(self, bad: Tensor) -> None:
        """Puts back tensors where `bad`, bool, 0-d, is true; schedules and random numbers go on."""
        for name, tensor in self._live_tensors().items():
            if name == _SCHEDULE_STEP:
                continue
            before = self._memory[name] if name in self._captured else torch.zeros_like(tensor)
            before = before.to(tensor.device, non_blocking=True)
            tensor.copy_(torch.where(bad.to(tensor.device), before, tensor))
        for index, extra in self._extra_state.items():
            _restore_tensors_where(bad, _state_of(extra), self._extra[index])

    def state_dict(self) -> dict[str, Any]:
        """Returns the copies; waits for the device if they are in host memory."""
        if any(tensor.is_pinned() for tensor in self._memory.values()):
            torch.cuda.synchronize()
        return {
            "tensors": {name: self._memory[name].clone() for name in sorted(self._captured)},
            "numbers": copy.deepcopy(self._numbers),
            "extra": _copied(self._extra),
            "random": self._random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reserve(state["tensors"])
        for name, tensor in state["tensors"].items():
            self._memory[name].copy_(tensor)
        self._captured = set(state["tensors"])
        self._numbers = copy.deepcopy(state["numbers"])
        self._extra = _copied(state["extra"])
        self._random = state["random"]

    def _live_tensors(self) -> dict[str, Tensor]:
        """Returns everything that is copied, by a name that is the same in every process."""
        tensors: dict[str, Tensor] = {}
        tensors.update((f"parameter {name}", p) for name, p in self._model.named_parameters())
        tensors.update((f"buffer {name}", b) for name, b in self._model.named_buffers())
        own = set(tensors.values())
        for index, param in enumerate(_params(self._optimizer)):
            if param not in own:
                tensors[f"optimizer parameter {index}"] = param
        tensors.update(_state_entries(self._optimizer, True))
        if isinstance(self._optimizer, ScheduledOptimizer):
            tensors[_SCHEDULE_STEP] = self._optimizer.schedule_buffer.step
            for index, param in enumerate(_params(self._optimizer)):
                if param in self._optimizer.step_counters:
                    tensors[f"counter {index}"] = self._optimizer.step_counters[param]
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def _restore_torch_state(self, live: dict[str, Tensor]) -> None:
        for index, param in enumerate(_params(self._optimizer)):
            state = self._optimizer.state.get(param, {})
            for key in list(state):
                name = f"state {index} {key}"
                if name not in self._captured and name not in self._numbers:
                    del state[key]
                elif name in self._numbers:
                    state[key] = copy.deepcopy(self._numbers[name])
            if not state:
                self._optimizer.state.pop(param, None)

    def _reserve(self, tensors: dict[str, Tensor]) -> None:
        """Takes the memory for copies that do not have any yet."""
        missing = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in self._memory or not _is_like(self._memory[name], tensor)
        }
        if not missing:
            return
        needed = _bytes(missing)
        try:
            on_host = {
                name: tensor
                for name, tensor in missing.items()
                if self._placement == "pinned" or tensor.device.type in ("cpu", "meta")
            }
            if _bytes(on_host) > (available := available_host_memory()):
                raise MemoryError(f"{available:,} bytes of host memory are available")
            for name, tensor in missing.items():
                self._memory[name] = self._empty_like(tensor)
        except _MEMORY_ERRORS as error:
            self._memory.clear()
            way_out = (
                'snapshot="pinned" keeps it in host memory, or take a smaller model'
                if self._placement == "device"
                else "it needs more host memory or a smaller model"
            )
            raise RuntimeError(
                f"the copy of the training state takes {needed:,} bytes, which do not fit: {error}."
                f" AutoLRS rolls back to it after every trial; {way_out}"
            ) from error

    def _empty_like(self, tensor: Tensor) -> Tensor:
        device = _params(self._optimizer)[0].device if tensor.is_meta else tensor.device
        if self._placement == "pinned" and device.type == "cuda":
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
        return torch.empty_like(tensor, device=device)


def available_host_memory() -> int:
    """Returns how many bytes the host can still give, as far as the system says."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**63 - 1


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _state_entries(
    optimizer: torch.optim.Optimizer, are_tensors: bool
) -> Iterator[tuple[str, Any]]:
    """Yields the entries of the optimizer's state: its tensors, or all that is none."""
    for index, param in enumerate(_params(optimizer)):
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor) == are_tensors:
                yield f"state {index} {key}", value


def _state_to_come(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns, on the meta device, the state that the optimizer will have after its first update.

    A twin of it makes a step with parameters of the same shapes that have no memory. Where that
    does not work, nothing is returned, with a warning.
    """
    if isinstance(optimizer, ScheduledOptimizer):
        return {
            f"state {index} {name}": torch.empty_like(param, dtype=torch.float32, device="meta")
            for index, (param, names) in enumerate(optimizer.state_to_come())
            for name in names
        }
    twin = copy.copy(optimizer)
    twin.state = type(optimizer.state)(dict)
    twin.param_groups = []
    plain = {"lr": 0.0, "foreach": False, "fused": False, "capturable": False}
    for group in optimizer.param_groups:
        params = [torch.empty_like(param, device="meta") for param in group["params"]]
        for param in params:
            param.grad = torch.empty_like(param)
        overrides = {name: value for name, value in plain.items() if name in group}
        twin.param_groups.append({**group, **overrides, "params": params})
    try:
        with torch.no_grad():
            type(optimizer).step.__wrapped__(twin)  # type: ignore[attr-defined]  # without hooks
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        warnings.warn(
            f"what {type(optimizer).__name__} will keep for each parameter cannot be foretold "
            f"({error}): the copy of it takes memory only when it is there",
            stacklevel=4,
        )
    return dict(_state_entries(twin, True))


def _is_like(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=True)


def _state_of(extra: Any) -> dict[str, Any]:
    """Returns the state of an object without waiting: a GradScaler's own reads its scale."""
    if isinstance(extra, torch.amp.GradScaler):
        return {"scale": extra._scale, "growth_tracker": extra._growth_tracker}
    state: dict[str, Any] = extra.state_dict()
    return state


def _set_state(extra: Any, state: dict[str, Any]) -> None:
    if isinstance(extra, torch.amp.GradScaler):
        for name, saved in state.items():
            live = getattr(extra, f"_{name}")
            if isinstance(live, Tensor) and isinstance(saved, Tensor):
                live.copy_(saved)
            else:
                setattr(extra, f"_{name}", saved)
        return
    extra.load_state_dict(state)


def _restore_tensors_where(bad: Tensor, live: Any, saved: Any) -> None:
    """Restores, in place, the tensors that two states have at the same place."""
    if isinstance(live, Tensor) and isinstance(saved, Tensor) and _is_like(live, saved):
        live.copy_(torch.where(bad.to(live.device), saved.to(live.device), live))
    elif isinstance(live, dict) and isinstance(saved, dict):
        for name in live.keys() & saved.keys():
            _restore_tensors_where(bad, live[name], saved[name])
    elif isinstance(live, (list, tuple)) and isinstance(saved, (list, tuple)):
        for first, second in zip(live, saved, strict=False):
            _restore_tensors_where(bad, first, second)


def _copied(state: Any) -> Any:
    """Returns a copy of a nested state; tensors are cloned where they are."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return copy.deepcopy(state)
