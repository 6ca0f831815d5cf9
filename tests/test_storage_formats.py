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


# Blocks.


@pytest.mark.parametrize("is_root", [False, True])
def test_every_code_is_the_number_that_the_format_says_and_is_encoded_to_itself(is_root):
    codes = torch.arange(256).to(torch.uint8)
    scales = torch.tensor([3.0, 1e-30])
    numbers = block_codes.decode(codes, scales, is_root)
    expected = reference.block_numbers(codes, scales, is_root)
    assert torch.equal(numbers.double(), expected.float().double())
    # A block of its own with the largest code, so that the scales stay.
    codes = torch.cat([codes[:127], codes[127:128], codes[129:], codes[255:]])
    numbers = block_codes.decode(codes, torch.ones(2), is_root)
    if is_root:
        numbers[0], codes[0] = 1.0, 255
    again, scales = block_codes.encode(numbers, is_root)
    assert torch.equal(again, codes)
    assert scales.tolist() == [1.0, 1.0]


def test_kernels_decode_and_encode_every_signed_code(backend):
    codes = torch.arange(256).to(torch.uint8)
    param = leaf(torch.zeros(256), backend)
    opt = lrs_ext.SGD([param], lr=1.0, momentum=0.5, backend=backend.name, state_dtype=torch.uint8)
    param.grad = torch.zeros_like(param)
    opt.step()
    state = opt.state[param]
    state["momentum_buffer"].copy_(codes)
    state["momentum_buffer_scale"].fill_(4.0)
    opt.step()
    shares = torch.cat([reference.SIGNED_SHARES, -reference.SIGNED_SHARES])
    assert torch.equal(param.detach().cpu().double(), -2.0 * shares)
    codes[128] = 0  # minus zero
    assert torch.equal(state["momentum_buffer"].cpu(), codes)
    assert state["momentum_buffer_scale"].tolist() == [2.0, 2.0]


def test_kernels_decode_and_encode_every_root_code(backend):
    codes = torch.cat([torch.arange(128), torch.arange(128, 256)])
    codes[0] = 255  # each block has the largest code
    codes = codes.to(torch.uint8)
    param = leaf(torch.zeros(256), backend)
    options = {"lr": 1.0, "betas": (0.0, 0.25), "weight_decay": 0.0}
    opt = lrs_ext.AdamW([param], backend=backend.name, state_dtype=torch.uint8, **options)
    param.grad = torch.zeros_like(param)
    opt.step()
    state = opt.state[param]
    for _ in range(2):
        state["exp_avg_sq"].copy_(codes)
        # The largest code of the first block but the very first is 127.
        state["exp_avg_sq_scale"].fill_(4.0)
        opt.step()
        assert torch.equal(state["exp_avg_sq"].cpu(), codes)
        assert state["exp_avg_sq_scale"].tolist() == [2.0, 2.0]
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


def test_blocks_of_zeros_and_of_tiny_numbers_are_zero(backend):
    grad = torch.ones(5 * 128)
    grad[128:256] = 0.0
    grad[256:384] = 2.0**-121  # no float32 is the reciprocal of much less
    grad[384:512] = 2.0**-120
    grad[512:] = -(2.0**127)
    _, opt = adam_state_after(backend, grad)
    [state] = opt.state.values()
    scales = state["exp_avg_scale"].tolist()
    assert scales == [1.0, 0.0, 0.0, 2.0**-120, 2.0**127]
    _, numbers = reference.kept_numbers(torch.zeros(1), state)
    assert torch.equal(numbers["exp_avg"][:256], grad[:256].double())
    assert not numbers["exp_avg"][256:384].any()
    assert torch.equal(numbers["exp_avg"][384:], grad[384:].double())
    assert state["exp_avg_sq_scale"].tolist()[:4] == [1.0, 0.0, 0.0, 0.0]  # squares underflow


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_poisons_its_block_visibly(backend, bad):
    grad = torch.ones(300)
    grad[130] = bad
    param, opt = adam_state_after(backend, grad)
    assert param.isfinite().sum() >= 299
    param.grad = torch.ones_like(param)
    opt.step()
    assert torch.equal(param.isnan().cpu(), torch.arange(300) // 128 == 1)


def test_roots_that_are_not_zero_stay_so(backend):
    grad = 10.0 ** torch.linspace(-15, 0, 256)
    grad[::128], grad[1::128] = 1.0, 0.0
    _, opt = adam_state_after(backend, grad)
    [state] = opt.state.values()
    codes = state["exp_avg_sq"].cpu()
    assert torch.equal(codes == 0, grad == 0)
