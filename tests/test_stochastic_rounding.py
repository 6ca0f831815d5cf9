"""Rounding at random: right on average, independent, repeatable, and slow averages move."""

import math

import cases
import pytest
import reference
import torch
from test_optimizers import leaf
from test_storage import arrays_of

import lrs_ext

# Triton's interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning")

STANDARD_ERRORS = 4
FRACTION = 77 / 256  # of a rounding step
OFFSET = 2.0**-15  # by which the codes of signed numbers lie below floats of few bits


def numel_for(backend):
    return 2_000 if backend.interpreted else 40_000


def assert_mean(bits, probability):
    """The mean of independent 0s and 1s."""
    standard_error = math.sqrt(probability * (1 - probability) / bits.numel())
    assert abs(bits.double().mean().item() - probability) < STANDARD_ERRORS * standard_error


def rounded_up(number, low, high):
    assert ((number == low) | (number == high)).all()
    return number == high


def parameter_draws(backend, steps, tensors=1, fraction=0.5, numel=None):
    """Whether each parameter of 1 was rounded up, moved by a fraction of a step: (steps, ...)."""
    numel = numel or numel_for(backend)
    params = [leaf(torch.ones(numel), backend, torch.bfloat16) for _ in range(tensors)]
    opt = lrs_ext.SGD(params, lr=1.0, backend=backend.name, stochastic_rounding=True)
    draws = []
    for _ in range(steps):
        for param in params:
            param.data.fill_(1.0)
            param.grad = torch.full_like(param, -fraction * 2.0**-7)
        opt.step()
        draws.append(torch.stack([rounded_up(p.detach(), 1.0, 1 + 2**-7) for p in params]).cpu())
    return torch.stack(draws)


@pytest.mark.parametrize("fraction", [2.0**-6, 0.25, FRACTION, 0.5, 0.875, 0.984375])
def test_parameters_are_right_on_average(backend, fraction):
    assert_mean(parameter_draws(backend, 5, fraction=fraction), fraction)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_states_are_right_on_average(backend, dtype, sign):
    """Adam with betas of 0 keeps the gradient and its square."""
    param = leaf(torch.zeros(numel_for(backend)), backend)
    options = {"lr": 0.5, "betas": (0.0, 0.0), "state_dtype": dtype}
    opt = lrs_ext.Adam([param], backend=backend.name, **options)
    steps = 128 if dtype == torch.bfloat16 else 8  # from 1/2 to 1
    low = 0.5 if dtype == torch.bfloat16 else 0.5 - OFFSET
    number = low + FRACTION * 0.5 / steps
    grad = torch.full_like(param, sign * number)
    grad[::128] = 1.0
    is_largest = torch.arange(param.numel()) % 128 == 0
    ups, root_ups = [], []
    for _ in range(5):
        param.grad = grad.clone()
        opt.step()
        _, numbers = reference.kept_numbers(param, opt.state[param])
        exp_avg = sign * numbers["exp_avg"][~is_largest]
        ups.append(rounded_up(exp_avg, low, low + 0.5 / steps))
        if dtype == torch.uint8:
            roots = numbers["exp_avg_sq"][~is_largest].sqrt()
            root_ups.append(rounded_up(roots, 0.5, 0.5 * (1 + 1 / 16)))
    assert_mean(torch.cat(ups), FRACTION)
    if root_ups:
        assert_mean(torch.cat(root_ups), 2 * FRACTION - 32 * OFFSET)


def assert_uncorrelated(first, second):
    product = (2.0 * first.double() - 1) * (2.0 * second.double() - 1)
    assert abs(product.mean().item()) < STANDARD_ERRORS / math.sqrt(product.numel())


def test_draws_of_steps_tensors_and_elements_are_independent(backend):
    draws = parameter_draws(backend, 6, tensors=4)
    assert_mean(draws, 0.5)
    for distance in (1, 2, 3):
        assert_uncorrelated(draws[distance:], draws[:-distance])
        assert_uncorrelated(draws[:, distance:], draws[:, :-distance])
    for distance in (1, 2, 7, 32, 128, 1024):
        assert_uncorrelated(draws[..., distance:], draws[..., :-distance])
    assert_uncorrelated(draws[1:, 1:, 1:], draws[:-1, :-1, :-1])
    assert_uncorrelated(draws[1:, :-1], draws[:-1, 1:])


