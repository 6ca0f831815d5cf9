"""The Triton backend, driven by hand-built tables: its numbers.

Without a GPU, Triton's interpreter runs the kernel on CPU tensors.
"""

import decimal
import itertools
import math

import pytest
import torch
from cases import DTYPES, EXACT, PARAM, STATE
from triton_tables import (
    CHUNK,
    DEVICE,
    EXPECTED,
    NUM_STATES,
    Array,
    Entry,
    Group,
    Launcher,
    lamb,
    random,
)

from lrs_ext import _C, triton_updates

triton = pytest.importorskip("triton")
tl = triton.language


def assert_close(actual, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = actual.cpu().double()
    torch.testing.assert_close(
        actual, expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True
    )


GROUPS = {
    "sgd": [
        Group(lrs=(0.02, 0.04), momentum=0.9, weight_decay=0.1),
        Group(lrs=(0.02,), momentum=0.8, dampening=0.5, maximize=True),
        Group(lrs=(0.02, 0.015, 0.01, 0.005), momentum=0.9, nesterov=True),
        Group(lrs=(0.02, 0.0), momentum=0.7, weight_decay=0.2, maximize=True),
    ],
    "adam": [
        Group(lrs=(0.02, 0.01), weight_decay=0.1, decoupled=True),
        Group(lrs=(0.005,), weight_decay=0.1, beta1=0.5, beta2=0.75, eps=1e-3),
        Group(lrs=(0.02, 0.01, 0.005, 0.001), maximize=True, beta1=0.0, beta2=0.0),
        Group(lrs=(0.04, 0.0), weight_decay=0.2, decoupled=True, maximize=True),
    ],
    "lion": [
        Group(lrs=(0.02, 0.01), weight_decay=0.1),
        Group(lrs=(0.005,), weight_decay=0.1, beta1=0.5, beta2=0.75),
        Group(lrs=(0.02, 0.01, 0.005, 0.001), maximize=True, beta1=0.0, beta2=0.0),
        Group(lrs=(0.04, 0.0), weight_decay=0.2, maximize=True),
    ],
    "lamb": [
        Group(lrs=(0.02, 0.01), weight_decay=0.1),
        Group(lrs=(0.005,), weight_decay=0.1, beta1=0.5, beta2=0.75, eps=1e-3),
        Group(lrs=(0.02, 0.01, 0.005, 0.001), maximize=True, bias_correction=False),
        Group(lrs=(0.04, 0.0), always_adapt=True, maximize=True),
    ],
}
# Empty, one element, a piece and a bit, several chunks with a tail of pieces and single elements.
NUMELS = (0, 1, 1025, 2 * CHUNK + 517)
UNALIGNED = (None, "param", "grad", "state")


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
    group = Group((0.1, 0.2), True, 0.1, 0.2, 0.3, True, 0.4, 0.5, 0.6, True, True, True)
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
    lr = (group.lr_values.data_ptr(), 2)
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
