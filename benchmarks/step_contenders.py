"""Who takes part in bench_step.py: every backend of lrs_ext, torch's own and, if there, others.

A step of the others is `optimizer.step()` and then `scheduler.step()` of a LambdaLR with the same
schedule; ours is `optimizer.step()`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_cases import Case
from storages import KINDS, StorageKind
from torch import Tensor

import lrs_ext
from lrs_ext import timing
from lrs_ext.backends import unavailable_reason

# What torch lacks, as its users have it; the same that the tests compare with.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from plain_optimizers import plain_optimizer

LR = 1e-3
TOTAL_STEPS = 100_000
MOMENTUM = 0.9
TORCH_HAS = ("AdamW", "SGD")
STATES = {"AdamW": 2, "SGD": 1, "Lion": 1, "LAMB": 2}
# LAMB's second pass reads both moments and the parameter, and only then writes it.
SECOND_PASS_READS = {"LAMB": 3}
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
PEERS = {"optimi": "torch-optimi", "flashoptim": "flashoptim"}
# Distance between final parameters over the distance travelled. A step that is left out shows as
# 1 / steps, about 1e-3 or more; rounding of parameters and states as about 1e-2.
EXACT, ROUNDED = 1e-4, 0.1

Start = Callable[[list[Tensor]], timing.Call]


@dataclass(frozen=True)
class Contender:
    """A way to update: `start` takes parameters and returns what makes one step.

    Attributes:
        bytes_moved: the least traffic per parameter: all is read, all but gradients is written.
        bytes_held: of parameter and states, per parameter.
        kind: the storage type, for ours.
        tolerance: of the result's distance from the baseline's.
    """

    name: str
    start: Start
    is_ours: bool
    param_dtype: torch.dtype
    bytes_held: float
    bytes_moved: float
    kind: str | None = None
    tolerance: float | None = None


def contenders(case: Case, device: torch.device) -> list[Contender]:
    """Everybody who can take part; the baseline comes first."""
    found = [*torchs(case, device), *peers(case, device)]
    for backend in BACKENDS[device.type]:
        if backend not in unavailable(device):
            found += ours(case, backend)
    return [one for one in found if not case.only or one.name in case.only]


def ours(case: Case, backend: str) -> list[Contender]:
    plain = "float32" if case.dtype == torch.float32 else "bf16 nearest"
    kinds = [KINDS[name] for name in case.kinds or (plain,)]
    return [
        Contender(
            f"lrs_ext {backend}" + (f", {kind.name}" if case.kinds else ""),
            start_ours(case, backend, kind),
            True,
            kind.param_dtype,
            kind.bytes_held(STATES[case.algorithm]),
            bytes_moved(case, kind),
            kind.name,
            EXACT if kind == KINDS["float32"] else ROUNDED,
        )
        for kind in kinds
    ]


def torchs(case: Case, device: torch.device) -> list[Contender]:
    """What torch has; its states have the dtype of the parameters."""
    if case.algorithm not in TORCH_HAS:
        starts = {"plain torch": start_torch(case)}
    else:
        starts = {"torch fused": start_torch(case, fused=True)}
        if device.type == "cuda" and not case.kinds and case.algorithm == "AdamW":
            starts["torch fused, tensor lr"] = start_torch(case, tensor_lr=True, fused=True)
            starts["torch foreach"] = start_torch(case, foreach=True)
    kind = StorageKind("", case.dtype, case.dtype)
    found = [theirs(name, start, case, kind) for name, start in starts.items()]
    if case.kinds:
        bf16 = StorageKind("", torch.bfloat16, torch.bfloat16)
        found.append(theirs("torch fused, all bf16", starts["torch fused"], case, bf16))
    return found


def peers(case: Case, device: torch.device) -> list[Contender]:
    """Other packages' optimizers, where they are installed and serve the case."""
    found = []
    is_for_optimi = case.algorithm in ("AdamW", "Lion") and not case.kinds
    if is_for_optimi and missing_peer("optimi") is None:
        kind = StorageKind("", case.dtype, case.dtype)
        found.append(theirs("optimi", start_optimi(case), case, kind))
    is_for_flashoptim = bool(case.kinds) and device.type == "cuda"  # elsewhere it is not fused
    if is_for_flashoptim and missing_peer("flashoptim") is None:
        # 8-bit states, and the parameter's low half in 8 bits.
        start = start_flashoptim(case)
        found.append(Contender("flashoptim", start, False, torch.bfloat16, 5.125, 12.25))
    return found


