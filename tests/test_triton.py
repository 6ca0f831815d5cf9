"""The Triton backend, driven by hand-built tables: its numbers, and what compilers make of it.

Without a GPU, Triton's interpreter runs the kernel on CPU tensors. Run as a script, this file
compiles the kernel ahead of time and prints a report: a process either interprets or compiles.
"""

import dataclasses
import decimal
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES, EXACT, HAS_GPU, PARAM, STATE

COMPILES = __name__ == "__main__"
if not HAS_GPU and not COMPILES:
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton")
tl = triton.language

from lrs_ext import _C, triton_kernels, triton_lamb, triton_norm, triton_updates  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
CHUNK = 2048


def assert_close(actual, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = actual.cpu().double()
    torch.testing.assert_close(
        actual, expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True
    )


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
    scale: float = 1.0
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
        return self.lr_values[min(step, len(self.lrs) - 1)].item() * self.scale

    def row(self, algorithm):
        columns = {
            "sgd": (self.momentum, self.dampening, self.nesterov, 0, 0),
            "adam": (self.beta1, self.beta2, self.eps, self.decoupled, 0),
            "lion": (self.beta1, self.beta2, 0, 0, 0),
            "lamb": (self.beta1, self.beta2, self.eps, self.bias_correction, self.always_adapt),
        }
        hyper = (self.weight_decay, self.maximize, *columns[algorithm])
        doubles = torch.tensor((self.scale, *hyper), dtype=torch.float64)
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
GROUPS = {
    "sgd": [
        Group(lrs=(0.02, 0.04), momentum=0.9, weight_decay=0.1),
        Group(lrs=(0.04,), scale=0.5, momentum=0.8, dampening=0.5, maximize=True),
        Group(lrs=(0.02, 0.015, 0.01, 0.005), momentum=0.9, nesterov=True),
        Group(lrs=(0.01, 0.0), scale=2.0, momentum=0.7, weight_decay=0.2, maximize=True),
    ],
    "adam": [
        Group(lrs=(0.02, 0.01), weight_decay=0.1, decoupled=True),
        Group(lrs=(0.01,), scale=0.5, weight_decay=0.1, beta1=0.5, beta2=0.75, eps=1e-3),
        Group(lrs=(0.02, 0.01, 0.005, 0.001), maximize=True, beta1=0.0, beta2=0.0),
        Group(lrs=(0.02, 0.0), scale=2.0, weight_decay=0.2, decoupled=True, maximize=True),
    ],
    "lion": [
        Group(lrs=(0.02, 0.01), weight_decay=0.1),
        Group(lrs=(0.01,), scale=0.5, weight_decay=0.1, beta1=0.5, beta2=0.75),
        Group(lrs=(0.02, 0.01, 0.005, 0.001), maximize=True, beta1=0.0, beta2=0.0),
        Group(lrs=(0.02, 0.0), scale=2.0, weight_decay=0.2, maximize=True),
    ],
    "lamb": [
        Group(lrs=(0.02, 0.01), weight_decay=0.1),
        Group(lrs=(0.01,), scale=0.5, weight_decay=0.1, beta1=0.5, beta2=0.75, eps=1e-3),
        Group(lrs=(0.02, 0.01, 0.005, 0.001), maximize=True, bias_correction=False),
        Group(lrs=(0.02, 0.0), scale=2.0, always_adapt=True, maximize=True),
    ],
}
# Empty, one element, a piece and a bit, several chunks with a tail of pieces and single elements.
NUMELS = (0, 1, 1025, 2 * CHUNK + 517)
UNALIGNED = (None, "param", "grad", "state")


def random(numel, dtype):
    """Values of the order of 1: tolerances do not reach to differences of nearly equal numbers."""
    return ((torch.rand(numel) + 0.5) * torch.randn(numel).sign()).to(dtype)


def matrix(algorithm):
    """Entries of every dtype, number of states, size and alignment, and the gradients' shifts."""
    torch.manual_seed(0)
    entries, grad_shifts = [], []
    axes = itertools.product(DTYPES, NUM_STATES[algorithm], NUMELS, UNALIGNED)
    for i, (dtype, num_states, numel, unaligned) in enumerate(axes):
        param = Array(random(numel, dtype), shift=unaligned == "param")
        states = [Array(torch.zeros(numel)) for _ in range(num_states)]
        if states and unaligned == "state":
            states[-1] = Array(torch.zeros(numel), shift=1)
        # One more than the number of groups goes round, so that each group meets every row.
        entries.append(Entry(param, states, group=i % 5 % 4))
        grad_shifts.append(unaligned == "grad")
    return entries, grad_shifts


@pytest.mark.parametrize("algorithm", NUM_STATES)
def test_one_launch_updates_all_tensors(algorithm):
    entries, grad_shifts = matrix(algorithm)
    launch = Launcher(algorithm, GROUPS[algorithm], entries)
    counts = [0.0] * len(entries)
    for step in range(3):
        grads, expected = [], []
        for i, (entry, shift) in enumerate(zip(entries, grad_shifts, strict=True)):
            param = entry.param.values.cpu()
            states = [state.values.cpu().double() for state in entry.states]
            grad = random(param.numel(), param.dtype)
            if (i + step) % 5 == 0:
                grads.append(None)
                expected.append((param.double(), states))
                continue
            group = launch.groups[entry.group].at(step)
            before = (param.double(), grad.double(), states, counts[i], group.lr(step), group)
            grads.append(Array(grad, shift))
            expected.append(EXPECTED[algorithm](*before))
            counts[i] += 1
        launch(grads)
        for entry, grad, (param, states) in zip(entries, grads, expected, strict=True):
            dtype = entry.param.values.dtype
            assert_close(entry.param.values, param, EXACT if grad is None else PARAM[dtype])
            for actual, state in zip(entry.states, states, strict=True):
                assert_close(actual.values, state, EXACT if grad is None else STATE)
            for array in (entry.param, *entry.states):
                array.assert_guards_intact()
        assert [entry.step.item() for entry in entries] == counts
        assert launch.step.item() == step + 1
        assert not launch.ticket.any()


def test_empty_tensors_are_counted():
    entries = [Entry(Array(torch.zeros(0)), []) for _ in range(300)]  # more than threads
    launch = Launcher("sgd", [Group()], entries)
    assert launch.tables["chunks"].shape == (0, 2)
    launch([Array(torch.zeros(0)) if i % 3 else None for i in range(300)])
    assert [entry.step.item() for entry in entries] == [float(i % 3 > 0) for i in range(300)]
    assert (launch.step.item(), launch.ticket.item()) == (1, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_beyond_32_bits(dtype):
    # The last chunk alone has memory, and is alone in the table.
    entry = Entry(Array(torch.zeros(1000, dtype=dtype)), [Array(torch.zeros(1000))], first=2**32)
    Launcher("sgd", [Group(lrs=(0.5,))], [entry])([Array(torch.ones(1000, dtype=dtype))])
    assert_close(entry.param.values, torch.full((1000,), -0.5), EXACT)
    assert_close(entry.states[0].values, torch.ones(1000), EXACT)


def test_amsgrad_keeps_nan():
    nan = math.nan
    states = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, nan], [nan, 9.0, 0.0, 9.0]])
    entry = Entry(Array(torch.zeros(4)), [Array(state) for state in states])
    Launcher("adam", [Group(beta2=0.5)], [entry])([Array(torch.full((4,), 2.0))])
    assert_close(entry.states[2].values, [nan, 9.0, 2.0, nan], EXACT)
    assert_close(entry.param.values.isnan(), [True, False, False, True], EXACT)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("algorithm", NUM_STATES)
