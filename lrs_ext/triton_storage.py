"""Storage types of the Triton backend: csrc/storage.h and csrc/random_bits.h once more.

Values in registers are float32; random bits are uint32, one word for each element.
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
    return key ^ scrambled((first >> 32).to(tl.uint32))


@jit
def random_bits(key: tl.tensor, index: tl.tensor) -> tl.tensor:
    return scrambled(index.to(tl.uint32) * 0x9E3779B9 + key)


@jit
def state_random(random: tl.tensor, INDEX: tl.constexpr) -> tl.tensor:
    # A third state is float32 and takes none.
    return (random >> (16 + 8 * INDEX)) & 0xFF if INDEX < 2 else random


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
def is_nan_bits(bits: tl.tensor) -> tl.tensor:
    return (bits & 0x7FFFFFFF) > 0x7F800000


@jit
def rounded_stochastically(value: tl.tensor, random: tl.tensor) -> tl.tensor:
    """Returns a bfloat16; `random` has 16 random bits."""
    bits = to_bits(value)
    return to_bfloat16(tl.where(is_nan_bits(bits), 0x7FFF, (bits + random) >> 16))


@jit
def join(high: tl.tensor, low: tl.tensor) -> tl.tensor:
    """Returns the float32 of a bfloat16 and the int16 that rounding it took away."""
    high_bits = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return from_bits(high_bits + low.to(tl.int32).to(tl.uint32, bitcast=True))


@jit
def split(value: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    bits = to_bits(value)
    bits = tl.where(is_nan_bits(bits), 0x7FC00000, bits)
    low = (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    return to_bfloat16((bits + 0x8000) >> 16), low


@jit
def encode_signed(share: tl.tensor, random: tl.tensor) -> tl.tensor:
    BIAS: tl.constexpr = (127 << 3) - 127
    bits = to_bits(share)
    code = (((bits & 0x7FFFFFFF) + (random << 12) + 0x800) >> 20).to(tl.int32) - BIAS
    code = tl.maximum(code, 0) & 0x7F
    return (((bits >> 24) & 0x80) | code.to(tl.uint32)).to(tl.uint8)


@jit
def decode_signed(code: tl.tensor) -> tl.tensor:
    BIAS: tl.constexpr = (127 << 3) - 127
    word = code.to(tl.uint32)
    magnitude = word & 0x7F
    bits = tl.where(magnitude == 0, 0, (magnitude + BIAS) << 20)
    return from_bits(bits.to(tl.uint32) | ((word & 0x80) << 24))


@jit
def encode_root(share: tl.tensor, random: tl.tensor) -> tl.tensor:
    BIAS: tl.constexpr = (127 << 4) - 255
    code = ((to_bits(share) + (random << 11) + 0x400) >> 19).to(tl.int32) - BIAS
    code = tl.maximum(code, tl.where(share > 0.0, 1, 0))
    return (code & 0xFF).to(tl.uint8)


@jit
def decode_root(code: tl.tensor) -> tl.tensor:
    BIAS: tl.constexpr = (127 << 4) - 255
    word = code.to(tl.uint32)
    return from_bits(tl.where(word == 0, 0, (word + BIAS) << 19).to(tl.uint32))


@jit
def load_state(
    pointers: tl.tensor,
    scales: tl.tensor,
    mask: tl.tensor | None,
    STATE_TYPE: tl.constexpr,
    IS_ROOT: tl.constexpr,
) -> tl.tensor:
    """Returns a state; for block-quantised ones, `scales` points to each element's."""
    if STATE_TYPE == BLOCK8_STATE:
        codes = tl.load(pointers, mask)
        scale = tl.load(scales, mask)
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
    PIECE: tl.constexpr,
) -> None:
    """Stores a state; `random` has 8 random bits, and all of a block are in the piece."""
    if STATE_TYPE == BLOCK8_STATE:
        kept = tl.sqrt_rn(state) if IS_ROOT else state
        if mask is not None:
            kept = tl.where(mask, kept, 0.0)
        # Of non-negative floats, the order is that of their bits, nan above infinity.
        magnitudes = (to_bits(kept) & 0x7FFFFFFF).to(tl.int32)
        blocks = tl.reshape(magnitudes, (PIECE // QUANT_BLOCK, QUANT_BLOCK))
        largest = tl.max(blocks, 1, keep_dims=True)
        largest = tl.broadcast_to(largest, (PIECE // QUANT_BLOCK, QUANT_BLOCK))
        largest = tl.reshape(largest, (PIECE,))
        is_flushed = largest < 0x03800000
        scale = tl.where(is_flushed, 0.0, from_bits(largest.to(tl.uint32)))
        factor = tl.where(is_flushed, 0.0, tl.div_rn(1.0, tl.where(is_flushed, 1.0, scale)))
        share = kept * factor
        codes = encode_root(share, random) if IS_ROOT else encode_signed(share, random)
        tl.store(pointers, codes, mask)
        tl.store(scales, scale, mask)  # the same number from each element of a block
    elif STATE_TYPE == BFLOAT16_STATE:
        tl.store(pointers, rounded_stochastically(state, (random << 8) | 0x80), mask)
    else:
        tl.store(pointers, state, mask)
