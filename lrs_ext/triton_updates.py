"""The element rules of the Triton backend: csrc/updates.h once more.

A fold makes coefficients of a group's numbers, once a tensor and step, in float64; the rule then
moves elements in float32 whatever the storage type.
"""

from typing import NamedTuple

import triton.language as tl

from lrs_ext.triton_storage import jit, with_reciprocal

# Columns of a row of the group table. From WEIGHT_DECAY to ALWAYS_ADAPT, they are float64.
LR = tl.constexpr(0)
CAPACITY = tl.constexpr(1)
WEIGHT_DECAY = tl.constexpr(2)
MAXIMIZE = tl.constexpr(3)
MOMENTUM = tl.constexpr(4)  # beta1 too
BETA2 = DAMPENING = tl.constexpr(5)
EPS = NESTEROV = tl.constexpr(6)
DECOUPLED = tl.constexpr(7)
ALWAYS_ADAPT = tl.constexpr(8)
WEIGHT_DECAYS = tl.constexpr(9)  # the address of its values and their number, or zeros
MOMENTA = tl.constexpr(11)  # likewise; of beta1 too
GROUP_COLUMNS = tl.constexpr(13)


class SGD(NamedTuple):
    """Coefficients of an update, folded once for each chunk."""

    grad_factor: tl.tensor
    weight_decay: tl.tensor
    lr: tl.tensor
    momentum: tl.tensor
    grad_share: tl.tensor
    nesterov: tl.tensor


class Adam(NamedTuple):
    """Coefficients of an update, folded once for each chunk."""

    grad_factor: tl.tensor
    coupled_decay: tl.tensor
    param_share: tl.tensor
    beta1: tl.tensor
    beta2: tl.tensor
    grad_share1: tl.tensor
    grad_share2: tl.tensor
    step_size: tl.tensor
    denominator_scale: tl.tensor
    eps: tl.tensor


class Lion(NamedTuple):
    """Coefficients of an update, folded once for each chunk."""

    grad_factor: tl.tensor
    param_share: tl.tensor
    lr: tl.tensor
    beta1: tl.tensor
    beta2: tl.tensor
    grad_share1: tl.tensor
    grad_share2: tl.tensor


@jit
def sgd_fold(
    group: tl.tensor,
    lr: tl.tensor,
    weight_decay: tl.tensor,
    momentum: tl.tensor,
    step: tl.tensor,
    scale: tl.tensor,
) -> SGD:
    # The first update makes the gradient itself the momentum buffer.
    grad_share = tl.where(step == 1.0, 1.0, 1.0 - tl.load(group + DAMPENING))
    return SGD(
        grad_factor=tl.where(tl.load(group + MAXIMIZE) != 0.0, -scale, scale).to(tl.float32),
        weight_decay=weight_decay.to(tl.float32),
        lr=lr.to(tl.float32),
        momentum=momentum.to(tl.float32),
        grad_share=grad_share.to(tl.float32),
        nesterov=tl.load(group + NESTEROV) != 0.0,
    )


@jit
def sgd_apply(
    update: SGD, param: tl.tensor, grad: tl.tensor, states: tl.tuple
) -> tuple[tl.tensor, tl.tuple]:
    grad *= update.grad_factor
    grad = tl.where(update.weight_decay != 0.0, grad + update.weight_decay * param, grad)
    if len(states) == 1:
        momentum_buffer = update.momentum * states[0] + update.grad_share * grad
        grad = tl.where(update.nesterov, grad + update.momentum * momentum_buffer, momentum_buffer)
        states = (momentum_buffer,)
    return param - update.lr * grad, states


@jit
def power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    # For 0 <= base < 1 and exponent >= 1, the error is some 1e-16 absolute, which is what counts in
    # 1 - power. The bound spares the interpreter a warning about log(0).
    return tl.exp(exponent * tl.log(tl.maximum(base, 1e-300)))


@jit
def adam_fold(
    group: tl.tensor,
    lr: tl.tensor,
    weight_decay: tl.tensor,
    beta1: tl.tensor,
    step: tl.tensor,
    scale: tl.tensor,
) -> Adam:
    beta2 = tl.load(group + BETA2)
    decoupled = tl.load(group + DECOUPLED) != 0.0
    bias_correction1 = 1.0 - power(beta1, step)
    bias_correction2 = 1.0 - power(beta2, step)
    return Adam(
        grad_factor=tl.where(tl.load(group + MAXIMIZE) != 0.0, -scale, scale).to(tl.float32),
        coupled_decay=tl.where(decoupled, 0.0, weight_decay).to(tl.float32),
        param_share=tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(tl.float32),
        beta1=beta1.to(tl.float32),
        beta2=beta2.to(tl.float32),
        grad_share1=(1.0 - beta1).to(tl.float32),
        grad_share2=(1.0 - beta2).to(tl.float32),
        step_size=(lr / bias_correction1).to(tl.float32),
        denominator_scale=(1.0 / tl.sqrt(bias_correction2)).to(tl.float32),
        eps=with_reciprocal(tl.load(group + EPS)),
    )


@jit
def adam_apply(
    update: Adam, param: tl.tensor, grad: tl.tensor, states: tl.tuple
) -> tuple[tl.tensor, tl.tuple]:
    grad *= update.grad_factor
    grad = tl.where(update.coupled_decay != 0.0, grad + update.coupled_decay * param, grad)
    param *= update.param_share
    exp_avg = update.beta1 * states[0] + update.grad_share1 * grad
    exp_avg_sq = update.beta2 * states[1] + update.grad_share2 * (grad * grad)
    second_moment = exp_avg_sq
    if len(states) == 3:
        # As torch.maximum: nan in either operand stays.
        keep = (states[2] >= exp_avg_sq) | (states[2] != states[2])
        second_moment = tl.where(keep, states[2], exp_avg_sq)
        states = (exp_avg, exp_avg_sq, second_moment)
    else:
        states = (exp_avg, exp_avg_sq)
    # Triton's plain division and square root are approximate.
    denominator = tl.sqrt_rn(second_moment) * update.denominator_scale + update.eps
    share = exp_avg * tl.div_rn(1.0, denominator)
    return param - update.step_size * share, states


@jit
def lion_fold(
    group: tl.tensor,
    lr: tl.tensor,
    weight_decay: tl.tensor,
    beta1: tl.tensor,
    step: tl.tensor,
    scale: tl.tensor,
) -> Lion:
    beta2 = tl.load(group + BETA2)
    return Lion(
        grad_factor=tl.where(tl.load(group + MAXIMIZE) != 0.0, -scale, scale).to(tl.float32),
        param_share=(1.0 - lr * weight_decay).to(tl.float32),
        lr=lr.to(tl.float32),
        beta1=beta1.to(tl.float32),
        beta2=beta2.to(tl.float32),
        grad_share1=(1.0 - beta1).to(tl.float32),
        grad_share2=(1.0 - beta2).to(tl.float32),
    )


@jit
def lion_apply(
    update: Lion, param: tl.tensor, grad: tl.tensor, states: tl.tuple
) -> tuple[tl.tensor, tl.tuple]:
    grad *= update.grad_factor
    direction = update.beta1 * states[0] + update.grad_share1 * grad
    # The sign of 0 is 0; that of nan stays nan.
    sign = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, direction))
    exp_avg = update.beta2 * states[0] + update.grad_share2 * grad
    return param * update.param_share - update.lr * sign, (exp_avg,)
