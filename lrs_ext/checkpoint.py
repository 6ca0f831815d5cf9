"""Optimizer states on their way out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lrs_ext import ops
from lrs_ext.layout import same_layout
from lrs_ext.param_devices import read_all
from lrs_ext.shards import PLAIN, is_dtensor, local
from lrs_ext.state_storage import Storage, flattened
from lrs_ext.tensor_checks import step_counter

_FOREIGN = "the checkpoint belongs to another optimizer"


class Wrapped:
    """Hides a tensor from `torch.optim.Optimizer.load_state_dict`.

    That would round float32 states to the dtype of their parameters; what is no tensor, it passes.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def wrap_tensors(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Wraps the tensors of every parameter's state; a pre-hook of `load_state_dict`."""
    wrapped = {
        index: {name: _wrap(value) for name, value in state.items()}
        if isinstance(state, dict)
        else state
        for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": wrapped}


def unwrap_states(
    saved_states: Mapping[Any, Any],
    present: Mapping[Any, Any],
    storage: Storage,
    names: Sequence[str],
) -> dict[Any, Any]:
    """Returns the loaded state of each parameter, as the kernels need it.

    It is in new tensors, but for arrays that `replace_states` can copy into those that are there:
    with them, there would be two copies of the states beside the checkpoint.

    Args:
        present: the states that are going to be replaced.
        names: see `Storage.loaded`.

    Raises:
        ValueError: an array does not have the shape of its parameter, or is none; or a step is no
            number.
    """
    states = [state for state in present.values() if isinstance(state, dict)]
    parts = [local(v) for state in states for v in state.values() if isinstance(v, Tensor)]
    written = {ops.memory_of(part) for part in parts if _is_plain(part)}

    def unwrapped(param: Any, saved: Any) -> Any:
        if not isinstance(param, Tensor) or not isinstance(saved, dict):
            return saved
        own, state, arrays = present.get(param, {}), {}, {}
        for name, value in flattened(_unwrap(saved)).items():
            if name == "step":
                state[name] = step_counter(param, _checked_count(value)).clone()
            elif isinstance(value, Tensor):
                arrays[name] = value
            elif value is not None and name in names:
                raise ValueError(f"the loaded {name} is no tensor: {_FOREIGN}")
            elif value is not None:
                state[name] = value
        kept = [n for n, v in arrays.items() if _is_safe_source(param, own.get(n), v, written)]
        return state | storage.loaded(param, arrays, names, kept)

    return {param: unwrapped(param, saved) for param, saved in saved_states.items()}


def _checked_count(value: Any) -> Any:
    is_number = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    if not is_number:
        raise ValueError(f"the loaded step is no number: {_FOREIGN}")
    return value


def _is_safe_source(param: Tensor, present: Any, value: Tensor, written: set[int]) -> bool:
    """Returns whether `value` can be copied into `present` after others have been copied."""
    if not (isinstance(present, Tensor) and _are_alike(param, present, value)):
        return False
    present, value = local(present), local(value)
    if not _is_plain(value) or value.is_meta:
        return False
    is_itself = present.device == value.device and present.is_set_to(value)
    return is_itself or (ops.has_memory(value) and ops.memory_of(value) not in written)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.layout == torch.strided


def check_complete(states: Mapping[Any, Any], needed: Sequence[str]) -> None:
    """Raises ValueError if a loaded state has some of what an update needs, but not all.

    What is missing would begin at 0 beside what has been counted and averaged for long.
    """
    for param, state in states.items():
        is_of_param = isinstance(param, Tensor) and isinstance(state, dict)
        found = [name for name in needed if is_of_param and name in state]
        if found and len(found) < len(needed):
            missing = [name for name in needed if name not in found]
            raise ValueError(
                f"the loaded state of a parameter has {', '.join(found)}, but not "
                f"{', '.join(missing)}: {_FOREIGN}; without any of these the parameter starts anew"
            )


def last_step(states: dict[Any, Any]) -> int | None:
    """Returns the largest step count among the parameters' states, or None if they have none."""
    counts = [s["step"] for s in states.values() if isinstance(s, dict) and "step" in s]
    return int(max(read_all(counts))) if counts else None


def has_content(state: Any) -> bool:
    """Returns whether any array of a parameter's state that is whole here is not all 0; waits."""
    arrays = [v for v in state.values() if isinstance(v, Tensor)] if isinstance(state, dict) else []
    return any(bool(array.any()) for array in arrays if not is_dtensor(array))


def replace_states(states: dict[Any, Any], loaded: dict[Any, Any]) -> None:
    """Makes the states of all parameters equal to `loaded`, as `replace_state` does."""
    for param in [param for param in states if param not in loaded]:
        del states[param]
    for param, state in loaded.items():
        if isinstance(state, dict):
            replace_state(param, states[param], state)
        else:
            states[param] = state


def replace_state(param: Tensor, state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Makes `state` equal to `loaded`; tensors that are alike in both keep their address."""
    for name in [name for name in state if name not in loaded]:
        del state[name]
    for name, value in loaded.items():
        present = state.get(name)
        if (
            isinstance(present, Tensor)
            and isinstance(value, Tensor)
            and _are_alike(param, present, value)
        ):
            local(present).copy_(local(value))
        else:
            state[name] = value


def _are_alike(param: Tensor, present: Tensor, value: Tensor) -> bool:
    """Returns whether a copy of `value` in `present` is as good as one beside `param`."""
    if is_dtensor(present) or is_dtensor(value):
        if not (is_dtensor(present) and is_dtensor(value)):
            return False
        own = (present.device_mesh, present.placements)
        if own != (value.device_mesh, value.placements):
            return False
        present, value = local(present), local(value)
    is_at_home = present.device == param.device and present.dtype == value.dtype
    is_strided = present.layout == value.layout == torch.strided
    # The codes of a block lie together in memory, where the parameter may have moved since.
    return is_at_home and is_strided and same_layout(present, value)


def _wrap(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _wrap(part) for name, part in value.items()}
    return Wrapped(value) if isinstance(value, Tensor) else value


def _unwrap(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unwrap(part) for name, part in value.items()}
    return value.tensor if isinstance(value, Wrapped) else value
