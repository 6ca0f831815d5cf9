"""The formats of stored numbers, to the bit: split parameters and 8-bit blocks."""

import pytest
import reference
import torch
from test_optimizers import leaf

import lrs_ext
from lrs_ext import block_codes

# Triton's interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning")


# Split parameters.


def test_a_split_parameter_keeps_every_float32(backend):
    """Ties and the edges of the halves, infinities and numbers that round to them."""
    highs = torch.tensor([0x0000, 0x0001, 0x3F80, 0x3F7F, 0x7F7F, 0xBF80, 0xFF7F, 0x7F80])
    lows = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (highs[:, None] * 2**16 + lows).flatten()
    bits = bits[(bits & 0x7FFFFFFF) <= 0x7F800000]
    values = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    param = leaf(torch.zeros(len(values)), backend, torch.bfloat16)
    low = torch.zeros(len(values), dtype=torch.int16, device=backend.device)
    opt = lrs_ext.SGD([param], lr=0.5, backend=backend.name, master_weights=True)
    param.grad = torch.zeros_like(param)
    opt.step()
    rounded = bits + 0x8000 >> 16
    param.data.view(torch.int16).copy_(torch.where(rounded >= 2**15, rounded - 2**16, rounded))
    low.copy_(torch.where(bits % 2**16 >= 2**15, bits % 2**16 - 2**16, bits % 2**16))
    opt.state[param]["master_remainder"].copy_(low)
    before, _ = reference.kept_numbers(param, opt.state[param])
    assert torch.equal(before, values.double())
    opt.step()
    after, _ = reference.kept_numbers(param, opt.state[param])
    assert torch.equal(after, values.double())


def test_a_split_parameter_shows_nan(backend):
    param = leaf(torch.ones(3), backend, torch.bfloat16)
    opt = lrs_ext.SGD([param], lr=0.5, backend=backend.name, master_weights=True)
    param.grad = torch.tensor([0.0, torch.nan, torch.inf], device=backend.device).bfloat16()
    for _ in range(2):
        opt.step()
        assert param.isnan().tolist() == [False, True, False]
        assert param[2].item() == -torch.inf


# float16.


def test_float16_keeps_its_subnormals_where_those_of_float32_are_flushed():
    numbers = torch.tensor([3e-5, 6e-8, -6e-8, 6.2e-5, 0.0, 1.0, torch.inf]).half()
    param = torch.zeros_like(numbers, requires_grad=True)
    opt = lrs_ext.SGD([param], lr=1.0, maximize=True)
    param.grad = numbers.clone()
    is_possible = torch.set_flush_denormal(True)
    try:
        opt.step()
    finally:
        torch.set_flush_denormal(False)
    if not is_possible:
        pytest.skip("this CPU flushes nothing")
    assert torch.equal(param.view(torch.int16), numbers.view(torch.int16))


# Blocks.


@pytest.mark.parametrize("is_root", [False, True])
def test_every_code_is_the_number_that_the_format_says_and_is_encoded_to_itself(is_root):
    codes = torch.arange(256).to(torch.uint8)
    scales = torch.tensor([2.0, 2.0**-60])
    numbers = block_codes.decode(codes, scales, is_root)
    expected = reference.block_numbers(codes, scales, is_root)
    assert torch.equal(numbers.double(), expected.float().double())
    again, same = block_codes.encode_nearest(numbers, is_root)
    assert torch.equal(block_codes.decode(again, same, is_root), numbers)
    if not is_root:  # a root may have a code with another scale too
        assert torch.equal(again, codes)
        assert torch.equal(same, scales)


@pytest.mark.parametrize("is_root", [False, True])
@pytest.mark.parametrize("numel", [0, 1, 300, 128 * 5000])
def test_numbers_that_were_quantised_keep_their_codes(is_root, numel):
    """Also where rounding has moved the largest of a block across a power of 2."""
    numbers = torch.randn(numel) * 1e-3
    values = numbers.square() if is_root else numbers
    random = torch.randint(2**16, (numel,))
    codes, scales = block_codes.encode(values, is_root, random)
    kept = block_codes.decode(codes, scales, is_root)
    again, same = block_codes.encode_nearest(kept, is_root)
    assert torch.equal(block_codes.decode(again, same, is_root), kept)
    assert is_root or torch.equal(same, scales)


