"""Slow, readable oracles in exact or float64 arithmetic. Nothing here imports the package.

Schedules are functions of exact rationals; updates are functions of float64 tensors that return new
tensors. Both are written from the papers' formulas, not from the implementation.
"""

import math
from fractions import Fraction

import torch

# Profiles: f(p) for an exact progress p in [0, 1].


def rex(progress, d=0.5):
    """Chen, Wolfe and Kyrillidis, arXiv 2107.04197, section 4.1, with d for its 1/2."""
    return float((1 - progress) / (1 - Fraction(d) * progress))


def linear(progress):
    return float(1 - progress)


def cosine(progress):
    """(1 + cos(pi p)) / 2 as a square, which does not cancel near p = 1."""
    return math.sin(math.pi / 2 * float(1 - progress)) ** 2


def exponential(progress, gamma=-3.0):
    return math.exp(gamma * float(progress))


def step_decay(progress, milestones=(0.5, 0.75), gamma=0.1):
    return float(Fraction(gamma) ** sum(progress >= share(m) for m in milestones))


def delayed_linear(progress, delay=0.5):
    delay = share(delay)
    return 1.0 if progress < delay else float((1 - progress) / (1 - delay))


def polynomial(progress, power=1.0):
    return float(1 - progress) ** power


def one_cycle(progress, low=0.1, momentum=None):
    """Up to the middle and down again, as section 4.1 of arXiv 2107.04197 prints it."""
    rise = 2 * progress if progress <= Fraction(1, 2) else 2 - 2 * progress
    return float(Fraction(low) + (1 - Fraction(low)) * rise)


def wsd(progress, decay=0.1, cooldown="sqrt"):
    """arXiv 2404.06395 and 2405.18392: the last part of the budget is the cool-down."""
    cooled = (progress - (1 - share(decay))) / share(decay)
    if cooled <= 0:
        return 1.0
    if cooldown == "sqrt":  # 1 - sqrt(q), without cancellation
        return float(1 - cooled) / (1 + math.sqrt(cooled))
    return {"linear": linear, "cosine": cosine, "exponential": exponential}[cooldown](cooled)


def constant(progress):
    return 1.0


PROFILES = {
    "rex": rex,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "step_decay": step_decay,
    "delayed_linear": delayed_linear,
    "polynomial": polynomial,
    "one_cycle": one_cycle,
    "wsd": wsd,
    "constant": constant,
}


def share(number):
    """The decimal or simple fraction that was meant by a float."""
    return Fraction(number).limit_denominator(10**6)


def sample_point(fraction, budget):
    """The update at which a share of the budget is reached: the decimal that was meant counts."""
    return math.ceil(share(fraction) * budget)


def sampled_update(update, budget, sampling):
    """The last sample point at or before an update; update 0 is always one."""
    if isinstance(sampling, int):
        return update // sampling * sampling
    points = [0, *(sample_point(fraction, budget) for fraction in sampling)]
    return max(point for point in points if point <= update)


