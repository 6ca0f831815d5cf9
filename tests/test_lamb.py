"""What only LAMB has: norms over whole tensors, in two passes.

Its numbers are compared with the oracle by the matrix of `test_optimizers.py`.
"""

import math

import cases
import pytest
import torch

import lrs_ext

CHUNK = 8192  # the longest of the CPU backend; those of a GPU are shorter or longer
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


def leaves(tensors, backend, dtype=torch.float32):
    return [t.to(backend.device, dtype).requires_grad_() for t in tensors]


def randn(*numels):
    return [torch.randn(numel) for numel in numels]


def step(params, grads, backend, **options):
    opt = lrs_ext.LAMB(params, backend=backend.name, **options)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(param.device, param.dtype)
    opt.step()
    return opt


def assert_close(actual, expected, dtype=torch.float32):
    tolerance = cases.PARAM[dtype]
    close = {"rtol": tolerance.rtol, "atol": tolerance.atol, "equal_nan": True}
    torch.testing.assert_close(actual.detach().cpu(), torch.as_tensor(expected), **close)


def test_a_step_is_as_long_as_lr_times_the_parameters(backend):
    """Each tensor for itself, whatever the gradient."""
    numels = [1, 7, 300, 2 * CHUNK + 5] if not backend.interpreted else [1, 7, 2100]
    before = randn(*numels)
    grads = [g * 10.0**i for i, g in enumerate(randn(*numels))]
    params = leaves([b.clone() for b in before], backend)
    step(params, grads, backend, lr=0.01, weight_decay=0.1)
    for param, start in zip(params, before, strict=True):
        moved = (param.detach().cpu().double() - start.double()).norm() / start.double().norm()
        assert moved.item() == pytest.approx(0.01, rel=1e-4)


def test_the_ratio_is_one_where_a_norm_is_zero(backend):
    zero, ones = torch.zeros(3), torch.ones(3)
    params = leaves([zero.clone(), ones.clone(), zero.clone()], backend)
    step(params, [2 * ones, zero, zero], backend, lr=0.5, weight_decay=0.0)
    assert_close(params[0], -0.5 * ones / (1.0 + 0.5e-6))
    assert_close(params[1], ones)
    assert_close(params[2], zero)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("always_adapt", [False, True])
def test_groups_without_decay_are_adapted_if_always(backend, always_adapt, weight_decay):
    params = leaves([torch.full((4,), 3.0)], backend)
    options = {"weight_decay": weight_decay, "always_adapt": always_adapt}
    step(params, [torch.ones(4)], backend, lr=0.01, **options)
    ratio = 3.0 / (1.0 + 3.0 * weight_decay) if always_adapt or weight_decay else 1.0
    assert_close(params[0], torch.full((4,), 3.0 - 0.01 * ratio * (1.0 + 3.0 * weight_decay)))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20, 1e30])
