"""LAMB on the Triton backend: two launches, as csrc/lamb_cuda.cuh and csrc/lamb.h have them.

The first moves the moments and sums squares, the second moves the parameters and commits the step.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lrs_ext.triton_kernels import (
    BFLOAT16,
    DTYPE,
    FLOAT32,
    NUMEL,
    PARAM,
    STATES,
    TENSOR_COLUMNS,
    THREADS,
    commit,
    fold,
    grad_scale,
    jit_kernel,
    launch_options,
    pointers_of,
)
from lrs_ext.triton_storage import jit, with_reciprocal
from lrs_ext.triton_updates import ALWAYS_ADAPT, BETA2, DECOUPLED, EPS, MAXIMIZE, power

BIAS_CORRECTION = DECOUPLED

LANE = tl.constexpr(4)  # 16 bytes of the moments
PIECE = tl.constexpr(THREADS.value * LANE.value)
# Of another shape than PIECE: Triton would choose one layout for both.
UNALIGNED_PIECE = tl.constexpr(THREADS.value * 2)


class LAMB(NamedTuple):
    """Coefficients of an update, folded once for each chunk."""

    lr: tl.tensor
    grad_factor: tl.tensor
    weight_decay: tl.tensor
    beta1: tl.tensor
    beta2: tl.tensor
    grad_share1: tl.tensor
    grad_share2: tl.tensor
    exp_avg_scale: tl.tensor
    denominator_scale: tl.tensor
    eps: tl.tensor
    adapts: tl.tensor


@jit
def lamb_fold(
    group: tl.tensor,
    lr: tl.tensor,
    weight_decay: tl.tensor,
    beta1: tl.tensor,
    step: tl.tensor,
    scale: tl.tensor,
) -> LAMB:
    beta2 = tl.load(group + BETA2)
    corrects = tl.load(group + BIAS_CORRECTION) != 0.0
    bias_correction1 = tl.where(corrects, 1.0 - power(beta1, step), 1.0)
    bias_correction2 = tl.where(corrects, 1.0 - power(beta2, step), 1.0)
    return LAMB(
        lr=lr,
        grad_factor=tl.where(tl.load(group + MAXIMIZE) != 0.0, -scale, scale).to(tl.float32),
        weight_decay=weight_decay.to(tl.float32),
        beta1=beta1.to(tl.float32),
        beta2=beta2.to(tl.float32),
        grad_share1=(1.0 - beta1).to(tl.float32),
        grad_share2=(1.0 - beta2).to(tl.float32),
        exp_avg_scale=(1.0 / bias_correction1).to(tl.float32),
        denominator_scale=(1.0 / tl.sqrt(bias_correction2)).to(tl.float32),
        eps=with_reciprocal(tl.load(group + EPS)),
        adapts=(tl.load(group + ALWAYS_ADAPT) != 0.0) | (weight_decay != 0.0),
    )


@jit
def direction_of(
    update: LAMB, param: tl.tensor, exp_avg: tl.tensor, exp_avg_sq: tl.tensor
) -> tl.tensor:
    # Triton's plain division and square root are approximate.
    denominator = tl.sqrt_rn(exp_avg_sq) * update.denominator_scale + update.eps
    adam = update.exp_avg_scale * (exp_avg * tl.div_rn(1.0, denominator))
    return tl.where(update.weight_decay != 0.0, adam + update.weight_decay * param, adam)


@jit
def step_size_of(update: LAMB, squares: tl.tensor) -> tl.tensor:
    """Returns the learning rate times the trust ratio, from the two sums at `squares`."""
    param = tl.load(squares)
    direction = tl.load(squares + 1)
    has_ratio = update.adapts & (param != 0.0) & (direction != 0.0)
    ratio = tl.sqrt(param) / tl.sqrt(tl.where(has_ratio, direction, 1.0))
    return tl.where(has_ratio, update.lr * ratio, update.lr).to(tl.float32)


@jit
def moments_piece(
    update: LAMB, arrays: tl.tuple, start: tl.tensor, end: tl.tensor, SIZE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Moves the moments of SIZE elements; returns the squares of parameters and directions."""
    WIDTH: tl.constexpr = LANE if SIZE == PIECE else 1
    lanes = tl.arange(0, SIZE)
    pointers = [pointers_of(array, start, lanes, WIDTH) for array in arrays]
    mask = None if SIZE == PIECE else lanes < (end - start).to(tl.int32)
    other = None if SIZE == PIECE else 0.0
    param = tl.load(pointers[0], mask, other).to(tl.float32)
    grad = tl.load(pointers[1], mask, other).to(tl.float32) * update.grad_factor
    exp_avg = tl.load(pointers[2], mask, other)
    exp_avg_sq = tl.load(pointers[3], mask, other)
    exp_avg = update.beta1 * exp_avg + update.grad_share1 * grad
    exp_avg_sq = update.beta2 * exp_avg_sq + update.grad_share2 * (grad * grad)
    tl.store(pointers[2], exp_avg, mask)
    tl.store(pointers[3], exp_avg_sq, mask)
    direction = direction_of(update, param, exp_avg, exp_avg_sq)
    if SIZE != PIECE:
        direction = tl.where(mask, direction, 0.0)  # 0 / 0 with an eps of 0
    param_double = param.to(tl.float64)
    direction_double = direction.to(tl.float64)
    return param_double * param_double, direction_double * direction_double


