"""The Triton backend of the step, for machines without the compiled CUDA part.

One launch updates every tensor of every group and commits the step, from the tables that the native
core builds: csrc/tensor_table.h has their layout, csrc/updates.h the element rules, and
csrc/step_cuda.cu the same launch in CUDA.

Per-step scalars are float64; element maths is float32 whatever the storage type.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Columns of a row of `tensors`.
PARAM = tl.constexpr(0)
STATES = tl.constexpr(1)
TENSOR_STEP = tl.constexpr(4)
NUMEL = tl.constexpr(5)
GROUP = tl.constexpr(6)
DTYPE = tl.constexpr(7)
TENSOR_COLUMNS = tl.constexpr(8)

# Columns of a row of `groups`. All but the first two hold float64.
LR = tl.constexpr(0)
CAPACITY = tl.constexpr(1)
SCALE = tl.constexpr(2)
HYPER = tl.constexpr(3)
GROUP_COLUMNS = tl.constexpr(9)

# Columns of a group's hyper-parameters.
WEIGHT_DECAY = tl.constexpr(0)
MAXIMIZE = tl.constexpr(1)
BETA1 = tl.constexpr(2)
BETA2 = tl.constexpr(3)
EPS = tl.constexpr(4)
DECOUPLED = tl.constexpr(5)
MOMENTUM = BETA1
DAMPENING = BETA2
NESTEROV = EPS

# Codes of the storage types.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)

NUM_WARPS = 4
THREADS = tl.constexpr(32 * NUM_WARPS)


class SGD(NamedTuple):
    grad_sign: Any
    weight_decay: Any
    lr: Any
    momentum: Any
    grad_share: Any
    nesterov: Any


class Adam(NamedTuple):
    grad_sign: Any
    coupled_decay: Any
    param_share: Any
    beta2: Any
    grad_share1: Any
    grad_share2: Any
    step_size: Any
    denominator_scale: Any
    eps: Any


@triton.jit
def sgd_fold(hyper, lr, step):
    return SGD(
        grad_sign=tl.where(tl.load(hyper + MAXIMIZE) != 0.0, -1.0, 1.0),
        weight_decay=tl.load(hyper + WEIGHT_DECAY).to(tl.float32),
        lr=lr.to(tl.float32),
        momentum=tl.load(hyper + MOMENTUM).to(tl.float32),
        grad_share=tl.where(step == 1.0, 1.0, 1.0 - tl.load(hyper + DAMPENING)).to(tl.float32),
        nesterov=tl.load(hyper + NESTEROV) != 0.0,
    )


@triton.jit
def sgd_apply(update, param, grad, states):
    grad *= update.grad_sign
    grad = tl.where(update.weight_decay != 0.0, grad + update.weight_decay * param, grad)
    if len(states) == 1:
        momentum_buffer = update.momentum * states[0] + update.grad_share * grad
        grad = tl.where(update.nesterov, grad + update.momentum * momentum_buffer, momentum_buffer)
        new_states = (momentum_buffer,)
    else:
        new_states = states
    return param - update.lr * grad, new_states


@triton.jit
def adam_fold(hyper, lr, step):
    beta1 = tl.load(hyper + BETA1)
    beta2 = tl.load(hyper + BETA2)
    weight_decay = tl.load(hyper + WEIGHT_DECAY)
    decoupled = tl.load(hyper + DECOUPLED) != 0.0
    bias_correction1 = 1.0 - power(beta1, step)
    bias_correction2 = 1.0 - power(beta2, step)
    return Adam(
        grad_sign=tl.where(tl.load(hyper + MAXIMIZE) != 0.0, -1.0, 1.0),
        coupled_decay=tl.where(decoupled, 0.0, weight_decay).to(tl.float32),
        param_share=tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(tl.float32),
        beta2=beta2.to(tl.float32),
        grad_share1=(1.0 - beta1).to(tl.float32),
        grad_share2=(1.0 - beta2).to(tl.float32),
        step_size=(lr / bias_correction1).to(tl.float32),
        denominator_scale=(1.0 / tl.sqrt(bias_correction2)).to(tl.float32),
        eps=tl.load(hyper + EPS).to(tl.float32),
    )


@triton.jit
def adam_apply(update, param, grad, states):
    exp_avg, exp_avg_sq = states[0], states[1]
    grad *= update.grad_sign
    grad = tl.where(update.coupled_decay != 0.0, grad + update.coupled_decay * param, grad)
    param *= update.param_share
    exp_avg += update.grad_share1 * (grad - exp_avg)
    exp_avg_sq = update.beta2 * exp_avg_sq + update.grad_share2 * (grad * grad)
    if len(states) == 3:
        max_exp_avg_sq = states[2]
        # As torch.maximum: nan in either operand stays.
        keep = (max_exp_avg_sq >= exp_avg_sq) | (max_exp_avg_sq != max_exp_avg_sq)
        max_exp_avg_sq = tl.where(keep, max_exp_avg_sq, exp_avg_sq)
        second_moment = max_exp_avg_sq
        new_states = (exp_avg, exp_avg_sq, max_exp_avg_sq)
    else:
        second_moment = exp_avg_sq
        new_states = (exp_avg, exp_avg_sq)
    denominator = tl.sqrt_rn(second_moment) * update.denominator_scale + update.eps
    return param - update.step_size * tl.div_rn(exp_avg, denominator), new_states


@triton.jit
def power(base, exponent):
    return tl.exp(exponent * tl.log(base))


@triton.jit
def pointers(address, start, lanes, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype)) + start
    if ALIGNED > 0:
        pointer = tl.multiple_of(pointer, ALIGNED * dtype.primitive_bitwidth // 8)
    return pointer + lanes


@triton.jit
def update_piece(update, addresses, start, end, APPLY: tl.constexpr, dtype: tl.constexpr, PIECE: tl.constexpr, ALIGNED: tl.constexpr):
    lanes = tl.arange(0, PIECE)
    param_pointers = pointers(addresses[0], start, lanes, dtype, ALIGNED)
    grad_pointers = pointers(addresses[1], start, lanes, dtype, ALIGNED)
    state_pointers = [pointers(address, start, lanes, tl.float32, ALIGNED) for address in addresses[2:]]
    mask = None if ALIGNED > 0 else lanes < (end - start).to(tl.int32)
    param = tl.load(param_pointers, mask).to(tl.float32)
    grad = tl.load(grad_pointers, mask).to(tl.float32)
    states = [tl.load(pointer, mask) for pointer in state_pointers]
    param, states = APPLY(update, param, grad, states)
    tl.store(param_pointers, param.to(dtype), mask)
    for i in tl.static_range(len(states)):
        tl.store(state_pointers[i], states[i], mask)


@triton.jit
def update_chunk(update, addresses, begin, end, APPLY: tl.constexpr, dtype: tl.constexpr, REPEAT: tl.constexpr):
    LANE: tl.constexpr = 128 // dtype.primitive_bitwidth if len(addresses) == 2 else 4
    PIECE: tl.constexpr = THREADS * LANE * REPEAT
    bits = addresses[0]
    for i in tl.static_range(1, len(addresses)):
        bits |= addresses[i]
    count = end - begin
    aligned_end = tl.where(bits % 16 == 0, begin + count // PIECE * PIECE, begin)
    for start in range(begin, aligned_end, PIECE):
        update_piece(update, addresses, start, end, APPLY, dtype, PIECE, LANE)
    for start in range(aligned_end, end, 2 * THREADS):
        update_piece(update, addresses, start, end, APPLY, dtype, 2 * THREADS, 0)


@triton.jit
def update_chunk_of_dtype(update, addresses, begin, end, code, APPLY: tl.constexpr, REPEAT: tl.constexpr):
    if code == FLOAT32:
        update_chunk(update, addresses, begin, end, APPLY, tl.float32, REPEAT)
    elif code == BFLOAT16:
        update_chunk(update, addresses, begin, end, APPLY, tl.bfloat16, REPEAT)
    else:
        update_chunk(update, addresses, begin, end, APPLY, tl.float16, REPEAT)


@triton.jit
def commit(tensors, gradients, step, ticket, num_tensors):
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        for start in range(0, num_tensors, THREADS):
            rows = start + tl.arange(0, THREADS)
            exists = rows < num_tensors
            updated = tl.load(gradients + rows, exists, other=0) != 0
            tensor_steps = tl.load(tensors + rows * TENSOR_COLUMNS + TENSOR_STEP, updated, other=0)
            tensor_steps = tensor_steps.to(tl.pointer_type(tl.float32))
            tl.store(tensor_steps, tl.load(tensor_steps, updated) + 1.0, updated)
        tl.store(step, tl.load(step) + 1)
        tl.store(ticket, 0)


@triton.jit
def step_kernel(tensors, groups, chunks, gradients, step, ticket, num_tensors, num_chunks, FOLD: tl.constexpr, APPLY: tl.constexpr, MIN_STATES: tl.constexpr, MAX_STATES: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    if program < num_chunks:
        tensor = tl.load(chunks + 2 * program)
        gradient = tl.load(gradients + tensor)
        if gradient != 0:
            row = tensors + tensor.to(tl.int64) * TENSOR_COLUMNS
            group = groups + tl.load(row + GROUP) * GROUP_COLUMNS
            doubles = group.to(tl.pointer_type(tl.float64), bitcast=True)
            last = tl.load(group + CAPACITY) - 1
            lrs = tl.load(group + LR).to(tl.pointer_type(tl.float32))
            lr = tl.load(lrs + tl.minimum(tl.load(step), last)).to(tl.float64) * tl.load(doubles + SCALE)
            tensor_step = tl.load(tl.load(row + TENSOR_STEP).to(tl.pointer_type(tl.float32)))
            update = FOLD(doubles + HYPER, lr, tensor_step.to(tl.float64) + 1.0)
            begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
            end = tl.minimum(begin + CHUNK, tl.load(row + NUMEL))
            code = tl.load(row + DTYPE)
            addresses = (tl.load(row + PARAM), gradient)
            for i in tl.static_range(MIN_STATES):
                addresses = addresses + (tl.load(row + STATES + i),)
            last_state = tl.load(row + STATES + MAX_STATES - 1)
            if last_state != 0:
                update_chunk_of_dtype(update, addresses + (last_state,), begin, end, code, APPLY, 2 if MIN_STATES == 0 else 1)
            else:
                update_chunk_of_dtype(update, addresses, begin, end, code, APPLY, 2 if MIN_STATES == 0 else 1)
    commit(tensors, gradients, step, ticket, num_tensors)


ALGORITHMS = {"sgd": (sgd_fold, sgd_apply, 0, 1), "adam": (adam_fold, adam_apply, 2, 3)}


def step(algorithm, *, tensors, groups, chunks, gradients, step, ticket, chunk_elements):
    fold, apply, lo, hi = ALGORITHMS[algorithm]
    with torch.accelerator.device_index(tensors.device.index):
        step_kernel[(max(chunks.shape[0], 1),)](
            tensors, groups, chunks, gradients, step, ticket, tensors.shape[0], chunks.shape[0],
            fold, apply, lo, hi, chunk_elements, num_warps=NUM_WARPS)
