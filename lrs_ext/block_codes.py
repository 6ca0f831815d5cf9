"""Block-quantised numbers and random bits in plain torch: csrc/storage.h and csrc/random_bits.h.

For checkpoints and the reference backend; kernels have their own. A block is 128 elements in the
order in which they lie in memory, with one float32 scale, its largest magnitude. An element is an
8-bit float: its share of the scale with 4 bits of exponent, down to 2^-15, and a sign and 3 bits of
mantissa, or, for the roots of second moments, 4 bits of mantissa.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrs_ext import ops
from lrs_ext.layout import memory_order

NEAREST = 127  # in place of 8 random bits


def num_blocks(numel: int) -> int:
    return -(-numel // ops.QUANT_BLOCK)


def encode(values: Tensor, is_root: bool, random: Tensor | int = NEAREST) -> tuple[Tensor, Tensor]:
    """Quantises numbers; means of squares through their roots.

    Args:
        values: float32, dense.
        random: 8 random bits for each element, int64, in the order of memory.

    Returns:
        The codes, uint8, laid out as `values`, and the scales, float32, shape (blocks,).
    """
    kept = memory_order(values)
    kept = kept.sqrt() if is_root else kept
    blocks = num_blocks(kept.numel())
    padded = torch.nn.functional.pad(kept, (0, blocks * ops.QUANT_BLOCK - kept.numel()))
    magnitudes = padded.view(torch.int32) & 0x7FFFFFFF
    scales = _block_max(magnitudes.view(blocks, ops.QUANT_BLOCK))
    scales = torch.where(scales < 0x03800000, 0, scales).view(torch.float32)
    factors = torch.where(scales == 0, 0.0, 1.0 / scales)
    shares = kept * factors.repeat_interleave(ops.QUANT_BLOCK)[: kept.numel()]
    bits = shares.view(torch.int32).long() & 0xFFFFFFFF
    if is_root:
        words = (((bits + (random << 11) + 0x400) & 0xFFFFFFFF) >> 19) - ((127 << 4) - 255)
        words = torch.maximum(words, (shares > 0).long()) & 0xFF
    else:
        words = (((bits & 0x7FFFFFFF) + (random << 12) + 0x800) >> 20) - ((127 << 3) - 127)
        words = (words.clamp(min=0) & 0x7F) | (bits >> 24 & 0x80)
    codes = torch.empty_like(values, dtype=torch.uint8)
    memory_order(codes).copy_(words)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, is_root: bool) -> Tensor:
    """Returns the numbers that `encode` was given, as far as it kept them: float32."""
    words = memory_order(codes).long()
    magnitude = words if is_root else words & 0x7F
    shift, bias = (19, (127 << 4) - 255) if is_root else (20, (127 << 3) - 127)
    bits = torch.where(magnitude == 0, 0, (magnitude + bias) << shift)
    shares = bits.int().view(torch.float32)
    if not is_root:
        shares = torch.where(words >= 0x80, -shares, shares)
    numbers = shares * scales.repeat_interleave(ops.QUANT_BLOCK)[: words.numel()]
    values = torch.empty_like(codes, dtype=torch.float32)
    memory_order(values).copy_(numbers * numbers if is_root else numbers)
    return values


def random_words(step: Tensor, tensor: int, numel: int) -> Tensor:
    """Returns 32 random bits for each element of a tensor in one step: int64, shape (numel,).

    Args:
        step: int64, 0-d: committed updates.
        tensor: the row of the step table.
    """
    index = torch.arange(numel, device=step.device)
    key = _scrambled((step & 0xFFFFFFFF) + 0x9E3779B9)
    key = _scrambled(key ^ (step >> 32))
    key = _scrambled(key + tensor) ^ _scrambled(index >> 32)
    return _scrambled((index & 0xFFFFFFFF) * 0x9E3779B9 + key)


def _scrambled(bits: Tensor) -> Tensor:
    bits = bits & 0xFFFFFFFF
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    bits = (bits ^ (bits >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def _block_max(magnitudes: Tensor) -> Tensor:
    if magnitudes.numel() == 0:
        return magnitudes.new_zeros(len(magnitudes))
    return magnitudes.amax(1)