@pytest.mark.parametrize("is_root", [False, True])
@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 2.0**60])
def test_the_largest_code_keeps_the_smallest_beside_it(is_root, scale):
    codes = torch.arange(128).to(torch.uint8)
    codes[127] = 255 if is_root else 127
    scales = torch.tensor([scale])
    kept = block_codes.decode(codes, scales, is_root)
    again, same = block_codes.encode_nearest(kept, is_root)
    assert torch.equal(again, codes)
    assert torch.equal(same, scales)


def test_the_largest_scale_is_kept_and_nan_is_not_lost():
    codes = torch.arange(256).to(torch.uint8)
    kept = block_codes.decode(codes, torch.tensor([2.0**126, 2.0**126]), is_root=False)
    kept[130] = torch.nan
    again, scales = block_codes.encode_nearest(kept, is_root=False)
    assert torch.equal(again[:128], codes[:128])
    assert scales[0] == 2.0**126
    assert scales[1].isnan()


def test_kernels_decode_and_encode_every_signed_code(backend):
    codes = torch.arange(256).to(torch.uint8)
    param = leaf(torch.zeros(256), backend)
    opt = lrs_ext.SGD([param], lr=1.0, momentum=0.5, backend=backend.name, state_dtype=torch.uint8)
    param.grad = torch.zeros_like(param)
    opt.step()
    state = opt.state[param]
    multiples = torch.cat([reference.SIGNED_MULTIPLES, -reference.SIGNED_MULTIPLES])
    for is_kept in (False, True):
        if is_kept:
            codes[127::128] -= 1  # with the largest codes, the scales would not stay
        param.data.zero_()
        state["momentum_buffer"].copy_(codes)
        state["momentum_buffer_scale"].fill_(4.0)
        opt.step()
        assert torch.equal(param.detach().cpu().double(), -2.0 * multiples[codes.long()])
        assert state["momentum_buffer_scale"].tolist() == [2.0 if is_kept else 4.0] * 2
    codes[128] = 0  # minus zero
    assert torch.equal(state["momentum_buffer"].cpu(), codes)


def test_kernels_decode_and_encode_every_root_code(backend):
    codes = torch.arange(256).to(torch.uint8)
    param = leaf(torch.zeros(256), backend)
    options = {"lr": 1.0, "betas": (0.0, 0.25), "weight_decay": 0.0}
    opt = lrs_ext.AdamW([param], backend=backend.name, state_dtype=torch.uint8, **options)
    param.grad = torch.zeros_like(param)
    opt.step()
    state = opt.state[param]
    for is_kept in (False, True, True):
        if is_kept:
            codes[0] = codes[255] = 254  # the scale of each block stays
        state["exp_avg_sq"].copy_(codes)
        state["exp_avg_sq_scale"].fill_(4.0)
        opt.step()
        roots = reference.ROOT_MULTIPLES[codes.long()].view(2, 128)
        expected = 2.0 * roots.amax(1)
        scales = [reference.block_scale(x, True).item() for x in expected]
        assert state["exp_avg_sq_scale"].tolist() == scales
        if is_kept:
            assert torch.equal(state["exp_avg_sq"].cpu(), codes)
        assert not param.any()


def adam_state_after(backend, grad, **options):
    """The state of Adam whose moments are the gradient and its square."""
    param = leaf(torch.zeros(len(grad)), backend)
    opt = lrs_ext.Adam(
        [param], lr=0.5, betas=(0.0, 0.0), backend=backend.name, state_dtype=torch.uint8, **options
    )
    param.grad = grad.to(backend.device)
    opt.step()
    return param, opt


