"""What must hold while a step is captured into a CUDA graph, so that replays do as it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lrs_ext.device_tables import States
    from lrs_ext.table_set import TableSet

CAPTURE_AGAIN = "throw the graph away, call forget_graphs(), make a step and capture again"
_IN_GRAPH = (
    "a parameter or a state is new, or elsewhere in memory, since a CUDA graph captured the step: "
    f"{CAPTURE_AGAIN}"
)
_IN_CAPTURE = (
    "a captured step makes no tables or states, and a parameter or a state is new, or elsewhere in "
    "memory, since the last step: make a step before the capture"
)


def frozen(is_captured: bool, was_captured: bool) -> str | None:
    """Returns why tables and states must stay as they are, None if they need not.

    Args:
        is_captured: whether the present step is.
        was_captured: whether a graph holds an earlier one.
    """
    if is_captured:
        return _IN_CAPTURE
    return _IN_GRAPH if was_captured else None


def check_device(device: torch.device, current: int) -> None:
    """Raises RuntimeError if the capture is on the GPU `current`, and the step on another.

    The stream that `torch.cuda.graph` captures by default is on the device of its first use.
    """
    if device.type == "cuda" and device.index != current:
        raise RuntimeError(
            f"the CUDA graph is captured on cuda:{current}, and a step on {device} would not be in "
            f"it: pass torch.cuda.graph a stream=torch.cuda.Stream('{device}')"
        )


def check_gradients(params: list[Tensor]) -> None:
    """Raises RuntimeError if replays of the capture would leave parameters out."""
    missing = [param for param in params if param.requires_grad and param.grad is None]
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(params)} parameters have no gradient in the capture, "
            "whose replays would leave them out: capture the backward pass that makes all "
            "gradients, or freeze these parameters with requires_grad_(False)"
        )


def check_tables(tables: TableSet, has_singles: bool) -> None:
    """Raises RuntimeError if the step has no tables yet, or they are not for one graph.

    Args:
        has_singles: whether parameters are updated in the backward pass, each from its own table.
    """
    if len(tables.all) > 1:
        raise RuntimeError(
            f"a step on {len(tables.all)} devices cannot be captured, because a CUDA graph belongs "
            "to one device: make one optimizer per device, or step outside of the graph"
        )
    [only] = tables.all
    if only.has_local_parts:
        raise RuntimeError(
            "a step of DTensors cannot be captured, because their gradients are other tensors "
            "after each backward pass: step outside of the graph"
        )
    if (only.table is None and not has_singles) or only.copies:
        raise RuntimeError(
            "a captured step makes no tables or states: make a step before the capture, and "
            "parameters with gaps between their elements contiguous"
        )


def check_state_names(tables: TableSet, names: list[list[str]]) -> None:
    """Raises RuntimeError if a graph reads other states than a step would, `names` by group."""
    if not all(on_device.has_named(names) for on_device in tables.all):
        raise RuntimeError(
            "an option that decides which states a parameter has, as momentum or amsgrad, has "
            f"changed since a CUDA graph captured the step: {CAPTURE_AGAIN}"
        )


def check_loaded_states(states: States, loaded: Mapping[Any, Any], own: Sequence[str]) -> None:
    """Raises RuntimeError if a checkpoint lacks states that a graph updates.

    Args:
        states: of all parameters.
        loaded: what they are to become.
        own: the names of the arrays that the update may read.
    """
    for param, state in states.items():
        lost = [name for name in state if name in own and name not in loaded.get(param, {})]
        if lost:
            raise RuntimeError(
                f"the checkpoint has no {', '.join(lost)} for a parameter, which a captured CUDA "
                f"graph would go on updating: {CAPTURE_AGAIN}"
            )


def check_together(what: str, was_captured: bool, is_captured: bool) -> None:
    """Raises RuntimeError if only one of a step and what came before it is in a graph."""
    if was_captured != is_captured:
        inside, outside = (what, "the step") if was_captured else ("the step", what)
        raise RuntimeError(
            f"{inside} is in the capture of a CUDA graph, {outside} is not, of which replays would "
            "not know: capture both, or neither, and call forget_graphs() after a capture that has "
            "failed"
        )


def check_outside(what: str, device: torch.device) -> None:
    """Raises RuntimeError if what the host follows is captured on `device`."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} cannot be captured into a CUDA graph, as the host would not see its replays: "
            "call it after each replay"
        )


def check_places(is_captured: bool) -> None:
    """Raises RuntimeError in a capture, for groups that are not those of the last step."""
    if is_captured:
        raise RuntimeError(
            "parameter groups have been added, removed or put in another order since the last "
            "step: make a step before the capture"
        )


def check_same_groups(was_captured: bool) -> None:
    """Raises RuntimeError if a graph holds a step of other groups."""
    if was_captured:
        raise RuntimeError(f"other groups are not in the captured graph: {CAPTURE_AGAIN}")


def check_on_host(index: int, hyper: Mapping[str, Any]) -> None:
    """Raises RuntimeError if the step would wait for a number of group `index`, as it is read."""
    names = [n for n, value in hyper.items() if isinstance(value, Tensor) and not value.is_cpu]
    if names:
        raise RuntimeError(
            f"{', '.join(names)} of group {index} would be read from the GPU, for which a capture "
            "cannot wait, and replays would not follow it: make it a float or a schedule"
        )


def check_synced(index: int, is_synced: bool) -> None:
    """Raises RuntimeError if the step would write numbers of group `index` to the device."""
    if not is_synced:
        raise RuntimeError(
            f"a number of group {index} has changed since the last step, and each replay "
            "would write it again: call sync_groups() before the capture"
        )


def check_in_place(index: int, is_copied: bool) -> None:
    """Raises RuntimeError if the step would copy the learning rate of group `index`."""
    if is_copied:
        raise RuntimeError(
            f"the learning rate of group {index} is a tensor that the kernels cannot read where it "
            "is, and each replay would copy it over whatever the host puts there later: make it "
            "float32 on the parameters' device, or a float"
        )