@jit
def params_piece(
    update: LAMB,
    step_size: tl.tensor,
    arrays: tl.tuple,
    start: tl.tensor,
    end: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """Moves SIZE parameters."""
    WIDTH: tl.constexpr = LANE if SIZE == PIECE else 1
    lanes = tl.arange(0, SIZE)
    pointers = [pointers_of(array, start, lanes, WIDTH) for array in arrays]
    mask = None if SIZE == PIECE else lanes < (end - start).to(tl.int32)
    param = tl.load(pointers[0], mask)
    value = param.to(tl.float32)
    exp_avg = tl.load(pointers[1], mask)
    exp_avg_sq = tl.load(pointers[2], mask)
    direction = direction_of(update, value, exp_avg, exp_avg_sq)
    tl.store(pointers[0], (value - step_size * direction).to(param.dtype), mask)


@jit
def aligned_end_of(bits: tl.tensor, begin: tl.tensor, end: tl.tensor) -> tl.tensor:
    """Returns where the whole pieces end, all arrays being aligned if `bits`, or-ed, is."""
    return tl.where(bits % 16 == 0, begin + (end - begin) // PIECE * PIECE, begin)


@jit
def moments_chunk(
    row: tl.tensor,
    update: LAMB,
    gradient: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Moves the moments of a chunk; returns its two sums of squares."""
    param = tl.load(row + PARAM)
    exp_avg = tl.load(row + STATES)
    exp_avg_sq = tl.load(row + STATES + 1)
    arrays: tl.tuple = (
        param.to(tl.pointer_type(dtype)),
        gradient.to(tl.pointer_type(dtype)),
        exp_avg.to(tl.pointer_type(tl.float32)),
        exp_avg_sq.to(tl.pointer_type(tl.float32)),
    )
    aligned_end = aligned_end_of(param | gradient | exp_avg | exp_avg_sq, begin, end)
    params = tl.zeros((PIECE,), tl.float64)
    directions = tl.zeros((PIECE,), tl.float64)
    start = begin
    while start < aligned_end:
        more_params, more_directions = moments_piece(update, arrays, start, end, PIECE)
        params += more_params
        directions += more_directions
        start += PIECE
    rest_params = tl.zeros((UNALIGNED_PIECE,), tl.float64)
    rest_directions = tl.zeros((UNALIGNED_PIECE,), tl.float64)
    rest = aligned_end
    while rest < end:
        more_params, more_directions = moments_piece(update, arrays, rest, end, UNALIGNED_PIECE)
        rest_params += more_params
        rest_directions += more_directions
        rest += UNALIGNED_PIECE
    return tl.sum(params) + tl.sum(rest_params), tl.sum(directions) + tl.sum(rest_directions)


@jit
def params_chunk(
    row: tl.tensor,
    update: LAMB,
    step_size: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    dtype: tl.constexpr,
) -> None:
    param = tl.load(row + PARAM)
    exp_avg = tl.load(row + STATES)
    exp_avg_sq = tl.load(row + STATES + 1)
    arrays: tl.tuple = (
        param.to(tl.pointer_type(dtype)),
        exp_avg.to(tl.pointer_type(tl.float32)),
        exp_avg_sq.to(tl.pointer_type(tl.float32)),
    )
    aligned_end = aligned_end_of(param | exp_avg | exp_avg_sq, begin, end)
    start = begin
    while start < aligned_end:
        params_piece(update, step_size, arrays, start, end, PIECE)
        start += PIECE
    rest = aligned_end
    while rest < end:
        params_piece(update, step_size, arrays, rest, end, UNALIGNED_PIECE)
        rest += UNALIGNED_PIECE


@jit
def sum_tensor(
    chunk_squares: tl.tensor, tensor_squares: tl.tensor, ticket: tl.tensor, count: tl.tensor
) -> None:
    """Adds up a tensor's `count` chunks, in order, once all are there: the last program does it."""
    tl.debug_barrier()  # the sums of this chunk are on their way
    if tl.atomic_add(ticket, 1) == count - 1:
        params = tl.zeros((THREADS,), tl.float64)
        directions = tl.zeros((THREADS,), tl.float64)
        first = 0
        while first < count:
            chunks = first + tl.arange(0, THREADS)
            params += tl.load(chunk_squares + 2 * chunks, chunks < count, 0.0)
            directions += tl.load(chunk_squares + 2 * chunks + 1, chunks < count, 0.0)
            first += THREADS
        tl.store(tensor_squares, tl.sum(params))
        tl.store(tensor_squares + 1, tl.sum(directions))
        tl.store(ticket, 0)


@jit_kernel
def moments_kernel(
    tensors: tl.tensor,
    groups: tl.tensor,
    chunks: tl.tensor,
    gradients: tl.tensor,
    step: tl.tensor,
    ticket: tl.tensor,
    squares: tl.tensor,
    loss_scale: tl.tensor | None,
    found_inf: tl.tensor | None,
    norm: tl.tensor | None,
    max_norm: tl.tensor | None,
    num_tensors: tl.tensor,
    num_chunks: tl.tensor,
    CHUNK: tl.constexpr,
    COMMITS_STEP: tl.constexpr,
) -> None:
    tl.static_assert(CHUNK % 16 == 0)  # a chunk is aligned where its tensor is
    # Of its own, the condition is known in compilation.
    if found_inf is not None:  # noqa: SIM102
        if tl.load(found_inf) != 0.0:
            return
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    gradient = tl.load(gradients + tensor)
    if gradient != 0:
        row = tensors + tensor * TENSOR_COLUMNS
        update = fold(row, groups, step, grad_scale(loss_scale, norm, max_norm), lamb_fold)
        index = tl.load(chunks + 2 * program + 1)
        numel = tl.load(row + NUMEL)
        begin = index.to(tl.int64) * CHUNK
        end = tl.minimum(begin + CHUNK, numel)
        code = tl.load(row + DTYPE)
        if code == FLOAT32:
            params, directions = moments_chunk(row, update, gradient, begin, end, tl.float32)
        elif code == BFLOAT16:
            params, directions = moments_chunk(row, update, gradient, begin, end, tl.bfloat16)
        else:
            params, directions = moments_chunk(row, update, gradient, begin, end, tl.float16)
        tl.store(squares + 2 * program, params)
        tl.store(squares + 2 * program + 1, directions)
        first = program - index
        count = (numel + CHUNK - 1) // CHUNK
        of_tensor = squares + 2 * (num_chunks + tensor)
        sum_tensor(squares + 2 * first, of_tensor, ticket + 1 + tensor, count)


@jit_kernel
def params_kernel(
    tensors: tl.tensor,
    groups: tl.tensor,
    chunks: tl.tensor,
    gradients: tl.tensor,
    step: tl.tensor,
    ticket: tl.tensor,
    squares: tl.tensor,
    loss_scale: tl.tensor | None,
    found_inf: tl.tensor | None,
    norm: tl.tensor | None,
    max_norm: tl.tensor | None,
    num_tensors: tl.tensor,
    num_chunks: tl.tensor,
    CHUNK: tl.constexpr,
    COMMITS_STEP: tl.constexpr,
) -> None:
    tl.static_assert(CHUNK % 16 == 0)
    # Of its own, the condition is known in compilation.
    if found_inf is not None:  # noqa: SIM102
        if tl.load(found_inf) != 0.0:
            return
    program = tl.program_id(0)
    if program < num_chunks:  # a launch without chunks still commits
        tensor = tl.load(chunks + 2 * program)
        if tl.load(gradients + tensor) != 0:
            row = tensors + tensor * TENSOR_COLUMNS
            update = fold(row, groups, step, grad_scale(loss_scale, norm, max_norm), lamb_fold)
            step_size = step_size_of(update, squares + 2 * (num_chunks + tensor))
            begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
            end = tl.minimum(begin + CHUNK, tl.load(row + NUMEL))
            code = tl.load(row + DTYPE)
            if code == FLOAT32:
                params_chunk(row, update, step_size, begin, end, tl.float32)
            elif code == BFLOAT16:
                params_chunk(row, update, step_size, begin, end, tl.bfloat16)
            else:
                params_chunk(row, update, step_size, begin, end, tl.float16)
    commit(tensors, gradients, step, ticket, num_tensors, COMMITS_STEP)


def step(
    *,
    tensors: Tensor,
    groups: Tensor,
    chunks: Tensor,
    gradients: Tensor,
    step: Tensor,
    ticket: Tensor,
    squares: Tensor,
    scaling: tuple[Tensor | None, ...],
    chunk_elements: int,
    commits_step: bool = True,
    passes: str = "both",
) -> None:
    """Updates every tensor that has a gradient and commits the step, in two launches.

    Args:
        tensors, groups, chunks, gradients, step, scaling, chunk_elements, commits_step: as for
            `triton_kernels.step`.
        ticket: int32 `(1 + N,)`, the blocks' and then each tensor's; 0 before and after.
        squares: float64 `(C + N, 2)`, of each chunk and then of each tensor; room for the first
            launch to leave its sums to the second.
        passes: "both", or the launch for the "moments" or the "params" alone.
    """
    tables = (tensors, groups, chunks, gradients, step, ticket, squares, *scaling)
    sizes = (len(tensors), len(chunks), chunk_elements, commits_step)
    options = launch_options("float32")
    with torch.accelerator.device_index(tensors.device.index):
        if passes != "params" and len(chunks) > 0:
            moments_kernel[(len(chunks),)](*tables, *sizes, **options)
        if passes != "moments":
            params_kernel[(max(len(chunks), 1),)](*tables, *sizes, **options)