def test_norms_neither_overflow_nor_vanish(backend, magnitude):
    """The square of each parameter here is infinite or 0 in float32."""
    start = torch.linspace(1.0, 2.0, 100) * magnitude
    params = leaves([start.clone()], backend)
    step(params, [torch.ones(100)], backend, lr=0.01, weight_decay=0.0)
    change = 0.01 * start.double().norm() / math.sqrt(100)
    expected = (start.double() - change).float()
    torch.testing.assert_close(params[0].detach().cpu(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_spoils_its_tensor_and_no_other(backend, value):
    params = leaves(randn(50, 50), backend)
    grads = randn(50, 50)
    grads[0][17] = value
    step(params, grads, backend, lr=0.01)
    assert params[0].isnan().all()
    assert params[1].isfinite().all()


def run(tensors, gradients, backend, dtype, copies=1):
    params = leaves([t.clone() for _ in range(copies) for t in tensors], backend, dtype)
    opt = lrs_ext.LAMB(params, lr=0.02, weight_decay=0.1, backend=backend.name)
    for grads in gradients:
        for param, grad in zip(params, grads * copies, strict=True):
            param.grad = grad.to(param.device, dtype)
        opt.step()
    return params, [opt.state[param]["exp_avg_sq"] for param in params]


@dtypes
def test_a_tensor_gets_the_same_bits_in_every_run_and_beside_any_others(backend, dtype):
    numels = [2100, 5] if backend.interpreted else [3 * CHUNK + 11, 20 * CHUNK, 5]
    tensors = randn(*numels)
    gradients = [randn(*numels) for _ in range(2)]
    expected = run(tensors, gradients, backend, dtype)
    repeated = run(tensors, gradients, backend, dtype, copies=2)
    for arrays, others in zip(expected, repeated, strict=True):
        for i, array in enumerate(others):
            assert torch.equal(array, arrays[i % len(numels)])


@dtypes
def test_the_number_of_threads_changes_no_bit(dtype):
    backend = cases.Backend("cpu", "cpu")
    numels = [5 * CHUNK + 3, 100, 30 * CHUNK, 1]
    tensors, gradients = randn(*numels), [randn(*numels) for _ in range(3)]
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            params, states = run(tensors, gradients, backend, dtype)
            runs.append([*params, *states])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@dtypes
def test_a_tensor_gets_the_same_bits_at_any_address(dtype):
    """The order of the sums depends on the position in the tensor, not on alignment."""
    backend, numel = cases.Backend("cpu", "cpu"), 2 * CHUNK + 77
    tensor, grad = torch.randn(numel), torch.randn(numel)
    results = []
    for shift in range(5):
        base = torch.empty(numel + shift, dtype=dtype)
        param = base[shift:].copy_(tensor).requires_grad_()
        step([param], [grad], backend, lr=0.02)
        results.append(param.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_its_memory_between_the_passes_is_reused(backend):
    if backend.name == "reference":
        pytest.skip("it has no table to keep")
    params = leaves(randn(7, 300), backend)
    opt = step(params, randn(7, 300), backend)
    table = opt._preparation.tables.all[0].table
    squares = table._squares
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        opt.step()
    assert opt._preparation.tables.all[0].table is table
    assert table._squares is squares


@pytest.mark.gpu
def test_norms_of_many_chunks_on_a_gpu():
    """More chunks than a block has threads, and their sums against those of the CPU."""
    tensor, grad = torch.randn(9_000_001), torch.randn(9_000_001)
    results = []
    for name, device in (("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda")):
        params = leaves([tensor.clone()], cases.Backend(name, device))
        step(params, [grad], cases.Backend(name, device), lr=0.02)
        results.append(params[0].detach().cpu())
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


class OtherParts:
    """Stands for ranks whose parts make every parameter's norm twice as long."""

    groups = ("other ranks",)

    def sum_(self, squares):
        squares[:, 0].mul_(4.0)


@pytest.mark.parametrize("overflows", [False, True])
def test_norms_of_parts_are_completed_between_the_passes(backend, overflows):
    """Twice the norm is twice the learning rate, to the bit; the reference has it by its ranks."""
    if backend.name == "reference":
        pytest.skip("its sums are exchanged tensor by tensor")
    before = randn(5, 0, 300, 2 * CHUNK + 5 if not backend.interpreted else 2100)
    params, others = (leaves([b.clone() for b in before], backend) for _ in range(2))
    opts = [
        lrs_ext.LAMB(p, lr=lr, weight_decay=0.1, backend=backend.name)
        for p, lr in ((params, 0.01), (others, 0.02))
    ]
    for k in range(3):
        torch.manual_seed(k)
        for param, other, grad in zip(params, others, randn(*map(len, before)), strict=True):
            param.grad, other.grad = (grad.to(backend.device) for _ in range(2))
        opts[0]._steps.launches(opts[0], False)[0][0].spread = OtherParts()
        for opt in opts:
            if overflows and k == 1:
                opt.found_inf = torch.ones((), device=backend.device)
            opt.step()
            opt.found_inf = None
        for param, other in zip(params, others, strict=True):
            assert torch.equal(param, other)
    assert opts[0].schedule_buffer.step.item() == (2 if overflows else 3)