def test_no_decay_of_infinite_parameters(algorithm):
    states = [Array(torch.zeros(1)) for _ in range(max(NUM_STATES[algorithm]))]
    entry = Entry(Array(torch.tensor([math.inf])), states)
    Launcher(algorithm, [Group()], [entry])([Array(torch.ones(1))])
    assert_close(entry.param.values, [math.inf], EXACT)
    assert all(state.values.isfinite().all() for state in states)


def test_the_sign_of_zero_is_zero_and_nan_stays():
    entry = Entry(Array(torch.ones(4)), [Array(torch.zeros(4))])
    Launcher("lion", [Group(lrs=(0.5,))], [entry])(
        [Array(torch.tensor([0.0, -0.0, 3.0, math.nan]))]
    )
    assert_close(entry.param.values, [1.0, 1.0, 0.5, math.nan], EXACT)


def test_norms_are_those_of_all_chunks_of_a_tensor_and_of_no_other():
    numels = [3000, 1, 2049, 0, 4096]  # more chunks than threads
    params = [random(numel, torch.float32) for numel in numels]
    entries = [Entry(Array(p), [Array(torch.zeros(len(p))) for _ in range(2)]) for p in params]
    launch = Launcher("lamb", [Group(always_adapt=True)], entries, chunk=16)
    grads = [random(numel, torch.float32) for numel in numels]
    grads[2] = None
    launch([None if grad is None else Array(grad) for grad in grads])
    for entry, param, grad in zip(entries, params, grads, strict=True):
        if grad is not None:
            zeros = [torch.zeros(len(param), dtype=torch.float64)] * 2
            param, _ = lamb(param.double(), grad.double(), zeros, 0.0, 0.1, launch.groups[0])
        assert_close(entry.param.values, param, PARAM[torch.float32])
    assert not launch.ticket.any()