def schedule(name, step, *, lr, total_steps, warmup_steps=0, min_lr=0.0, sampling=1, **own):
    """The learning rate of update `step`, a float64."""
    if step < warmup_steps:
        return float(Fraction(lr) * (step + 1) / warmup_steps)
    if name == "inverse_sqrt":  # Vaswani et al., NeurIPS 2017, at height lr
        update = step - warmup_steps
        f = math.sqrt(warmup_steps / (warmup_steps + update // sampling * sampling + 1))
        return min_lr + (lr - min_lr) * f
    if total_steps is None:
        return float(lr)
    update, budget = step - warmup_steps, total_steps - warmup_steps
    if update >= budget:
        progress = Fraction(1)
    else:
        progress = Fraction(sampled_update(update, budget, sampling), budget)
    return min_lr + (lr - min_lr) * PROFILES[name](progress, **own)


# Updates: (param, grad, state, options) -> (param, state), all float64. A new state is empty.


def sgd(
    param,
    grad,
    state,
    *,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    has_buffer=None,
):
    """Stochastic gradient descent; momentum as in Sutskever et al., ICML 2013, in torch's form.

    A momentum that moves has a buffer where it is 0 too.
    """
    grad = (-grad if maximize else grad) + weight_decay * param
    if not (momentum != 0 if has_buffer is None else has_buffer):
        return param - lr * grad, state
    if "momentum_buffer" in state:
        buffer = momentum * state["momentum_buffer"] + (1 - dampening) * grad
    else:
        buffer = grad
    direction = grad + momentum * buffer if nesterov else buffer
    return param - lr * direction, {"momentum_buffer": buffer}


def adam(
    param,
    grad,
    state,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    amsgrad=False,
    maximize=False,
    decoupled_weight_decay=False,
):
    """Kingma and Ba, arXiv 1412.6980, algorithm 1; amsgrad: Reddi, Kale and Kumar, ICLR 2018."""
    beta1, beta2 = betas
    zeros = torch.zeros_like(param)
    step = float(state.get("step", 0.0)) + 1
    grad = -grad if maximize else grad
    if decoupled_weight_decay:
        param = param - lr * weight_decay * param
    else:
        grad = grad + weight_decay * param
    exp_avg = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad
    exp_avg_sq = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2
    new_state = {"step": torch.tensor(step), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    second_moment = exp_avg_sq
    if amsgrad:
        second_moment = torch.maximum(state.get("max_exp_avg_sq", zeros), exp_avg_sq)
        new_state["max_exp_avg_sq"] = second_moment
    corrected1 = exp_avg / (1 - beta1**step)
    corrected2 = second_moment / (1 - beta2**step)
    return param - lr * corrected1 / (corrected2.sqrt() + eps), new_state


def adamw(param, grad, state, *, weight_decay=0.01, **options):
    """Loshchilov and Hutter, arXiv 1711.05101: the decay goes to the parameter directly."""
    options |= {"weight_decay": weight_decay, "decoupled_weight_decay": True}
    return adam(param, grad, state, **options)


def lion(param, grad, state, *, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
    """Chen et al., arXiv 2302.06675, algorithm 2."""
    beta1, beta2 = betas
    exp_avg = state.get("exp_avg", torch.zeros_like(param))
    grad = -grad if maximize else grad
    direction = beta1 * exp_avg + (1 - beta1) * grad
    new_state = {
        "step": torch.tensor(float(state.get("step", 0.0)) + 1),
        "exp_avg": beta2 * exp_avg + (1 - beta2) * grad,
    }
    return param - lr * (direction.sign() + weight_decay * param), new_state


def lamb(
    param,
    grad,
    state,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.01,
    bias_correction=True,
    always_adapt=True,
    maximize=False,
):
    """You et al., arXiv 1904.00962, algorithm 2; a ratio is 1 where a norm is 0."""
    beta1, beta2 = betas
    zeros = torch.zeros_like(param)
    step = float(state.get("step", 0.0)) + 1
    grad = -grad if maximize else grad
    exp_avg = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad
    exp_avg_sq = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2
    corrected1 = exp_avg / (1 - beta1**step) if bias_correction else exp_avg
    corrected2 = exp_avg_sq / (1 - beta2**step) if bias_correction else exp_avg_sq
    direction = corrected1 / (corrected2.sqrt() + eps) + weight_decay * param
    norms = [math.sqrt(math.fsum((x.flatten() ** 2).tolist())) for x in (param, direction)]
    is_adapted = (always_adapt or weight_decay != 0) and all(norm != 0 for norm in norms)
    ratio = norms[0] / norms[1] if is_adapted else 1.0
    new_state = {"step": torch.tensor(step), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return param - lr * ratio * direction, new_state


UPDATES = {"SGD": sgd, "Adam": adam, "AdamW": adamw, "Lion": lion, "LAMB": lamb}

# Storage: how numbers are read back from what an optimizer keeps. All results are float64.

BLOCK = 128  # elements that share a scale, in the order in which they lie in memory


def _floats_to_2(mantissa_bits):
    """In order, the floats from 2^-15 to 2 with so many bits of mantissa."""
    steps = 2**mantissa_bits
    floats = [(1 + m / steps) * 2.0**e for e in range(-15, 1) for m in range(steps)]
    return torch.tensor(floats, dtype=torch.float64)


# The multiples of the scale that codes stand for; the highest bit of a signed code is the sign.
SIGNED_MULTIPLES = _floats_to_2(3) - 2.0**-15
ROOT_MULTIPLES = _floats_to_2(4)


def block_scale(largest, is_root):
    """The smallest power of 2 of which a number is less than the largest multiple: float64."""
    multiple = (ROOT_MULTIPLES if is_root else SIGNED_MULTIPLES)[-1]
    return 2.0 ** torch.floor(torch.log2(largest / multiple) + 1.0)


def flat(tensor):
    """The elements in the order of memory."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))


def spread(scales, numel):
    """The scale of each element."""
    return scales.double().repeat_interleave(BLOCK)[:numel]


def block_numbers(codes, scales, is_root):
    """What block-quantised codes stand for: means of squares are kept as roots."""
    words = flat(codes).long()
    multiples = ROOT_MULTIPLES[words] if is_root else SIGNED_MULTIPLES[words % 128]
    sign = 1.0 if is_root else torch.where(words < 128, 1.0, -1.0).double()
    numbers = sign * multiples * spread(scales, words.numel())
    values = torch.empty_like(codes, dtype=torch.float64)
    flat(values).copy_(numbers**2 if is_root else numbers)
    return values


def joined(high, low):
    """The float32 of which a bfloat16 is the rounded high half, and an int16 the low half."""
    bits = flat(high).view(torch.int16).long() * 2**16 + flat(low).long()
    values = torch.empty_like(high, dtype=torch.float32)
    flat(values).view(torch.int32).copy_(bits)
    return values.double()


def kept_numbers(param, state):
    """A parameter and its states by name, from the arrays that an optimizer keeps."""
    param, state = param.detach().cpu(), {name: t.detach().cpu() for name, t in state.items()}
    low = state.pop("master_remainder", None)
    value = param.double() if low is None else joined(param, low)
    numbers = {}
    for name, array in state.items():
        if name.endswith("_scale"):
            continue
        scales = state.get(f"{name}_scale")
        is_root = name == "exp_avg_sq"
        plain = scales is None
        numbers[name] = array.double() if plain else block_numbers(array, scales, is_root)
    return value, numbers
