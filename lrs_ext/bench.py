"""``python -m lrs_ext bench``: one step here, against the fused optimizer of torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import lrs_ext
from lrs_ext import timing

OPTIMIZERS = ("AdamW", "Adam", "SGD")  # of which torch has fused ones
TENSORS = ((300, 16), (300, 10_000), (5_000, 1_000), (1, 2**24))  # how many of how many elements
LR, TOTAL_STEPS, WARMUP = 1e-3, 100_000, 3


@dataclass(frozen=True)
class Row:
    """What a step takes; on a GPU, how long that is busy with it.

    Attributes:
        tensors, elements: how many parameters of how many float32 elements.
        backend: of ours.
        ours, theirs: seconds.
        host_ours, host_theirs: seconds until a step returns.
    """

    tensors: int
    elements: int
    backend: str
    ours: timing.Spread
    theirs: timing.Spread
    host_ours: timing.Spread
    host_theirs: timing.Spread


def measure(optimizer: str, device: torch.device, tensors: int, elements: int, rounds: int) -> Row:
    """Measures steps in turns, with their learning-rate schedules: REX, in torch a LambdaLR.

    Args:
        optimizer: one of `OPTIMIZERS`; SGD has momentum.
    """
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    schedule = lrs_ext.rex(LR, TOTAL_STEPS)
    ours = getattr(lrs_ext, optimizer)(_params(tensors, elements, device), lr=schedule, **options)
    theirs = getattr(torch.optim, optimizer)(
        _params(tensors, elements, device), lr=LR, fused=True, **options
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: schedule(step) / LR)

    def step_theirs() -> None:
        theirs.step()
        scheduler.step()

    calls: dict[str, timing.Call] = {"ours": ours.step, "theirs": step_theirs}
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    per_turn = min(20, max(1, 2_000_000 // (tensors * elements)))  # or short ones are cold
    host = timing.host_seconds(calls, rounds, device, calls_per_turn=per_turn)
    found = timing.device_seconds(calls, rounds, device, host) if device.type == "cuda" else host
    return Row(
        tensors,
        elements,
        ours.backend,
        *(found[name] for name in calls),
        *(host[name] for name in calls),
    )


def _params(tensors: int, elements: int, device: torch.device) -> list[Tensor]:
    params = [torch.randn(elements, device=device).requires_grad_() for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def table(rows: list[Row]) -> str:
    """Returns the medians as text."""
    lines = [f"{'tensors x elements':<20} {'lrs_ext':>12} {'torch fused':>12} {'faster':>8}"]
    for row in rows:
        ours, theirs = row.ours.median, row.theirs.median
        name = f"{row.tensors:,} x {row.elements:,}"
        lines.append(f"{name:<20} {_time(ours)} {_time(theirs)} {theirs / ours:>7.2f}x")
        if row.host_ours is not row.ours:
            ours, theirs = row.host_ours.median, row.host_theirs.median
            lines.append(f"{'  host':<20} {_time(ours)} {_time(theirs)} {theirs / ours:>7.2f}x")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:9.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:9.1f} us"
