"""The norm of all gradients, and its limit, which the next step applies on its way."""

import math

import cases
import numpy as np
import pytest
import torch
from test_grad_scaling import backward, everything, make_params, make_scaler
from test_no_sync import no_sync
from test_optimizers import leaf
from test_storage import make

import lrs_ext

# Triton's interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning")
updates = pytest.mark.parametrize("row", cases.STORED_UPDATES, ids=str)
SGD = cases.UpdateRow("SGD", {}, 0.5)
SHAPES = [(5,), (0,), (3, 40), (), (1500,), (3, 0, 2)]


def set_gradients(params, k=0, size=1.0, skip=()):
    generator = torch.Generator().manual_seed(k)
    for index, param in enumerate(params):
        grad = size * torch.randn(param.shape, generator=generator)
        param.grad = None if index in skip else grad.to(param.device, param.dtype)


def mixed_params(backend):
    return [leaf(torch.randn(s), backend, d) for d in cases.DTYPES for s in SHAPES]


def exact_norm(params):
    squares = [p.grad.double().square().sum().item() for p in params if p.grad is not None]
    return math.sqrt(sum(squares))


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 10.0, 1e6, math.inf])
@pytest.mark.parametrize("skip", [(), (0, 4, 7)], ids=str)
def test_the_norm_is_that_of_all_gradients_which_stay(backend, skip, max_norm):
    params = mixed_params(backend)
    opt = make(SGD, params, backend)
    set_gradients(params, skip=skip)
    grads = [None if p.grad is None else p.grad.clone() for p in params]
    before = [param.detach().clone() for param in params]
    norm = lrs_ext.clip_grad_norm_(opt, max_norm)
    assert (norm.dtype, norm.shape, norm.device.type) == (torch.float32, (), backend.device)
    exact = exact_norm(params)
    assert norm.item() == pytest.approx(exact, rel=cases.STATE.rtol)
    opt.step()
    factor = min(1.0, max_norm / (exact + 1e-6))
    for param, old, grad in zip(params, before, grads, strict=True):
        if grad is None:
            assert torch.equal(param, old)
            continue
        assert torch.equal(param.grad, grad)
        wanted = old.double() - 0.5 * factor * grad.double()
        tolerance = cases.PARAM[param.dtype]
        close = {"rtol": 2 * tolerance.rtol, "atol": 2 * tolerance.atol}
        torch.testing.assert_close(param.detach().double(), wanted, **close)


