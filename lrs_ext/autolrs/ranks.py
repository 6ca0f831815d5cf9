"""The processes that train one model together: what makes them decide alike."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work


class Ranks:
    """A process group, or this process alone, for which nothing is exchanged.

    On a GPU none of the exchanges makes the host wait, but those whose names say `host`.

    Args:
        group: None takes all processes that ``torch.distributed`` was initialised with, if it was.

    Raises:
        ValueError: this process is not in the group.

    Attributes:
        size: processes in the group.
        rank: of this process in the group, from 0.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group
        self._pending: Work | None = None
        self.size, self.rank = 1, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.size = torch.distributed.get_world_size(group)
            self.rank = torch.distributed.get_rank(group)
            if self.rank < 0:
                raise ValueError(
                    "process_group does not have this process: pass a group of the ranks that "
                    "train this model"
                )

    def sum_(self, tensor: Tensor) -> None:
        """Adds up a contiguous tensor over the ranks, in place; `wait` before it is read."""
        if self.size > 1:
            self.wait()
            self._pending = torch.distributed.all_reduce(tensor, group=self._group, async_op=True)

    def wait(self) -> None:
        """Lets what follows, on a GPU the stream, come after the last `sum_`."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def any(self, flag: Tensor) -> Tensor:
        """Returns whether `flag`, bool, 0-d, is true on any rank, without a sync."""
        if self.size == 1:
            return flag
        count = flag.to(torch.int32)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group=self._group)
        return count > 0

    def agree(self, value: Tensor) -> Tensor:
        """Returns what the first rank has, bit for bit: others may have rounded differently."""
        if self.size > 1:
            value = value.clone()
            torch.distributed.broadcast(value, group=self._group, group_src=0)
        return value

    def host_share(self, value: Any, sources: Sequence[int], device: torch.device) -> list[Any]:
        """Returns what each of the `sources` has passed as `value`; the host waits.

        Args:
            device: where tensors of a GPU of the source's go.
        """
        if self.size == 1:
            return [value for _ in sources]
        shared = []
        for source in sources:
            # Through host memory: a pickled tensor of a GPU would go to that very GPU.
            parts: list[Any] = [_packed(value) if source == self.rank else None]
            torch.distributed.broadcast_object_list(parts, group=self._group, group_src=source)
            shared.append(_unpacked(parts[0], device))
        return shared

    def host_check_alike(self, plan: dict[str, Any]) -> None:
        """Raises RuntimeError on all ranks if `plan` is not the same on all of them."""
        if self.size == 1:
            return
        texts: list[Any] = [None] * self.size
        text = json.dumps(plan, sort_keys=True, default=str)
        torch.distributed.all_gather_object(texts, text, group=self._group)
        others = [rank for rank, other in enumerate(texts) if other != texts[0]]
        if others:
            first, other = json.loads(texts[0]), json.loads(texts[others[0]])
            names = [name for name in plan if first[name] != other.get(name)]
            raise RuntimeError(
                f"AutoLRS must be made with equal arguments on all ranks; on rank {others[0]} "
                + ", ".join(f"{n} is {other.get(n)}, on rank 0 {first[n]}" for n in names)
                + (f" (ranks {others} differ from rank 0)" if len(others) > 1 else "")
            )


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(data: bytes, device: torch.device) -> Any:
    def placed(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.to(device=device)

    # What it may hold is what the ranks, which run the same program, have given each other.
    return torch.load(io.BytesIO(data), map_location=placed, weights_only=False)