def test_a_parameter_and_its_states_take_the_same_draw_and_are_right_on_average(backend):
    """The moments are the gradient and its square, the parameter moves by half a step."""
    fractions = [0.5, 0.25 + 16 * OFFSET, 0.5]  # of the steps of parameter, gradient and root
    param = leaf(torch.ones(numel_for(backend)), backend, torch.bfloat16)
    options = {"betas": (0.0, 0.0), "state_dtype": torch.uint8, "stochastic_rounding": True}
    opt = lrs_ext.Adam([param], lr=2.0**-8, eps=0.0, backend=backend.name, **options)
    low = 0.5 - OFFSET
    draws = []
    for _ in range(5):
        param.data.fill_(1.0)
        param.grad = torch.full_like(param, -0.5 * (1 + 0.25 / 8))
        param.grad[::128] = 1.0
        opt.step()
        value, numbers = reference.kept_numbers(param, opt.state[param])
        others = torch.arange(param.numel()) % 128 != 0
        ups = [
            rounded_up(value[others], 1.0, 1 + 2**-7),
            rounded_up(-numbers["exp_avg"][others], low, low + 0.5 / 8),
            rounded_up(numbers["exp_avg_sq"][others].sqrt(), 0.5, 0.5 * (1 + 1 / 16)),
        ]
        draws.append(torch.stack(ups))
    draws = torch.stack(draws)
    for index, fraction in enumerate(fractions):
        assert_mean(draws[:, index], fraction)
    assert not (draws[:, 1] & ~draws[:, 0]).any()
    assert torch.equal(draws[:, 0], draws[:, 2])


# Repeatable.

ROUNDED = [row for row in cases.STORAGES if row != cases.STORAGES[0] and not row.master_weights]