def theirs(name: str, start: Start, case: Case, kind: StorageKind) -> Contender:
    held = kind.bytes_held(STATES[case.algorithm])
    return Contender(name, start, False, kind.param_dtype, held, bytes_moved(case, kind))


def bytes_moved(case: Case, kind: StorageKind) -> float:
    second = SECOND_PASS_READS.get(case.algorithm, 0)
    moments = kind.state_dtype.itemsize * max(second - 1, 0)
    clipping = kind.param_dtype.itemsize if case.max_norm is not None else 0
    second_pass = moments + (kind.param_dtype.itemsize if second else 0)
    return kind.bytes_moved(STATES[case.algorithm]) + second_pass + clipping


def unavailable(device: torch.device) -> dict[str, str]:
    """Returns the backends that cannot take part, with the reason."""
    reasons = {name: unavailable_reason(name, device.type) for name in BACKENDS[device.type]}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def missing_peer(module: str) -> str | None:
    """Returns why another package does not take part, or None if it does."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"not installed: pip install {PEERS[module]}"


def missing_peers() -> dict[str, str]:
    reasons = {package: missing_peer(module) for module, package in PEERS.items()}
    return {package: reason for package, reason in reasons.items() if reason is not None}


def algorithm_options(case: Case) -> dict[str, Any]:
    return {"momentum": MOMENTUM} if case.algorithm == "SGD" else {}


def start_ours(case: Case, backend: str, kind: StorageKind) -> Start:
    def start(params: list[Tensor]) -> timing.Call:
        options = algorithm_options(case)
        if case.algorithm != "LAMB":
            options |= kind.options
        schedule = lrs_ext.rex(LR, total_steps=TOTAL_STEPS)
        make = getattr(lrs_ext, case.algorithm)
        optimizer = make(params, lr=schedule, backend=backend, **options)
        if case.max_norm is None:
            return optimizer.step

        def step() -> None:
            lrs_ext.clip_grad_norm_(optimizer, case.max_norm)
            optimizer.step()

        return step

    return start


def start_torch(case: Case, *, tensor_lr: bool = False, **options: bool) -> Start:
    def start(params: list[Tensor]) -> timing.Call:
        lr = torch.tensor(LR, device=params[0].device) if tensor_lr else LR
        make = plain_optimizer(case.algorithm)
        return with_scheduler(make(params, lr=lr, **algorithm_options(case), **options), case)

    return start


def start_optimi(case: Case) -> Start:
    def start(params: list[Tensor]) -> timing.Call:
        import optimi

        betas = {"AdamW": (0.9, 0.999), "Lion": (0.9, 0.99)}[case.algorithm]
        make = getattr(optimi, case.algorithm)
        # Kahan sums would hold and move one more array.
        return with_scheduler(make(params, lr=LR, betas=betas, kahan_sum=False), case)

    return start


def start_flashoptim(case: Case) -> Start:
    def start(params: list[Tensor]) -> timing.Call:
        import flashoptim

        return with_scheduler(getattr(flashoptim, f"Flash{case.algorithm}")(params, lr=LR), case)

    return start


def with_scheduler(optimizer: torch.optim.Optimizer, case: Case) -> timing.Call:
    """Returns a step with REX as a user of torch writes it, without a call into lrs_ext."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (TOTAL_STEPS - step) / (TOTAL_STEPS - 0.5 * step)
    )
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def step() -> None:
        if case.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, case.max_norm)
        optimizer.step()
        scheduler.step()

    return step
