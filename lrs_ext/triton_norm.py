"""The norm of all gradients, in one launch of the Triton backend."""

import torch
import triton.language as tl
from torch import Tensor

from lrs_ext.triton_kernels import (
    BFLOAT16,
    DTYPE,
    FLOAT32,
    NUM_WARPS,
    NUMEL,
    TENSOR_COLUMNS,
    THREADS,
    jit_kernel,
)
from lrs_ext.triton_storage import jit


@jit
def squares(
    gradient: tl.tensor, begin: tl.tensor, end: tl.tensor, dtype: tl.constexpr
) -> tl.tensor:
    """Returns the sum of squares of the elements from `begin` to `end`, float64."""
    PIECE: tl.constexpr = THREADS * 8
    grads = gradient.to(tl.pointer_type(dtype))
    sums = tl.zeros((PIECE,), tl.float64)
    start = begin
    while start < end:
        lanes = tl.arange(0, PIECE)
        mask = lanes < (end - start).to(tl.int32)
        values = tl.load(grads + start + lanes, mask, other=0.0).to(tl.float64)
        sums += values * values
        start += PIECE
    return tl.sum(sums, 0)


@jit
def chunk_squares(
    row: tl.tensor, gradient: tl.tensor, begin: tl.tensor, end: tl.tensor
) -> tl.tensor:
    code = tl.load(row + DTYPE)
    sum = tl.full((), 0.0, tl.float64)
    if code == FLOAT32:
        sum = squares(gradient, begin, end, tl.float32)
    elif code == BFLOAT16:
        sum = squares(gradient, begin, end, tl.bfloat16)
    else:
        sum = squares(gradient, begin, end, tl.float16)
    return sum


@jit_kernel
def norm_kernel(
    tensors: tl.tensor,
    chunks: tl.tensor,
    gradients: tl.tensor,
    sums: tl.tensor,
    norm: tl.tensor,
    ticket: tl.tensor,
    num_chunks: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program < num_chunks:
        tensor = tl.load(chunks + 2 * program)
        gradient = tl.load(gradients + tensor)
        sum = tl.full((), 0.0, tl.float64)
        if gradient != 0:
            row = tensors + tensor * TENSOR_COLUMNS
            begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
            end = tl.minimum(begin + CHUNK, tl.load(row + NUMEL))
            sum = chunk_squares(row, gradient, begin, end)
        tl.store(sums + program, sum)
    tl.debug_barrier()  # the sum is written before the ticket is drawn
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        total = tl.zeros((THREADS,), tl.float64)
        first = 0
        while first < num_chunks:
            positions = first + tl.arange(0, THREADS)
            total += tl.load(sums + positions, positions < num_chunks, other=0.0)
            first += THREADS
        tl.store(norm, tl.sqrt(tl.sum(total, 0)).to(tl.float32))
        tl.store(ticket, 0)


def grad_norm(
    *,
    tensors: Tensor,
    chunks: Tensor,
    gradients: Tensor,
    sums: Tensor,
    norm: Tensor,
    ticket: Tensor,
    chunk_elements: int,
) -> None:
    """Writes the 2-norm of all gradients to `norm`, float32, 0-d; the tables are those of `step`.

    Args:
        sums: scratch, float64, one for each chunk.
    """
    with torch.accelerator.device_index(tensors.device.index):
        norm_kernel[(max(len(chunks), 1),)](
            tensors,
            chunks,
            gradients,
            sums,
            norm,
            ticket,
            len(chunks),
            chunk_elements,
            num_warps=NUM_WARPS,
        )