def final_arrays(sizes, row, threads=1):
    """What three updates of AdamW leave of the first tensor; the others come behind it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params = []
        for index, size in enumerate(sizes):
            generator = torch.Generator().manual_seed(index)
            param = torch.randn(size, generator=generator).bfloat16().requires_grad_()
            param.grad = torch.randn(size, generator=generator).bfloat16()
            params.append(param)
        opt = lrs_ext.AdamW(params, lr=0.01, **row.options)
        for _ in range(3):
            opt.step()
        return [params[0].detach(), *opt.state[params[0]].values()]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("row", ROUNDED, ids=str)
def test_draws_depend_neither_on_threads_nor_on_tensors_behind(row):
    expected = final_arrays([70_001], row)
    for other in (
        final_arrays([70_001], row),
        final_arrays([70_001], row, threads=2),
        final_arrays([70_001, 5, 40_000], row),
        final_arrays([70_001, 5, 40_000], row, threads=3),
    ):
        assert all(map(torch.equal, expected, other))


def test_draws_depend_on_the_step_not_on_the_optimizer(backend):
    """A run that starts at a later step draws what the first one drew there."""
    numel = 500
    draws = parameter_draws(backend, 4, numel=numel)
    param = leaf(torch.ones(numel), backend, torch.bfloat16)
    opt = lrs_ext.SGD([param], lr=1.0, backend=backend.name, stochastic_rounding=True)
    opt.schedule_buffer.step.fill_(2)
    param.grad = torch.full_like(param, -0.5 * 2.0**-7)
    opt.step()
    assert torch.equal(draws[2, 0], param.detach().cpu() == 1 + 2**-7)
    assert not torch.equal(draws[1, 0], draws[2, 0])


# Slow averages, which would stand still if they were rounded to nearest.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_a_second_moment_decays_under_zero_gradients(backend, dtype):
    if backend.interpreted or backend.name == "reference":
        pytest.skip("takes hundreds of steps")
    param = leaf(torch.zeros(128 * 64), backend)
    opt = lrs_ext.AdamW([param], lr=0.0, backend=backend.name, state_dtype=dtype)
    grad = 0.5 + 0.5 * torch.rand(param.numel())
    steps, beta2 = 500, 0.999
    is_largest = torch.arange(param.numel()) % 128 == 0
    grad[is_largest] = 1.0
    param.grad = grad.to(backend.device)
    opt.step()
    param.grad = torch.where(is_largest.to(backend.device), 1.0, 0.0)
    for _ in range(steps):
        opt.step()
    _, numbers = reference.kept_numbers(param, opt.state[param])
    exact = (1 - beta2) * grad.double() ** 2 * beta2**steps
    found = numbers["exp_avg_sq"]
    if dtype == torch.uint8:
        found, exact = found.sqrt(), exact.sqrt()
    ratio = (found / exact)[~is_largest]
    standard_error = ratio.std().item() / math.sqrt(ratio.numel())
    assert abs(ratio.mean().item() - 1) < STANDARD_ERRORS * standard_error
    assert ratio.std().item() < 0.35


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_a_second_moment_rises_to_that_of_its_gradients(backend, dtype):
    """Each update adds a thousandth, where a rounding step is a 128th, or a 16th."""
    if backend.interpreted or backend.name == "reference":
        pytest.skip("takes thousands of steps")
    param = leaf(torch.zeros(256), backend)
    opt = lrs_ext.AdamW([param], lr=0.0, backend=backend.name, state_dtype=dtype)
    param.grad = torch.full_like(param, 0.3)
    param.grad[::128] = 2.0
    for _ in range(3000):
        opt.step()
    _, numbers = reference.kept_numbers(param, opt.state[param])
    exact = 0.09 * (1 - 0.999**3000)
    others = torch.arange(256) % 128 != 0
    assert numbers["exp_avg_sq"][others].mean().item() == pytest.approx(exact, rel=0.05)


def test_parameters_move_by_less_than_a_rounding_step(backend):
    param = leaf(torch.ones(1000), backend, torch.bfloat16)
    plain = leaf(torch.ones(1000), backend, torch.bfloat16)
    options = {"lr": 2.0**-12, "backend": backend.name}
    opt = lrs_ext.SGD([param], stochastic_rounding=True, **options)
    nearest = lrs_ext.SGD([plain], **options)
    for _ in range(32):
        for p, o in ((param, opt), (plain, nearest)):
            p.grad = torch.full_like(p, -1.0)
            o.step()
    moved = 32 * 2.0**-12
    if not backend.interpreted:  # it truncates where a GPU rounds
        assert (plain == 1.0).all()
    spread = 2.0**-7 * math.sqrt(moved * 2**7 / param.numel())
    assert abs(param.detach().double().mean().item() - 1 - moved) < STANDARD_ERRORS * spread


def test_numbers_that_need_no_rounding_stay(backend):
    values = torch.randn(2000).bfloat16()
    param = leaf(values, backend, torch.bfloat16)
    options = {"state_dtype": torch.bfloat16, "stochastic_rounding": True}
    opt = lrs_ext.Lion([param], lr=0.0, betas=(0.5, 0.0), backend=backend.name, **options)
    for _ in range(3):
        param.grad = torch.randn_like(param)
        opt.step()
        assert torch.equal(param.detach().cpu(), values)
        assert torch.equal(opt.state[param]["exp_avg"], param.grad)
    assert len(arrays_of(opt)) == 4


def test_infinity_and_nan_are_never_rounded_to_something_else(backend):
    special = torch.tensor([torch.inf, -torch.inf, torch.nan] * 400)
    param = leaf(special, backend, torch.bfloat16)
    opt = lrs_ext.SGD([param], lr=0.5, backend=backend.name, stochastic_rounding=True)
    param.grad = torch.zeros_like(param)
    for _ in range(3):
        opt.step()
    torch.testing.assert_close(param.detach().cpu().float(), special, equal_nan=True)