@triton.jit
def power_kernel(values, exponent):
    tl.store(values, triton_updates.power(tl.load(values), tl.load(exponent)))


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10**6, 2**24])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999, 0.999999])
def test_bias_corrections_are_double(beta, step):
    value = torch.tensor(beta, dtype=torch.float64, device=DEVICE)
    power_kernel[(1,)](value, torch.tensor(float(step), dtype=torch.float64, device=DEVICE))
    with decimal.localcontext(decimal.Context(prec=60)):
        exact = 1 - decimal.Decimal(beta) ** step
    assert 1 - value.item() == pytest.approx(float(exact), rel=1e-9, abs=0)


@pytest.mark.parametrize("algorithm", NUM_STATES)
def test_groups_are_those_of_the_native_core(algorithm):
    group = Group((0.1, 0.2), 3.0, True, 0.1, 0.2, 0.3, True, 0.4, 0.5, 0.6, True, True, True)
    hyper = {"weight_decay": 0.1, "maximize": 1.0} | {
        "sgd": {"momentum": 0.2, "dampening": 0.3, "nesterov": 1.0},
        "adam": {"beta1": 0.4, "beta2": 0.5, "eps": 0.6, "decoupled_weight_decay": 1.0},
        "lion": {"beta1": 0.4, "beta2": 0.5},
        "lamb": {
            "beta1": 0.4,
            "beta2": 0.5,
            "eps": 0.6,
            "bias_correction": 1.0,
            "always_adapt": 1.0,
        },
    }[algorithm]
    row = torch.zeros(_C.group_bytes // 8, dtype=torch.int64)
    lr = (group.lr_values.data_ptr(), 2, group.scale)
    _C.write_group_cpu(row.data_ptr(), *lr, hyper)
    assert row.tolist() == group.row(algorithm)
    group.weight_decays, group.momenta = (0.1, 0.2), (0.3, 0.2, 0.1)
    del group.decay_values, group.momentum_values
    moving = {"weight_decay": (group.decay_values.data_ptr(), 2)}
    moving["momentum" if algorithm == "sgd" else "beta1"] = (group.momentum_values.data_ptr(), 3)
    _C.write_group_cpu(row.data_ptr(), *lr, hyper, moving)
    assert row.tolist() == group.row(algorithm)


@pytest.mark.parametrize("algorithm", NUM_STATES)
def test_numbers_that_move_are_read_at_the_step(algorithm):
    torch.manual_seed(0)
    own = [
        {"weight_decays": (0.3, 0.0, 0.1)},
        {"momenta": (0.5, 0.9), "weight_decay": 0.1},
        {"momenta": (0.0, 0.25, 0.5, 0.75), "weight_decays": (0.1, 0.2)},
        {"momenta": (0.9, 0.0), "maximize": True, "nesterov": True},
    ]
    groups = [Group(lrs=(0.02, 0.01), **options) for options in own]
    count = max(NUM_STATES[algorithm])
    entries = [
        Entry(Array(random(300, dtype)), [Array(torch.zeros(300)) for _ in range(count)], group)
        for dtype, group in itertools.product(DTYPES, range(len(groups)))
    ]
    launch = Launcher(algorithm, groups, entries)
    for step in range(5):
        grads, expected = [], []
        for entry in entries:
            param, group = entry.param.values.cpu(), groups[entry.group].at(step)
            grad = random(300, param.dtype)
            states = [state.values.cpu().double() for state in entry.states]
            before = (param.double(), grad.double(), states, step, group.lr(step), group)
            grads.append(Array(grad))
            expected.append(EXPECTED[algorithm](*before))
        launch(grads)
        for entry, (param, states) in zip(entries, expected, strict=True):
            assert_close(entry.param.values, param, PARAM[entry.param.values.dtype])
            for actual, state in zip(entry.states, states, strict=True):
                assert_close(actual.values, state, STATE)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    numel = 2**24 + 1  # more programs than run at once
    entry = Entry(Array(torch.zeros(numel)), [])
    launch = Launcher("sgd", [Group(lrs=(0.5, 0.25, 0.125))], [entry])
    grads = [Array(torch.ones(numel))]
    launch(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.again()
    graph.replay()
    graph.replay()
    assert_close(entry.param.values, torch.full((numel,), -0.875), EXACT)
    assert (entry.step.item(), launch.step.item(), launch.ticket.item()) == (3, 3, 0)


TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
REGISTERS = {"cuda": 64, "hip": 128}  # a thread, for 1,024 threads on each multiprocessor
# The kernels of each algorithm and their arguments: tables, scalings, counts, constants.
TABLES, COUNTS = ["*i64", "*i64", "*i32", "*i64", "*i64", "*i32"], ["i32", "i32"]
SCALINGS = ("loss_scale", "found_inf", "norm", "max_norm")
ARGUMENTS = [*TABLES, *["*fp32"] * 4, *COUNTS]
LAMB_ARGUMENTS = [*TABLES, "*fp64", *["*fp32"] * 4, *COUNTS]
NORM_ARGUMENTS = ["*i64", "*i32", "*i64", "*fp64", "*fp32", "*i32", "i32", "constexpr"]
LAMB_KERNELS = {
    "lamb moments": triton_lamb.moments_kernel,
    "lamb params": triton_lamb.params_kernel,
}
LAUNCHES = [*triton_kernels.ALGORITHMS, *LAMB_KERNELS]
# Loads and stores of 128 bits in the aligned paths, float32 plus two 16-bit types, for the fewest
# plus the most states. SGD moves two lanes a piece; beside states, 16-bit lanes are 64 bits wide.
WIDE_ACCESSES = {
    "sgd": (2 * (2 + 3) + 2 * 2 * (2 + 1), 2 * (1 + 2) + 2 * 2 * (1 + 1)),
    "adam": ((4 + 5) + 2 * (2 + 3), (3 + 4) + 2 * (2 + 3)),
    "lion": (2 * 3 + 2 * 2, 2 * 2 + 2 * 2),
    "lamb moments": (4 + 2 * 2, 2 + 2 * 2),
    "lamb params": (3 + 2 * 2, 1),
}


def compile_step(algorithm, target, storage=("float32", "nearest"), scaled=False, **options):
    state_type, param_kind = storage
    constants = (
        *(CHUNK, *triton_kernels.ALGORITHMS[algorithm]),
        triton_kernels.STATE_TYPES[state_type],
        triton_kernels.PARAM_KINDS[param_kind],
        True,
    )
    kernel = triton_kernels.step_kernel
    return compile_launch(kernel, target, ARGUMENTS, constants, scaled, **options)


def compile_launch(kernel, target, arguments, constants, scaled=False, **options):
    names = kernel.arg_names
    arguments = [*arguments, *["constexpr"] * len(constants)]
    constexprs = dict(zip(names[-len(constants) :], constants, strict=True))
    signature = dict(zip(names, arguments, strict=True))
    for name in () if scaled else SCALINGS:
        signature[name], constexprs[name] = "constexpr", None
    return compile_kernel(kernel, target, signature, constexprs, **options)


def compile_norm(target):
    kernel = triton_norm.norm_kernel
    signature = dict(zip(kernel.arg_names, NORM_ARGUMENTS, strict=True))
    return compile_kernel(kernel, target, signature, {"CHUNK": CHUNK})


def compile_kernel(kernel, target, signature, constexprs, **options):
    """Compiles ahead of time and describes the result."""
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constexprs)
    gpu = triton.backends.compiler.GPUTarget(*TARGETS[target])
    options["num_warps"] = triton_kernels.THREADS.value // gpu.warp_size
    options["enable_fp_fusion"] = False
    stages = triton.compile(source, target=gpu, options=options).asm
    assembly = stages.get("ptx") or stages["amdgcn"]
    registers, stack = resources(stages)
    return {
        "registers": registers,
        "stack": stack,  # bytes a thread; spilled registers are on the stack
        "wide_loads": len(re.findall(r"ld\.global\.v4\.b32|buffer_load_dwordx4", assembly)),
        "wide_stores": len(re.findall(r"st\.global\.v4\.b32|buffer_store_dwordx4", assembly)),
        "exchanges": stages["ttgir"].count("convert_layout"),
    }


def resources(stages):
    if "amdgcn" in stages:
        fields = (r"\.vgpr_count: +(\d+)", r"\.private_segment_fixed_size: +(\d+)")
        return [int(re.search(field, stages["amdgcn"])[1]) for field in fields]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(stages["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"Function \w+_kernel:\s+REG:(\d+) STACK:(\d+)", usage)
    return [int(number) for number in found.groups()]


# How states and bfloat16 parameters are kept beside float32 and rounded to nearest.
STORAGES = [
    ("float32", "split"),
    ("bfloat16", "stochastic"),
    ("block8", "split"),
    ("block8", "stochastic"),
]
STORAGE_KERNELS = [*((name, "sm_90") for name in triton_kernels.ALGORITHMS), ("adam", "gfx942")]
# Beside compressed states the conversions take registers: for 768 threads on each multiprocessor,
# and for 512 where blocks are encoded.
STORAGE_REGISTERS = {"float32": 80, "bfloat16": 80, "block8": 128}


def compile_all():
    rows = itertools.product(triton_kernels.ALGORITHMS, TARGETS)
    report = {f"{name}-{target}": compile_step(name, target) for name, target in rows}
    for (name, kernel), target in itertools.product(LAMB_KERNELS.items(), TARGETS):
        compiled = compile_launch(kernel, target, LAMB_ARGUMENTS, (CHUNK, True))
        report[f"{name}-{target}"] = compiled
    for (name, target), storage in itertools.product(STORAGE_KERNELS, STORAGES):
        kind = "-".join(storage)
        report[f"{name}-{target}-{kind}"] = compile_step(name, target, storage)
    for target in ("sm_90", "gfx942"):
        report[f"scaled-{target}"] = compile_step("adam", target, scaled=True)
        report[f"norm-{target}"] = compile_norm(target)
    report["starved"] = compile_step("adam", "sm_90", maxnreg=24)
    return report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `compile_all` returns in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, __file__]
    return json.loads(subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE).stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_compiles_to_wide_accesses_without_spills(report, launch, target):
    kernel = report[f"{launch}-{target}"]
    assert kernel["stack"] == 0
    assert kernel["registers"] <= REGISTERS[TARGETS[target][0]]
    assert (kernel["wide_loads"], kernel["wide_stores"]) == WIDE_ACCESSES[launch]
    assert kernel["exchanges"] == 0  # between threads, through shared memory


@pytest.mark.parametrize("storage", STORAGES, ids="-".join)
@pytest.mark.parametrize(("algorithm", "target"), STORAGE_KERNELS)
def test_every_storage_compiles_without_spills(report, algorithm, target, storage):
    kernel = report[f"{algorithm}-{target}-{'-'.join(storage)}"]
    assert kernel["stack"] == 0
    assert kernel["registers"] <= max(STORAGE_REGISTERS[storage[0]], REGISTERS[TARGETS[target][0]])


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", ["scaled", "norm"])
def test_scaled_steps_and_norms_compile_without_spills(report, kernel, target):
    found = report[f"{kernel}-{target}"]
    assert found["stack"] == 0
    assert found["registers"] <= REGISTERS[TARGETS[target][0]]
    if kernel == "scaled":
        assert (found["wide_loads"], found["wide_stores"]) == WIDE_ACCESSES["adam"]


def test_spills_are_seen(report):
    assert report["starved"]["registers"] == 24
    assert report["starved"]["stack"] > 0


if COMPILES:
    print(json.dumps(compile_all()))
