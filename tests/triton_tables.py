"""What drives the Triton kernels by hand: arrays, groups, tables, and what a step should give."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES, HAS_GPU

pytest.importorskip("triton")

from lrs_ext import triton_kernels, triton_lamb

DEVICE = "cuda" if HAS_GPU else "cpu"
CHUNK = 2048


class Array:
    """Values in memory that starts `shift` elements after a multiple of 16 bytes."""

    def __init__(self, values, shift=0):
        self.guard = 16 + shift
        self.base = torch.full((values.numel() + 2 * self.guard,), 7.0, dtype=values.dtype)
        self.base[self.guard : self.guard + values.numel()] = values
        self.base = self.base.to(DEVICE)
        self.values = self.base[self.guard : self.guard + values.numel()]

    def assert_guards_intact(self):
        assert self.base[: self.guard].eq(7.0).all()
        assert self.base[self.base.numel() - self.guard :].eq(7.0).all()


@dataclass
class Entry:
    param: Array
    states: list[Array]
    group: int = 0
    count: float = 0.0  # updates before the first step
    first: int = 0  # element of the tensor that memory starts with

    def __post_init__(self):
        self.step = torch.tensor(self.count, device=DEVICE)

    def row(self):
        arrays = [self.address(array) for array in (self.param, *self.states)]
        arrays += [0] * (8 - len(arrays))  # neither scales nor a remainder
        code = DTYPES.index(self.param.values.dtype)
        position = 0  # for random bits
        return [*arrays, self.step.data_ptr(), self.numel(), self.group, code, position]

    def numel(self):
        return self.first + self.param.values.numel()

    def address(self, array):
        values = array.values
        return values.data_ptr() - self.first * values.element_size() if values.numel() else 0

    def chunks(self, chunk):
        return range(self.first // chunk, math.ceil(self.numel() / chunk))


@dataclass
class Group:
    """Options as torch.optim names them; beta1 and beta2 apart.

    Where there are `weight_decays` or `momenta`, one a step, they are in the place of weight_decay
    and of momentum or beta1.
    """

    lrs: tuple[float, ...] = (0.1,)
    maximize: bool = False
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decoupled: bool = False
    bias_correction: bool = True
    always_adapt: bool = False
    weight_decays: tuple[float, ...] = ()
    momenta: tuple[float, ...] = ()

    @functools.cached_property
    def lr_values(self):
        return torch.tensor(self.lrs, device=DEVICE)

    @functools.cached_property
    def decay_values(self):
        return torch.tensor(self.weight_decays, device=DEVICE)

    @functools.cached_property
    def momentum_values(self):
        return torch.tensor(self.momenta, device=DEVICE)

    def at(self, step):
        """The group with the numbers of a step."""
        numbers = {}
        if self.weight_decays:
            numbers["weight_decay"] = self.decay_values[min(step, len(self.weight_decays) - 1)]
        if self.momenta:
            momentum = self.momentum_values[min(step, len(self.momenta) - 1)]
            numbers |= {"momentum": momentum, "beta1": momentum}
        return dataclasses.replace(self, **{name: n.item() for name, n in numbers.items()})

    def lr(self, step):
        return self.lr_values[min(step, len(self.lrs) - 1)].item()

    def row(self, algorithm):
        columns = {
            "sgd": (self.momentum, self.dampening, self.nesterov, 0, 0),
            "adam": (self.beta1, self.beta2, self.eps, self.decoupled, 0),
            "lion": (self.beta1, self.beta2, 0, 0, 0),
            "lamb": (self.beta1, self.beta2, self.eps, self.bias_correction, self.always_adapt),
        }
        hyper = (self.weight_decay, self.maximize, *columns[algorithm])
        doubles = torch.tensor(hyper, dtype=torch.float64)
        moving = []
        for values in (self.decay_values, self.momentum_values):
            moving += [values.data_ptr() if len(values) else 0, len(values)]
        first = [self.lr_values.data_ptr(), len(self.lrs)]
        return [*first, *doubles.view(torch.int64).tolist(), *moving]


class Launcher:
    """The tables of a step; a call takes a gradient or None for each entry, and launches."""

    def __init__(self, algorithm, groups, entries, chunk=CHUNK):
        self.algorithm, self.groups, self.entries = algorithm, groups, entries
        chunks = [(i, index) for i, entry in enumerate(entries) for index in entry.chunks(chunk)]
        self.step = self.table(0)
        is_lamb = algorithm == "lamb"
        self.ticket = self.table([0] * (1 + is_lamb * len(entries))).to(torch.int32)
        self.tables = {
            "tensors": self.table([entry.row() for entry in entries]),
            "groups": self.table([group.row(algorithm) for group in groups]),
            "chunks": self.table(chunks).reshape(-1, 2).to(torch.int32),
            "step": self.step,
            "ticket": self.ticket,
            "scaling": (None,) * 4,
            "chunk_elements": chunk,
        }
        if is_lamb:
            count = len(chunks) + len(entries)
            squares = torch.full((count, 2), math.nan, dtype=torch.float64, device=DEVICE)
            self.tables["squares"] = squares

    def table(self, rows):
        return torch.tensor(rows, dtype=torch.int64, device=DEVICE)

    def __call__(self, grads):
        pairs = zip(self.entries, grads, strict=True)
        # An empty gradient has no address, but it is a gradient.
        addresses = [0 if g is None else entry.address(g) or 16 for entry, g in pairs]
        self.tables["gradients"] = self.table(addresses)
        self.again()

    def again(self):
        if self.algorithm == "lamb":
            triton_lamb.step(**self.tables)
        else:
            triton_kernels.step(self.algorithm, **self.tables)


def sgd(param, grad, states, count, lr, group):
    grad = (-grad if group.maximize else grad) + group.weight_decay * param
    if not states:
        return param - lr * grad, []
    buffer = group.momentum * states[0] + (1 - group.dampening) * grad if count > 0 else grad
    direction = grad + group.momentum * buffer if group.nesterov else buffer
    return param - lr * direction, [buffer]


def adam(param, grad, states, count, lr, group):
    grad = -grad if group.maximize else grad
    if group.decoupled:
        param = param * (1 - lr * group.weight_decay)
    else:
        grad = grad + group.weight_decay * param
    exp_avg = group.beta1 * states[0] + (1 - group.beta1) * grad
    exp_avg_sq = group.beta2 * states[1] + (1 - group.beta2) * grad**2
    new_states = [exp_avg, exp_avg_sq]
    if len(states) == 3:
        new_states.append(torch.maximum(states[2], exp_avg_sq))
    corrected1 = exp_avg / (1 - group.beta1 ** (count + 1))
    corrected2 = new_states[-1] / (1 - group.beta2 ** (count + 1))
    return param - lr * corrected1 / (corrected2.sqrt() + group.eps), new_states


def lion(param, grad, states, count, lr, group):
    grad = -grad if group.maximize else grad
    direction = group.beta1 * states[0] + (1 - group.beta1) * grad
    exp_avg = group.beta2 * states[0] + (1 - group.beta2) * grad
    return param * (1 - lr * group.weight_decay) - lr * direction.sign(), [exp_avg]


def lamb(param, grad, states, count, lr, group):
    grad = -grad if group.maximize else grad
    exp_avg = group.beta1 * states[0] + (1 - group.beta1) * grad
    exp_avg_sq = group.beta2 * states[1] + (1 - group.beta2) * grad**2
    corrected1, corrected2 = exp_avg, exp_avg_sq
    if group.bias_correction:
        corrected1 = exp_avg / (1 - group.beta1 ** (count + 1))
        corrected2 = exp_avg_sq / (1 - group.beta2 ** (count + 1))
    direction = corrected1 / (corrected2.sqrt() + group.eps) + group.weight_decay * param
    ratio = 1.0
    if group.always_adapt or group.weight_decay:
        ratio = param.norm() / direction.norm()
    return param - lr * ratio * direction, [exp_avg, exp_avg_sq]


EXPECTED = {"sgd": sgd, "adam": adam, "lion": lion, "lamb": lamb}
NUM_STATES = {"sgd": (0, 1), "adam": (2, 3), "lion": (1,), "lamb": (2,)}


def random(numel, dtype):
    """Values of the order of 1: tolerances do not reach to differences of nearly equal numbers."""
    return ((torch.rand(numel) + 0.5) * torch.randn(numel).sign()).to(dtype)
