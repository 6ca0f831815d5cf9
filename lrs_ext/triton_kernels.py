"""The Triton backend of the step, for machines without the compiled CUDA part.

One launch updates every tensor of every group and commits the step, as csrc/step_cuda.cu does and
from the same tables, whose layout csrc/tensor_table.h has; triton_updates.py has the element rules.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrs_ext.triton_storage import (
    BFLOAT16_STATE,
    BLOCK8_STATE,
    FLOAT32_STATE,
    NEAREST,
    QUANT_BLOCK,
    SPLIT,
    STOCHASTIC,
    jit,
    join,
    load_state,
    random_bits,
    random_key,
    rounded_stochastically,
    split,
    store_state,
)
from lrs_ext.triton_updates import (
    CAPACITY,
    GROUP_COLUMNS,
    LR,
    MOMENTA,
    MOMENTUM,
    WEIGHT_DECAY,
    WEIGHT_DECAYS,
    adam_apply,
    adam_fold,
    lion_apply,
    lion_fold,
    sgd_apply,
    sgd_fold,
)

# Columns of a row of the tensor table.
PARAM = tl.constexpr(0)
STATES = tl.constexpr(1)  # three of them
SCALES = tl.constexpr(4)  # of as many states
REMAINDER = tl.constexpr(7)
TENSOR_STEP = tl.constexpr(8)
NUMEL = tl.constexpr(9)
GROUP = tl.constexpr(10)
DTYPE = tl.constexpr(11)
POSITION = tl.constexpr(12)
TENSOR_COLUMNS = tl.constexpr(13)

# Codes in the column DTYPE; the third is float16.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)

THREADS = tl.constexpr(128)
NUM_WARPS = THREADS.value // (64 if torch.version.hip else 32)

# Triton is untyped: this gives its decorator a type.
jit_kernel: Callable[[Callable[..., Any]], Any] = triton.jit(
    do_not_specialize=["num_tensors", "num_chunks"]  # a new model needs no new compilation
)


@jit
def pointers_of(
    array: tl.tensor, start: tl.tensor, lanes: tl.tensor, LANE: tl.constexpr
) -> tl.tensor:
    first = array + start
    if LANE > 1:
        first = tl.multiple_of(first, LANE * first.dtype.element_ty.primitive_bitwidth // 8)
    return first + lanes


@jit
def update_piece(
    update: tl.tuple,
    arrays: tl.tuple,
    scales: tl.tuple,
    start: tl.tensor,
    end: tl.tensor,
    key: tl.tensor,
    UPDATE: tl.constexpr,
    LANE: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Updates the elements from `start` to `start + PIECE`, or to `end` where LANE is 1.

    Args:
        arrays: parameter, gradient, states, and the remainder of a split parameter.
        scales: of the states, if they are block-quantised.
        UPDATE: APPLY, ROOT_STATE, STATE_TYPE, PARAM_KIND.
    """
    APPLY: tl.constexpr = UPDATE[0]
    ROOT_STATE: tl.constexpr = UPDATE[1]
    STATE_TYPE: tl.constexpr = UPDATE[2]
    PARAM_KIND: tl.constexpr = UPDATE[3]
    NUM_STATES: tl.constexpr = len(arrays) - (3 if PARAM_KIND == SPLIT else 2)
    lanes = tl.arange(0, PIECE)
    pointers = [pointers_of(array, start, lanes, LANE) for array in arrays]
    mask = None if LANE > 1 else lanes < (end - start).to(tl.int32)
    blocks = tl.arange(0, PIECE // LANE) // (QUANT_BLOCK // LANE)
    scale_pointers = [scale + start // QUANT_BLOCK + blocks for scale in scales]
    param = tl.load(pointers[0], mask)
    if PARAM_KIND == SPLIT:
        value = join(param, tl.load(pointers[len(arrays) - 1], mask))
    else:
        value = param.to(tl.float32)
    grad = tl.load(pointers[1], mask).to(tl.float32)
    states: tl.tuple = ()
    for i in tl.static_range(NUM_STATES):
        scale = scale_pointers[i] if STATE_TYPE == BLOCK8_STATE else None
        states += (load_state(pointers[2 + i], scale, mask, STATE_TYPE, i == ROOT_STATE),)
    new_value, new_states = APPLY(update, value, grad, states)
    random = random_bits(key, start, lanes)
    if PARAM_KIND == SPLIT:
        high, low = split(new_value)
        tl.store(pointers[0], high, mask)
        tl.store(pointers[len(arrays) - 1], low, mask)
    elif PARAM_KIND == STOCHASTIC:
        tl.store(pointers[0], rounded_stochastically(new_value, random), mask)
    else:
        tl.store(pointers[0], new_value.to(param.dtype), mask)
    for i in tl.static_range(NUM_STATES):
        scale = scale_pointers[i] if STATE_TYPE == BLOCK8_STATE else None
        store_state(
            pointers[2 + i],
            scale,
            new_states[i],
            random,
            mask,
            STATE_TYPE,
            i == ROOT_STATE,
        )


@jit
def update_chunk(
    update: tl.tuple,
    addresses: tl.tuple,
    scale_addresses: tl.tuple,
    begin: tl.tensor,
    end: tl.tensor,
    key: tl.tensor,
    UPDATE: tl.constexpr,
    dtype: tl.constexpr,
) -> None:
    """Updates the elements from `begin` to `end`, in lanes of 16 bytes where all arrays allow it.

    A lane holds the elements that fit 16 bytes in the widest array: with wider lanes in the
    others, Triton would exchange results between threads before it stores them.
    """
    STATE_TYPE: tl.constexpr = UPDATE[2]
    IS_SPLIT: tl.constexpr = UPDATE[3] == SPLIT
    NUM_STATES: tl.constexpr = len(addresses) - (3 if IS_SPLIT else 2)
    LANE: tl.constexpr = 4 if NUM_STATES > 0 else 128 // dtype.primitive_bitwidth
    # 48 to 96 bytes on the way to each thread, and few enough registers for 1,000 threads.
    PIECE: tl.constexpr = THREADS * LANE * (1 if NUM_STATES > 1 else 2)
    # Of another shape than PIECE: Triton would choose one layout for both.
    UNALIGNED_PIECE: tl.constexpr = THREADS * 2
    STATE: tl.constexpr = (
        tl.float32
        if STATE_TYPE == FLOAT32_STATE
        else (tl.bfloat16 if STATE_TYPE == BFLOAT16_STATE else tl.uint8)
    )
    params = addresses[0].to(tl.pointer_type(dtype))
    grads = addresses[1].to(tl.pointer_type(dtype))
    arrays: tl.tuple = (params, grads)
    bits = addresses[0] | addresses[1]
    for i in tl.static_range(NUM_STATES):
        arrays += (addresses[2 + i].to(tl.pointer_type(STATE)),)
        bits |= addresses[2 + i]
    if IS_SPLIT:
        arrays += (addresses[len(addresses) - 1].to(tl.pointer_type(tl.int16)),)
        bits |= addresses[len(addresses) - 1]
    scales: tl.tuple = ()
    for i in tl.static_range(len(scale_addresses)):
        scales += (scale_addresses[i].to(tl.pointer_type(tl.float32)),)
    aligned_end = tl.where(bits % 16 == 0, begin + (end - begin) // PIECE * PIECE, begin)
    # The interpreter cannot count a range to a loaded value under numpy 2.4.
    start = begin
    while start < aligned_end:
        update_piece(update, arrays, scales, start, end, key, UPDATE, LANE, PIECE)
        start += PIECE
    rest = aligned_end
    while rest < end:
        update_piece(update, arrays, scales, rest, end, key, UPDATE, 1, UNALIGNED_PIECE)
        rest += UNALIGNED_PIECE


@jit
def update_chunk_of(
    row: tl.tensor,
    update: tl.tuple,
    gradient: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    key: tl.tensor,
    UPDATE: tl.constexpr,
    NUM_STATES: tl.constexpr,
) -> None:
    """Updates a chunk of the tensor in `row`."""
    APPLY: tl.constexpr = UPDATE[0]
    ROOT_STATE: tl.constexpr = UPDATE[1]
    # With more states than the native core compresses, they are float32.
    STATE_TYPE: tl.constexpr = UPDATE[2] if NUM_STATES <= 2 else FLOAT32_STATE
    PARAM_KIND: tl.constexpr = UPDATE[3]
    PLAIN: tl.constexpr = (APPLY, ROOT_STATE, STATE_TYPE, NEAREST)
    BFLOAT16_UPDATE: tl.constexpr = (APPLY, ROOT_STATE, STATE_TYPE, PARAM_KIND)
    addresses: tl.tuple = (tl.load(row + PARAM), gradient)
    scales: tl.tuple = ()
    for i in tl.static_range(NUM_STATES):
        addresses += (tl.load(row + STATES + i),)
        if STATE_TYPE == BLOCK8_STATE:
            scales += (tl.load(row + SCALES + i),)
    bfloat16_arrays = addresses
    if PARAM_KIND == SPLIT:
        bfloat16_arrays += (tl.load(row + REMAINDER),)
    code = tl.load(row + DTYPE)
    if code == FLOAT32:
        update_chunk(update, addresses, scales, begin, end, key, PLAIN, tl.float32)
    elif code == BFLOAT16:
        update_chunk(update, bfloat16_arrays, scales, begin, end, key, BFLOAT16_UPDATE, tl.bfloat16)
    else:
        update_chunk(update, addresses, scales, begin, end, key, PLAIN, tl.float16)


@jit
def grad_scale(
    loss_scale: tl.tensor | None, norm: tl.tensor | None, max_norm: tl.tensor | None
) -> tl.tensor:
    """Returns what gradients are multiplied by."""
    scale = tl.full((), 1.0, tl.float64)
    if loss_scale is not None:
        scale = scale / tl.load(loss_scale).to(tl.float64)
    if norm is not None:
        clipped = tl.load(max_norm).to(tl.float64) / (tl.load(norm).to(tl.float64) * scale + 1e-6)
        scale *= tl.where(clipped >= 1.0, 1.0, clipped)
    return scale


@jit
def number_at(
    group: tl.tensor, step: tl.tensor, FIXED: tl.constexpr, VALUES: tl.constexpr
) -> tl.tensor:
    """Returns the number in column FIXED of a group, or its value of a step if it moves."""
    fixed = tl.load(group.to(tl.pointer_type(tl.float64), bitcast=True) + FIXED)
    address = tl.load(group + VALUES)
    position = tl.minimum(step, tl.load(group + VALUES + 1) - 1)
    values = address.to(tl.pointer_type(tl.float32))
    value = tl.load(values + position, address != 0, other=0.0)
    return tl.where(address != 0, value.to(tl.float64), fixed)


@jit
def fold(
    row: tl.tensor, groups: tl.tensor, step: tl.tensor, scale: tl.tensor, FOLD: tl.constexpr
) -> tl.tuple:
    """Returns the coefficients of the next update of the tensor in `row`."""
    group = groups + tl.load(row + GROUP) * GROUP_COLUMNS
    doubles = group.to(tl.pointer_type(tl.float64), bitcast=True)
    lrs = tl.load(group + LR).to(tl.pointer_type(tl.float32))
    now = tl.load(step)
    position = tl.minimum(now, tl.load(group + CAPACITY) - 1)
    lr = tl.load(lrs + position).to(tl.float64)
    weight_decay = number_at(group, now, WEIGHT_DECAY, WEIGHT_DECAYS)
    momentum = number_at(group, now, MOMENTUM, MOMENTA)
    tensor_step = tl.load(row + TENSOR_STEP).to(tl.pointer_type(tl.float32))
    count = tl.load(tensor_step).to(tl.float64) + 1.0
    return FOLD(doubles, lr, weight_decay, momentum, count, scale)


@jit
def commit(
    tensors: tl.tensor,
    gradients: tl.tensor,
    step: tl.tensor,
    ticket: tl.tensor,
    num_tensors: tl.tensor,
    COMMITS_STEP: tl.constexpr,
) -> None:
    """Advances the counters once every program has read them: the last to draw a ticket does it."""
    tl.debug_barrier()  # no thread may still have to read a counter when its program draws
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        first = 0
        while first < num_tensors:
            rows = first + tl.arange(0, THREADS)
            updated = tl.load(gradients + rows, rows < num_tensors, other=0) != 0
            counters = tl.load(tensors + rows * TENSOR_COLUMNS + TENSOR_STEP, updated, other=0)
            counters = counters.to(tl.pointer_type(tl.float32))
            tl.store(counters, tl.load(counters, updated) + 1.0, updated)
            first += THREADS
        if COMMITS_STEP:
            tl.store(step, tl.load(step) + 1)
        tl.store(ticket, 0)


@jit_kernel
def step_kernel(
    tensors: tl.tensor,
    groups: tl.tensor,
    chunks: tl.tensor,
    gradients: tl.tensor,
    step: tl.tensor,
    ticket: tl.tensor,
    loss_scale: tl.tensor | None,
    found_inf: tl.tensor | None,
    norm: tl.tensor | None,
    max_norm: tl.tensor | None,
    num_tensors: tl.tensor,
    num_chunks: tl.tensor,
    CHUNK: tl.constexpr,
    FOLD: tl.constexpr,
    APPLY: tl.constexpr,
    MIN_STATES: tl.constexpr,
    MAX_STATES: tl.constexpr,
    ROOT_STATE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    PARAM_KIND: tl.constexpr,
    COMMITS_STEP: tl.constexpr,
) -> None:
    UPDATE: tl.constexpr = (APPLY, ROOT_STATE, STATE_TYPE, PARAM_KIND)
    tl.static_assert(CHUNK % 128 == 0)  # so a chunk is aligned where its tensor is
    # Of its own, the condition is known in compilation.
    if found_inf is not None:  # noqa: SIM102
        if tl.load(found_inf) != 0.0:
            return
    program = tl.program_id(0)
    if program < num_chunks:  # a launch without chunks still commits
        tensor = tl.load(chunks + 2 * program)
        gradient = tl.load(gradients + tensor)
        if gradient != 0:
            row = tensors + tensor * TENSOR_COLUMNS
            scale = grad_scale(loss_scale, norm, max_norm)
            update = fold(row, groups, step, scale, FOLD)
            begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
            end = tl.minimum(begin + CHUNK, tl.load(row + NUMEL))
            key = random_key(tl.load(step), tl.load(row + POSITION), begin)
            if MIN_STATES == MAX_STATES:
                update_chunk_of(row, update, gradient, begin, end, key, UPDATE, MAX_STATES)
            else:
                last_state = tl.load(row + STATES + MAX_STATES - 1)
                if last_state != 0:
                    update_chunk_of(row, update, gradient, begin, end, key, UPDATE, MAX_STATES)
                else:
                    update_chunk_of(row, update, gradient, begin, end, key, UPDATE, MIN_STATES)
    commit(tensors, gradients, step, ticket, num_tensors, COMMITS_STEP)


# FOLD, APPLY, MIN_STATES, MAX_STATES, ROOT_STATE of step_kernel.
ALGORITHMS = {
    "sgd": (sgd_fold, sgd_apply, 0, 1, -1),
    "adam": (adam_fold, adam_apply, 2, 3, 1),
    "lion": (lion_fold, lion_apply, 1, 1, -1),
}

STATE_TYPES = {"float32": FLOAT32_STATE, "bfloat16": BFLOAT16_STATE, "block8": BLOCK8_STATE}
PARAM_KINDS = {"nearest": NEAREST, "stochastic": STOCHASTIC, "split": SPLIT}


def launch_options(state_type: str) -> dict[str, Any]:
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}  # the bits of the other backends
    if state_type == "block8" and not torch.version.hip:
        # ptxas aims at 80 registers by itself, and spills one; told so, it does not.
        options["maxnreg"] = 80
    return options


def step(
    algorithm: str,
    *,
    tensors: Tensor,
    groups: Tensor,
    chunks: Tensor,
    gradients: Tensor,
    step: Tensor,
    ticket: Tensor,
    scaling: tuple[Tensor | None, ...],
    chunk_elements: int,
    state_type: str = "float32",
    param_kind: str = "nearest",
    commits_step: bool = True,
) -> None:
    """Updates every tensor that has a gradient and commits the step, in one launch.

    The tables are contiguous, on the parameters' device, and hold addresses on that device.

    Args:
        algorithm: a key of `ALGORITHMS`.
        tensors: int64 `(N, 13)`, a TensorEntry a row; its null pointers are 0.
        groups: int64 `(G, 13)`, a Group a row; its doubles are bit-cast.
        chunks: int32 `(C, 2)`: the tensor, and the index of the chunk within it.
        gradients: int64 `(N,)`, addresses; 0 where a tensor has no gradient.
        step: int64, 0-d: committed updates; advances by one, even if no tensor has a gradient.
        ticket: int32 `(1,)`; 0 before and after.
        scaling: float32, one element each or None: loss scale, overflow flag, norm, its limit.
        chunk_elements: elements of a chunk, a multiple of 128; best a power of two from 2048 on.
        state_type, param_kind: keys of `STATE_TYPES` and `PARAM_KINDS`, the latter for bfloat16.
        commits_step: whether `step` advances.
    """
    with torch.accelerator.device_index(tensors.device.index):
        step_kernel[(max(len(chunks), 1),)](
            tensors,
            groups,
            chunks,
            gradients,
            step,
            ticket,
            *scaling,
            len(tensors),
            len(chunks),
            chunk_elements,
            *ALGORITHMS[algorithm],
            STATE_TYPES[state_type],
            PARAM_KINDS[param_kind],
            commits_step,
            **launch_options(state_type),
        )
