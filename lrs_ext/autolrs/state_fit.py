"""Whether a copy of the training state is one of what is trained here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lrs_ext.autolrs.live_state import kind


def check_fit(saved: dict[str, Tensor], live: dict[str, Tensor], kinds: Sequence[str]) -> None:
    """Raises ValueError if saved tensors of these kinds are not those of the model.

    The model may have made buffers since that were not there when the saved state was copied.
    """
    both = sorted(name for name in saved.keys() & live.keys() if kind(name) in kinds)
    differences = {
        "only in the copy": sorted(n for n in saved.keys() - live.keys() if kind(n) in kinds),
        "only here": sorted(n for n in live.keys() - saved.keys() if kind(n) == "parameter"),
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


def check_complete(lost: Sequence[str], alien: Sequence[str]) -> None:
    """Raises ValueError if a checkpoint lacks some of what was copied.

    Args:
        lost: names of tensors that it does not have.
        alien: what of it belongs to another rank.
    """
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