def test_scales_are_powers_of_2_from_the_smallest_float_to_the_largest(backend):
    largest = [0.0, 1.0, 1.8749, 1.8750, 2.0**-126, 2.0**-120, 2.0**-149, 1.48e38, 1.8e38]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0**-126, 2.0**-120, 0.0, 2.0**126, torch.nan]
    grad = torch.zeros(len(largest), 128)
    grad[:, 5] = torch.tensor(largest)
    grad[1:, 7] = -grad[1:, 5] / 2
    _, opt = adam_state_after(backend, grad.flatten())
    [state] = opt.state.values()
    expected = torch.tensor(expected, device=backend.device)
    torch.testing.assert_close(state["exp_avg_scale"], expected, rtol=0.0, atol=0.0, equal_nan=True)
    _, numbers = reference.kept_numbers(torch.zeros(1), state)
    kept = numbers["exp_avg"].view(grad.shape)
    shown = [0, *range(1, 6), 7]
    torch.testing.assert_close(kept[shown], grad[shown].double(), rtol=0.13, atol=0.0)
    assert not kept[6].any()
    assert kept[8].isnan().all()


def test_scales_of_roots_change_at_the_largest_code(backend):
    largest = torch.tensor([1.9374, 1.9375, 0.96875, 0.9687, 2.0**-62, 0.0])
    grad = torch.zeros(len(largest), 128)
    grad[:, 3] = -largest
    _, opt = adam_state_after(backend, grad.flatten())
    [state] = opt.state.values()
    expected = [1.0, 2.0, 1.0, 0.5, 2.0**-62, 0.0]
    assert state["exp_avg_sq_scale"].tolist() == expected


MAKERS = {
    "SGD": lambda params, **options: lrs_ext.SGD(params, momentum=0.9, **options),
    "Adam": lrs_ext.Adam,
    "Lion": lrs_ext.Lion,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2e38, 1e21])
def test_a_number_that_is_not_finite_poisons_its_block_visibly(backend, name, bad):
    """Also one that is too large for a scale, or whose square is not finite."""
    grad = torch.randn(300)
    grad[131], grad[130] = 0.0, bad
    param = leaf(torch.zeros(300), backend)
    opt = MAKERS[name]([param], lr=0.5, backend=backend.name, state_dtype=torch.uint8)
    for gradient in (grad, torch.randn(300)):
        param.grad = gradient.to(backend.device)
        opt.step()
    is_poisoned = torch.arange(300) // 128 == 1
    if name != "Adam" and bad == 1e21:
        is_poisoned[:] = False
    if name == "Lion" and bad == 2e38:  # a share of it is kept
        is_poisoned[:] = False
    assert torch.equal(param.isnan().cpu(), is_poisoned)


def test_roots_next_to_larger_ones_are_not_zero(backend):
    grad = 10.0 ** torch.linspace(-15, 0, 256)
    grad[::128], grad[1::128] = 1.0, 0.0
    _, opt = adam_state_after(backend, grad)
    [state] = opt.state.values()
    _, numbers = reference.kept_numbers(torch.zeros(1), state)
    roots, exact = numbers["exp_avg_sq"].sqrt(), grad.double().clamp(min=2.0**-15)
    assert ((roots - exact).abs() <= exact / 16).all()
    assert (roots[grad <= 2.0**-15] == 2.0**-15).all()
    assert not numbers["exp_avg"][1::128].any()


def test_small_changes_are_not_lost(backend):
    """A ten thousandth of a number at a time, a thousandth of what two codes are apart."""
    numbers = torch.full((128 * (8 if backend.interpreted else 64),), 0.3)
    numbers[::128] = 1.0  # so that the scales stay
    param = leaf(torch.zeros(len(numbers)), backend)
    opt = lrs_ext.SGD(
        [param], lr=0.0, momentum=0.9999, backend=backend.name, state_dtype=torch.uint8
    )
    param.grad = numbers.clone().to(backend.device)

    def mean_after_step():
        opt.step()
        _, kept = reference.kept_numbers(param, opt.state[param])
        return kept["momentum_buffer"][numbers < 1.0].mean().item()

    first = mean_after_step()
    param.grad.copy_(torch.where(numbers == 1.0, 1e-4, 0.0))
    steps, tolerance = (20, 0.0015) if backend.interpreted else (1000, 0.006)  # four deviations
    for _ in range(steps - 1):
        opt.step()
    assert mean_after_step() == pytest.approx(first * 0.9999**steps, rel=tolerance)