@updates
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_it_is_torchs_clipping_and_a_step(backend, row, max_norm):
    params, others = (make_params(backend, cases.DTYPES[:1]) for _ in range(2))
    opt, plain = make(row, params, backend), make(row, others, backend)
    for k in range(3):
        set_gradients(params, k)
        set_gradients(others, k)
        norm = lrs_ext.clip_grad_norm_(opt, max_norm)
        theirs = torch.nn.utils.clip_grad_norm_(others, max_norm)
        torch.testing.assert_close(norm, theirs)
        opt.step()
        plain.step()
        for a, b in zip(everything(opt), everything(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=cases.TORCH.rtol, atol=cases.TORCH.atol)


@updates
@pytest.mark.parametrize("storage", cases.STORAGES[::4], ids=str)
def test_a_limit_that_is_not_reached_changes_nothing(backend, row, storage):
    opts = [make(row, make_params(backend), backend, storage) for _ in range(2)]
    for k in range(2):
        for opt in opts:
            set_gradients(opt.param_groups[0]["params"], k)
        lrs_ext.clip_grad_norm_(opts[0], 1e6)
        for opt in opts:
            opt.step()
    assert all(map(torch.equal, *(everything(opt) for opt in opts)))


def test_a_limit_holds_for_one_step(backend):
    param = leaf(torch.zeros(2), backend)
    opt = make(SGD, [param], backend)
    moves = []
    for clipped in (True, False, True, True, False):
        param.data.zero_()
        param.grad = torch.tensor([3.0, 4.0], device=backend.device)
        if clipped:
            lrs_ext.clip_grad_norm_(opt, 1.0)
        opt.step()
        moves.append(param.detach().norm().item())
    assert moves == pytest.approx([0.5, 2.5, 0.5, 0.5, 2.5], rel=1e-6)


def test_a_step_without_gradients_uses_up_a_limit(backend):
    param = leaf(torch.zeros(2), backend)
    opt = make(SGD, [param], backend)
    lrs_ext.clip_grad_norm_(opt, 0.1)
    opt.step()
    param.grad = torch.tensor([3.0, 4.0], device=backend.device)
    opt.step()
    assert param.detach().norm().item() == pytest.approx(2.5, rel=1e-6)


def test_the_last_of_several_limits_counts(backend):
    param = leaf(torch.zeros(2), backend)
    opt = make(SGD, [param], backend)
    param.grad = torch.tensor([3.0, 4.0], device=backend.device)
    lrs_ext.clip_grad_norm_(opt, 0.1)
    lrs_ext.clip_grad_norm_(opt, 2.0)
    opt.step()
    assert param.detach().norm().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_limit_may_be_a_tensor(backend, shape, dtype):
    param, scalar = leaf(torch.zeros(2), backend), leaf(torch.zeros(()), backend)
    opt = make(SGD, [param, scalar], backend)
    max_norm = torch.full(shape, 1.0, dtype=dtype, device=backend.device)
    param.grad = torch.tensor([3.0, 4.0], device=backend.device)
    scalar.grad = torch.zeros_like(scalar)
    lrs_ext.clip_grad_norm_(opt, max_norm)
    if dtype == torch.float32:
        max_norm.fill_(2.0)  # read by the step, as by the replay of a graph
    opt.step()
    moved = 1.0 if dtype == torch.float32 else 0.5
    assert param.detach().norm().item() == pytest.approx(moved, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_a_norm_that_is_not_finite_spreads_as_in_torch(backend, bad, max_norm):
    params, others = ([leaf(torch.ones(3), backend) for _ in range(2)] for _ in range(2))
    opt, plain = make(SGD, params, backend), make(SGD, others, backend)
    for group in (params, others):
        set_gradients(group)
        group[0].grad[1] = bad
    norm = lrs_ext.clip_grad_norm_(opt, max_norm)
    theirs = torch.nn.utils.clip_grad_norm_(others, max_norm)
    torch.testing.assert_close(norm, theirs, equal_nan=True)
    opt.step()
    plain.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, equal_nan=True)


def test_squares_neither_overflow_nor_vanish(backend):
    for size in (1e30, 1e-30):
        param = leaf(torch.zeros(2), backend)
        opt = make(SGD, [param], backend)
        param.grad = torch.tensor([3.0 * size, 4.0 * size], device=backend.device)
        assert lrs_ext.clip_grad_norm_(opt, 1.0).item() == pytest.approx(5 * size, rel=1e-6)


def test_only_parameters_with_gaps_may_have_gradients(backend):
    dense = leaf(torch.ones(3), backend)
    gaps = torch.ones(2, 4, device=backend.device)[:, ::2].requires_grad_()
    opt = make(SGD, [dense, gaps], backend)
    gaps.grad = torch.ones_like(gaps)
    assert lrs_ext.clip_grad_norm_(opt, 1.0).item() == 2.0
    opt.step()
    assert torch.equal(dense, torch.ones_like(dense))
    torch.testing.assert_close(gaps.detach(), torch.full_like(gaps, 0.75))
    assert opt.schedule_buffer.step.item() == 1


def test_without_gradients_the_norm_is_zero(backend):
    param = leaf(torch.ones(2), backend)
    opt = make(SGD, [param], backend)
    assert lrs_ext.clip_grad_norm_(opt, 1.0).item() == 0.0
    opt.step()
    param.grad = torch.ones_like(param)
    opt.step()
    assert param.tolist() == [0.5, 0.5]
    param.grad = torch.zeros_like(param)
    assert lrs_ext.clip_grad_norm_(opt, 1.0).item() == 0.0
    opt.step()
    assert param.tolist() == [0.5, 0.5]


# With a GradScaler.


@updates
@pytest.mark.parametrize("storage", cases.STORAGES[::4], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_the_limit_is_for_the_unscaled_gradients(backend, row, storage, max_norm):
    """For powers of two to the bit, with or without unscale_."""
    opts = [make(row, make_params(backend), backend, storage) for _ in range(3)]
    lazy, eager, plain = opts
    scalers = [make_scaler(backend), make_scaler(backend), None]
    for k, bad in enumerate([None, 1, None]):
        norms = []
        for opt, scaler in zip(opts, scalers, strict=True):
            if opt is plain and bad is not None:
                continue
            backward(opt.param_groups[0]["params"], scaler, k, bad)
            if opt is eager:
                scaler.unscale_(opt)
            norms.append(lrs_ext.clip_grad_norm_(opt, max_norm))
            if scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
        if bad is None:
            assert norms[0] == norms[1] * 2.0 ** (10 - (k > 1))
            assert norms[1] == norms[2]
        for opt in (lazy, eager):
            arrays = zip(everything(opt), everything(plain), strict=True)
            # 1e-6 beside the norm is where rounding may differ.
            assert all(torch.equal(a, b) for a, b in arrays)


@updates
def test_the_host_never_waits(backend, row):
    params = make_params(backend)
    opt = make(row, params, backend)
    max_norm = torch.tensor(0.5, device=backend.device)
    for k, limit in enumerate([1.0, max_norm, 0.1]):
        set_gradients(params, k, skip=[k])
        with no_sync(backend):
            lrs_ext.clip_grad_norm_(opt, limit)
            opt.step()
            opt.zero_grad()
    assert opt.schedule_buffer.step.item() == 3


def test_the_norm_is_the_same_for_every_number_of_threads():
    before = torch.get_num_threads()
    params = [torch.zeros(n, dtype=d) for n in (1, 70_001, 9000) for d in cases.DTYPES]
    opt = lrs_ext.SGD([param.requires_grad_() for param in params], lr=0.5)
    set_gradients(params)
    norms = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            norms += [lrs_ext.clip_grad_norm_(opt, 1.0).item() for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert len(set(norms)) == 1


# Errors.


@pytest.mark.parametrize(
    ("max_norm", "error", "message"),
    [
        (0.0, ValueError, "max_norm must be positive, got 0.0"),
        (-1.0, ValueError, "max_norm must be positive, got -1.0"),
        (math.nan, ValueError, "max_norm must be positive, got nan"),
        (torch.tensor(-1.0), ValueError, "max_norm must be positive, got -1.0"),
        (True, TypeError, "max_norm must be a number, got True"),
        ("1", TypeError, r"max_norm must be a number, got '1': convert it by float\(\)"),
        (None, TypeError, "max_norm must be a number, got None"),
        (torch.ones(2), ValueError, r"max_norm must have one element, got shape \(2,\)"),
    ],
)
def test_a_limit_that_is_none_is_refused(max_norm, error, message):
    param = torch.zeros(2, requires_grad=True)
    opt = lrs_ext.SGD([param], lr=1.0)
    param.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(error, match=message):
        lrs_ext.clip_grad_norm_(opt, max_norm)
    opt.step()
    assert param.tolist() == [-3.0, -4.0]


def test_a_limit_may_be_a_number_of_numpy():
    param = torch.zeros(2, requires_grad=True)
    opt = lrs_ext.SGD([param], lr=1.0)
    param.grad = torch.tensor([3.0, 4.0])
    lrs_ext.clip_grad_norm_(opt, np.float32(1.0))
    opt.step()
    assert param.tolist() == pytest.approx([-0.6, -0.8])


@pytest.mark.parametrize("kind", ["SGD", "list"])
def test_what_is_no_optimizer_of_ours_is_refused(kind):
    params = [torch.zeros(2, requires_grad=True)]
    given = params if kind == "list" else torch.optim.SGD(params, lr=0.1)
    with pytest.raises(TypeError, match=rf"got {kind}: use torch\.nn\.utils\.clip_grad_norm_"):
        lrs_ext.clip_grad_norm_(given, 1.0)


def test_a_gradient_that_does_not_fit_is_refused_as_by_the_step():
    param = torch.zeros(2, requires_grad=True)
    opt = lrs_ext.SGD([param], lr=0.1)
    param.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        lrs_ext.clip_grad_norm_(opt, 1.0)
