"""What bench_step.py updates: lists of shapes, algorithms and storage types."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from storages import KINDS

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """Parameters to update, and how; the limits hold for CPUs.

    Attributes:
        dtype: of the parameters; of torch's, where `kinds` says what ours are.
        only: who takes part, by name; () is everybody.
        kinds: storage types, each in turn; () is float32 states and rounding to nearest.
        max_norm: the gradients' norm is limited in every step.
        in_plot: whether it is one of the sizes of the plot.
        counts_launches: on a GPU; a profiler takes long to start.
    """

    name: str
    shapes: Shapes
    rounds: int
    dtype: torch.dtype = torch.float32
    algorithm: str = "AdamW"
    kinds: tuple[str, ...] = ()
    max_norm: float | None = None
    only: tuple[str, ...] = ()
    min_ratio: float | None = None
    max_host_seconds: float | None = None
    calls_per_turn: int = 1
    in_plot: bool = False
    counts_launches: bool = False

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def gpt2_shapes() -> Shapes:
    """The 148 parameters of GPT-2 with 124M parameters."""
    width, layers = 768, 12
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ((50257, width), (1024, width), *(norm + attention + norm + mlp) * layers, *norm)


def llama_shapes(scale: int) -> Shapes:
    """The 291 parameters of Llama-3-8B, every width and the vocabulary divided by `scale`."""
    vocabulary, width, keys, inner = (n // scale for n in (128_256, 4096, 1024, 14_336))
    attention = ((width, width), (keys, width), (keys, width), (width, width))
    mlp = ((inner, width), (inner, width), (width, inner))
    layer = (*attention, *mlp, (width,), (width,))
    return ((vocabulary, width), *layer * 32, (width,), (vocabulary, width))


def resnet50_shapes() -> Shapes:
    """The 161 parameters of ResNet-50 for 1,000 classes, 25.6M in all."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            kernels = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                kernels.append((4 * width, inputs, 1, 1))
            for kernel in kernels:
                shapes += [kernel, kernel[:1], kernel[:1]]
            inputs = 4 * width
    return (*shapes, (1000, inputs), (1000,))


def size_cases(sizes: dict[str, int], rounds: int) -> tuple[Case, ...]:
    """One tensor of each size in each dtype, for the plot."""
    return tuple(
        Case(
            f"1 x {name}" + ("" if dtype == torch.float32 else " bf16"),
            ((size,),),
            rounds=rounds,
            dtype=dtype,
            calls_per_turn=max(1, min(5, 2**22 // size)),
            in_plot=True,
        )
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    )


BIG = ((2**26,),)
CASES = (
    Case("1 x 64M", BIG, rounds=15, min_ratio=1.0, in_plot=True, counts_launches=True),
    Case("1 x 64M bf16", BIG, rounds=10, dtype=torch.bfloat16, in_plot=True),
    *size_cases({"16K": 2**14, "256K": 2**18, "1M": 2**20, "8M": 2**23}, rounds=20),
    Case(
        "300 x 10,000",
        ((10_000,),) * 300,
        calls_per_turn=5,
        rounds=100,
        min_ratio=3.0,
        counts_launches=True,
    ),
    Case(
        "300 x 16",
        ((16,),) * 300,
        rounds=30,
        min_ratio=10.0,
        max_host_seconds=50e-6,
        calls_per_turn=20,
    ),
    Case("5,000 x 1,000", ((1_000,),) * 5_000, rounds=20, counts_launches=True),
    Case("GPT-2 124M", gpt2_shapes(), rounds=10, counts_launches=True),
    Case("ResNet-50, SGD", resnet50_shapes(), rounds=20, algorithm="SGD"),
    Case("storage, 1 x 64M", BIG, rounds=10, kinds=tuple(KINDS)),
    Case("1 x 64M, SGD", BIG, rounds=10, algorithm="SGD"),
    Case("1 x 64M, Lion", BIG, rounds=8, algorithm="Lion"),
    # torch's norm of one tensor of 64M on a CPU is off by .6 %, and with it LAMB in plain torch.
    Case("64 x 1M, LAMB", ((2**20,),) * 64, rounds=5, algorithm="LAMB", counts_launches=True),
    Case("1 x 64M, clipped", BIG, rounds=10, max_norm=1.0, min_ratio=1.0),
    Case("300 x 10,000, clipped", ((10_000,),) * 300, rounds=50, max_norm=1.0, min_ratio=1.0),
)
CPU_CASES = (Case("Llama-3-8B, widths / 8", llama_shapes(8), rounds=10),)
GPU_CASES = (
    Case("1 x 256M", ((2**28,),), rounds=15, in_plot=True),
    Case("1 x 1G", ((2**30,),), rounds=11, in_plot=True, only=("torch fused", "lrs_ext cuda")),
    Case("Llama-3-8B, widths / 4", llama_shapes(4), rounds=15),
    Case("GPT-2 124M bf16", gpt2_shapes(), rounds=50, dtype=torch.bfloat16),
)
QUICK_CASES = (
    Case("1 x 1M", ((2**20,),), rounds=5, in_plot=True, counts_launches=True),
    Case("30 x 1,000", ((1_000,),) * 30, rounds=5),
    Case("30 x 16", ((16,),) * 30, rounds=5),
    Case("storage, 1 x 1M", ((2**20,),), rounds=5, kinds=tuple(KINDS)),
    Case("30 x 1,000, SGD", ((1_000,),) * 30, rounds=5, algorithm="SGD"),
    Case("30 x 1,000, Lion", ((1_000,),) * 30, rounds=5, algorithm="Lion"),
    Case("30 x 1,000, LAMB", ((1_000,),) * 30, rounds=5, algorithm="LAMB"),
    Case("30 x 1,000, clipped", ((1_000,),) * 30, rounds=5, max_norm=1.0),
)


def cases(device_type: str, quick: bool) -> tuple[Case, ...]:
    if quick:
        return QUICK_CASES
    return CASES + (GPU_CASES if device_type == "cuda" else CPU_CASES)
