"""A few steps of every optimizer and storage type on small odd shapes, to run under a sanitizer.

compute-sanitizer --tool memcheck python benchmarks/sanitizer_steps.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from storages import KINDS
from torch import Tensor

import lrs_ext
from lrs_ext import ops

Shapes = tuple[tuple[int, ...], ...]

STEPS = 3
# No element, one, less than 16 bytes, odd, one more than a block's share, several chunks.
SHAPES: Shapes = ((0,), (), (1,), (3,), (7, 11), (257,), (33, 65), (2049,), (16_411,))
# So long that a block goes through its chunk in several rounds.
LARGE_SHAPES: Shapes = ((1_050_003,),)
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": ({}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": ({}, {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW": ({}, {"amsgrad": True, "maximize": True}),
    "Lion": ({}, {"weight_decay": 0.1, "maximize": True}),
    "LAMB": ({}, {"weight_decay": 0.0, "always_adapt": False, "maximize": True}),
}
STORED: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "AdamW": {}, "Lion": {}}


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Every public optimizer by name."""
    public = {name: getattr(lrs_ext, name) for name in lrs_ext.__all__}
    return {
        name: value
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }


def parameters(dtype: torch.dtype, device: str, shapes: Shapes = SHAPES) -> list[Tensor]:
    """Tensors at aligned addresses and the same shapes one element further, so unaligned."""
    aligned = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    shifted = [
        torch.randn(tensor.numel() + 1, device=device).to(dtype)[1:].view(tensor.shape)
        for tensor in aligned
    ]
    return [tensor.requires_grad_() for tensor in aligned + shifted]


def run(
    optimizer: type[torch.optim.Optimizer],
    options: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    shapes: Shapes = SHAPES,
) -> None:
    params = parameters(dtype, "cpu" if backend == "cpu" else "cuda", shapes)
    half = len(params) // 2
    groups = [
        {"params": params[:half], "lr": lrs_ext.rex(0.01, total_steps=STEPS, warmup_steps=1)},
        {"params": params[half:], "lr": lrs_ext.cosine(0.01, total_steps=STEPS + 2)},
    ]
    opt = optimizer(groups, backend=backend, **options)
    for step in range(STEPS):
        for index, param in enumerate(params):
            # Now and then a parameter has no gradient: its row of the table is passed over.
            missing = step == 1 and index % 3 == 0
            param.grad = None if missing else torch.randn_like(param)
        opt.step()
    if not all(bool(param.isfinite().all()) for param in params):
        raise RuntimeError(f"{optimizer.__name__} {options} {dtype}: a parameter is not finite")


def run_scaled(backend: str, **options: Any) -> None:
    """Clipped steps with a loss scale, of which one overflows."""
    params = parameters(torch.bfloat16, "cpu" if backend == "cpu" else "cuda")
    device = params[0].device
    opt = lrs_ext.AdamW(params, lr=lrs_ext.rex(0.01, STEPS), backend=backend, **options)
    for step in range(STEPS):
        for param in params:
            param.grad = torch.randn_like(param)
        opt.grad_scale = torch.full((), 256.0, device=device)
        opt.found_inf = torch.full((), float(step == 1), device=device)
        lrs_ext.clip_grad_norm_(opt, 1.0)
        opt.step()


def run_released(backend: str) -> None:
    """Steps in the backward pass."""
    params = parameters(torch.bfloat16, "cpu" if backend == "cpu" else "cuda")
    opt = lrs_ext.AdamW(params, lr=lrs_ext.rex(0.01, STEPS), backend=backend)
    opt.step_in_backward()
    for _ in range(STEPS):
        sum(param.square().sum() for param in params).backward()
        opt.step()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "triton", "cpu"), default="cuda")
    backend = parser.parse_args(argv).backend
    torch.manual_seed(0)
    for name, optimizer in optimizers().items():
        for options in VARIANTS.get(name, ({},)):
            for dtype in ops.DTYPES:
                run(optimizer, options, dtype, backend)
        print(f"{name}: done", flush=True)
    for name, options in STORED.items():
        for kind in KINDS.values():
            run(optimizers()[name], options | kind.options, kind.param_dtype, backend)
        print(f"{name} with every storage type: done", flush=True)
    for kind in KINDS.values():
        run(lrs_ext.AdamW, kind.options, kind.param_dtype, backend, LARGE_SHAPES)
    print("large tensors with every storage type: done", flush=True)
    run_scaled(backend)
    run_scaled(backend, state_dtype=torch.uint8, master_weights=True)
    run_released(backend)
    print("scaled, clipped and released gradients: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
