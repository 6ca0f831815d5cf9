"""Storage types of the Triton backend: csrc/storage.h and csrc/random_bits.h once more.

Values in registers are float32; random bits are uint32, of which the low 16 are for the element.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# How parameters are kept: rounded to nearest, rounded stochastically, or split in halves.
NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
SPLIT = tl.constexpr(2)

# How states are kept; the codes of the native core.
FLOAT32_STATE = tl.constexpr(0)
BFLOAT16_STATE = tl.constexpr(1)
BLOCK8_STATE = tl.constexpr(2)
QUANT_BLOCK = tl.constexpr(128)
CODE_BASE = tl.constexpr(0x38000000)  # the bits of 2^-15, of which the code is 0

jit: Callable[[Callable[..., Any]], Any] = triton.jit  # Triton is untyped


@jit
def scrambled(bits: tl.tensor) -> tl.tensor:
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@jit
def random_key(step: tl.tensor, position: tl.tensor, first: tl.tensor) -> tl.tensor:
    """Returns the key of a tensor's elements from `first` on, in one step; all int64."""
    key = scrambled(step.to(tl.uint32) + 0x9E3779B9)
    key = scrambled(key ^ (step >> 32).to(tl.uint32))
    key = scrambled(key + position.to(tl.uint32))
    return key ^ scrambled((first >> 33).to(tl.uint32))


@jit
def random_bits(key: tl.tensor, start: tl.tensor, lanes: tl.tensor) -> tl.tensor:
    """Returns 16 random bits for each of the elements `start + lanes`: two share a word.

    `start` must be even.
    """
    pairs = (start >> 1).to(tl.uint32) + (lanes >> 1).to(tl.uint32)
    words = scrambled(pairs * 0x9E3779B9 + key)
    return (words >> ((lanes & 1) * 16).to(tl.uint32)) & 0xFFFF


@jit
def with_reciprocal(value: tl.tensor) -> tl.tensor:
    """Returns a positive number as one whose reciprocal is a float32; 0 stays 0."""
    LEAST: tl.constexpr = 2.0**-126
    value = value.to(tl.float32)
    return tl.where((value > 0.0) & (value < LEAST), LEAST, value)


@jit
def to_bits(value: tl.tensor) -> tl.tensor:
    return value.to(tl.uint32, bitcast=True)


@jit
def from_bits(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)


@jit
def to_bfloat16(bits: tl.tensor) -> tl.tensor:
    """Returns the bfloat16 whose bits are the low 16."""
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit
def is_nan(value: tl.tensor) -> tl.tensor:
    return value != value


@jit
def rounded_stochastically(value: tl.tensor, random: tl.tensor) -> tl.tensor:
    """Returns a bfloat16; `random` has 16 random bits."""
    return to_bfloat16(tl.where(is_nan(value), 0x7FFF, (to_bits(value) + random) >> 16))


@jit
def join(high: tl.tensor, low: tl.tensor) -> tl.tensor:
    """Returns the float32 of a bfloat16 and the int16 that rounding it took away."""
    high_bits = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return from_bits(high_bits + low.to(tl.int32).to(tl.uint32, bitcast=True))


@jit
def split(value: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    bits = tl.where(is_nan(value), 0x7FC00000, to_bits(value))
    low = (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    return to_bfloat16((bits + 0x8000) >> 16), low


@jit
def encode_signed(multiple: tl.tensor, random: tl.tensor) -> tl.tensor:
    sign = to_bits(multiple) & 0x80000000
    bits = to_bits(multiple + from_bits(sign | CODE_BASE)) + (random << 4)
    return (((bits >> 24) & 0x80) | ((bits >> 20) & 0x7F)).to(tl.uint8)


@jit
def decode_signed(code: tl.tensor) -> tl.tensor:
    OFFSET: tl.constexpr = 2.0**-15
    word = code.to(tl.uint32)
    magnitude = from_bits(((word & 0x7F) << 20) | CODE_BASE) - OFFSET
    return from_bits(to_bits(magnitude) | ((word & 0x80) << 24))


@jit
def encode_root(multiple: tl.tensor, random: tl.tensor) -> tl.tensor:
    bits = (to_bits(multiple) + (random << 3)).to(tl.int32, bitcast=True)
    return ((tl.maximum(bits, CODE_BASE) >> 19) & 0xFF).to(tl.uint8)


@jit
def decode_root(code: tl.tensor) -> tl.tensor:
    return from_bits((code.to(tl.uint32) << 19) | CODE_BASE)


@jit
def load_state(
    pointers: tl.tensor,
    scales: tl.tensor,
    mask: tl.tensor | None,
    STATE_TYPE: tl.constexpr,
    IS_ROOT: tl.constexpr,
) -> tl.tensor:
    """Returns a state; for block-quantised ones, `scales` points to each lane's."""
    if STATE_TYPE == BLOCK8_STATE:
        codes = tl.load(pointers, mask)
        LANE: tl.constexpr = pointers.shape[0] // scales.shape[0]
        scale = tl.expand_dims(tl.load(scales, mask), 1)
        scale = tl.reshape(tl.broadcast_to(scale, (scales.shape[0], LANE)), pointers.shape)
        if IS_ROOT:
            root = decode_root(codes) * scale
            return root * root
        return decode_signed(codes) * scale
    return tl.load(pointers, mask).to(tl.float32)


@jit
def store_state(
    pointers: tl.tensor,
    scales: tl.tensor,
    state: tl.tensor,
    random: tl.tensor,
    mask: tl.tensor | None,
    STATE_TYPE: tl.constexpr,
    IS_ROOT: tl.constexpr,
) -> None:
    """Stores a state, of which there are whole blocks; `scales` is as for `load_state`."""
    if STATE_TYPE == BLOCK8_STATE:
        kept = tl.sqrt_rn(state) if IS_ROOT else state
        if mask is not None:
            kept = tl.where(mask, kept, 0.0)
        # The order of magnitudes is that of their bits, nan above infinity; see block_scale.
        CARRY: tl.constexpr = 0x080000 if IS_ROOT else 0x100100
        magnitudes = (to_bits(kept) & 0x7FFFFFFF).to(tl.int32)
        BLOCKS: tl.constexpr = pointers.shape[0] // QUANT_BLOCK
        blocks = tl.reshape(magnitudes, (BLOCKS, QUANT_BLOCK))
        largest = tl.max(blocks, 1, keep_dims=True).to(tl.uint32)
        is_finite = largest < 0x7F000000 - CARRY
        scale_bits = tl.where(is_finite, (largest + CARRY) & 0x7F800000, 0x7FC00000).to(tl.uint32)
        factor = tl.broadcast_to(from_bits(0x7F000000 - scale_bits), (BLOCKS, QUANT_BLOCK))
        multiple = kept * tl.reshape(factor, pointers.shape)
        codes = encode_root(multiple, random) if IS_ROOT else encode_signed(multiple, random)
        tl.store(pointers, codes, mask)
        # The same number from each lane of a block: the threads that have it need not exchange it.
        scale = tl.broadcast_to(from_bits(scale_bits), (BLOCKS, scales.shape[0] // BLOCKS))
        tl.store(scales, tl.reshape(scale, scales.shape), mask)
    elif STATE_TYPE == BFLOAT16_STATE:
        tl.store(pointers, rounded_stochastically(state, random), mask)
    else:
        tl.store(pointers, state, mask)
