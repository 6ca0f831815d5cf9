"""What must hold while a step is captured into a CUDA graph, so that replays do as it does."""

from __future__ import annotations

from torch import Tensor

from lrs_ext.table_set import TableSet


def check_gradients(params: list[Tensor]) -> None:
    """Raises RuntimeError if replays of the capture would leave parameters out."""
    missing = [param for param in params if param.requires_grad and param.grad is None]
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(params)} parameters have no gradient in the capture, "
            "whose replays would leave them out: capture the backward pass that makes all "
            "gradients, or freeze these parameters with requires_grad_(False)"
        )


def check_tables(tables: TableSet) -> None:
    """Raises RuntimeError if the step has no tables yet, or they are not for one graph."""
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
    if only.table is None or only.copies:
        raise RuntimeError(
            "a captured step makes no tables or states: make a step before the capture, and "
            "parameters with gaps between their elements contiguous"
        )


def check_synced(index: int, is_synced: bool) -> None:
    """Raises RuntimeError if the step would write numbers of group `index` to the device."""
    if not is_synced:
        raise RuntimeError(
            f"a number of group {index} has changed since the last step, and each replay "
            "would write it again: call sync_groups() before the capture"
        )
