"""Optimizer states on their way out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrs_ext.layout import same_layout
from lrs_ext.param_devices import read_all
from lrs_ext.shards import is_dtensor, local
from lrs_ext.state_storage import Storage, flattened
from lrs_ext.tensor_checks import step_counter


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


def unwrap_state(param: Any, saved: Any, storage: Storage, names: Sequence[str]) -> Any:
    """Returns the loaded state of one parameter in new tensors, as the kernels need it.

    Args:
        names: see `Storage.loaded`.

    Raises:
        ValueError: an array does not have the shape of its parameter.
    """
    if not isinstance(param, Tensor) or not isinstance(saved, dict):
        return saved
    state, arrays = {}, {}
    for name, value in flattened(_unwrap(saved)).items():
        if name == "step":
            state[name] = step_counter(param, value).clone()
        elif isinstance(value, Tensor):
            arrays[name] = value
        elif value is not None:
            state[name] = value
    return state | storage.loaded(param, arrays, names)


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
                f"{', '.join(missing)}: the checkpoint belongs to another optimizer; without any "
                "of these the parameter starts anew"
            )


def last_step(states: dict[Any, Any]) -> int | None:
    """Returns the largest step count among the parameters' states, or None if they have none."""
    counts = [s["step"] for s in states.values() if isinstance(s, dict) and "step" in s]
    return int(max(read_all(counts))) if counts else None


def replace_states(states: dict[Any, Any], loaded: dict[Any, Any]) -> None:
    """Makes the states of all parameters equal to `loaded`, as `replace_state` does."""
    for param in [param for param in states if param not in loaded]:
        del states[param]
    for param, state in loaded.items():
        if isinstance(state, dict):
            replace_state(states[param], state)
        else:
            states[param] = state


def replace_state(state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Makes `state` equal to `loaded`; tensors that are alike in both keep their address."""
    for name in [name for name in state if name not in loaded]:
        del state[name]
    for name, value in loaded.items():
        present = state.get(name)
        if isinstance(present, Tensor) and isinstance(value, Tensor) and _are_alike(present, value):
            local(present).copy_(local(value))
        else:
            state[name] = value


def _are_alike(present: Tensor, value: Tensor) -> bool:
    if is_dtensor(present) != is_dtensor(value):
        return False
    present, value = local(present), local(value)
    is_same_kind = (present.dtype, present.device) == (value.dtype, value.device)
    # The codes of a block lie together in memory, where the parameter may have moved since.
    return is_same_kind and same_layout(present, value)


def _wrap(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _wrap(part) for name, part in value.items()}
    return Wrapped(value) if isinstance(value, Tensor) else value


def _unwrap(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unwrap(part) for name, part in value.items()}
    return value.tensor if isinstance(value, Wrapped) else value
