"""Block-quantised numbers and random bits in plain torch: csrc/storage.h and csrc/random_bits.h.

For checkpoints and the reference backend; kernels have their own. A block is 128 elements in the
order in which they lie in memory, with one float32 scale, a power of 2, of which they are
multiples. A code has the low 4 bits of the exponent of a float from 2^-15 to 2 and the top of its
mantissa: a sign and 3 bits of mantissa for a number that was moved away from 0 by 2^-15, so that 0
is 0, or 4 bits for the root of a second moment.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lrs_ext import ops
from lrs_ext.layout import memory_order

_NEAREST = 0x8000  # in place of 16 random bits
_CODE_BASE = 0x38000000  # the bits of 2^-15, of which the code is 0
_OFFSET = 2.0**-15
_PIECE = 1 << 22  # elements that are converted at a time: each takes 45 bytes meanwhile
_CARRIES = {False: 0x100100, True: 0x080000}  # from the largest multiple to 2, in bits


def num_blocks(numel: int) -> int:
    """Returns how many blocks hold so many elements; the last one may be shorter."""
    return -(-numel // ops.QUANT_BLOCK)


def encode(values: Tensor, is_root: bool, random: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises numbers as the kernels do; means of squares through their roots.

    Args:
        values: float32, dense.
        random: 16 random bits for each element, int64, in the order of memory.

    Returns:
        The codes, uint8, laid out as `values`, and the scales, float32, shape (blocks,).
    """
    scales = _scales(values, is_root)
    return _encoded(values, scales, is_root, random), scales


def encode_nearest(values: Tensor, is_root: bool) -> tuple[Tensor, Tensor]:
    """As `encode`, but to nearest; what `decode` returned is kept as it is."""
    codes = torch.empty_like(values, dtype=torch.uint8)
    scales = torch.empty(num_blocks(values.numel()), device=values.device)
    for value, code, scale in _pieces(values, codes, scales):
        found, found_scale = _encode_piece_nearest(value, is_root)
        code.copy_(found)
        scale.copy_(found_scale)
    return codes, scales


def _encode_piece_nearest(values: Tensor, is_root: bool) -> tuple[Tensor, Tensor]:
    scales = _scales(values, is_root)
    codes = _encoded(values, scales, is_root, _NEAREST)
    are_kept = _are_kept(values, codes, scales, is_root)
    # Rounding may have moved the largest number of a block, and with it the scale, by a power of 2.
    lower = torch.where(scales.isnan(), 2.0**126, scales * 0.5)
    for others in (lower, scales * 2.0):
        if are_kept.all():
            break
        other_codes = _encoded(values, others, is_root, _NEAREST)
        is_better = ~are_kept & _are_kept(values, other_codes, others, is_root)
        are_kept |= is_better
        scales = torch.where(is_better, others, scales)
        chosen = _spread(is_better, values.numel())
        memory_order(codes).copy_(
            torch.where(chosen, memory_order(other_codes), memory_order(codes))
        )
    return codes, scales


def decode(codes: Tensor, scales: Tensor, is_root: bool) -> Tensor:
    """Returns the numbers that codes stand for: float32."""
    values = torch.empty_like(codes, dtype=torch.float32)
    for value, code, scale in _pieces(values, codes, scales):
        value.copy_(_decode_piece(code, scale, is_root))
    return values


def _decode_piece(codes: Tensor, scales: Tensor, is_root: bool) -> Tensor:
    words = codes.long()
    if is_root:
        multiples = ((words << 19) | _CODE_BASE).int().view(torch.float32)
    else:
        multiples = ((words & 0x7F) << 20 | _CODE_BASE).int().view(torch.float32) - _OFFSET
        multiples = torch.where(words >= 0x80, -multiples, multiples)
    numbers = multiples * _spread(scales, words.numel())
    return numbers * numbers if is_root else numbers


def bits_of(values: Tensor) -> Tensor:
    """Returns the bits of contiguous float32 values: int64."""
    return values.view(torch.int32).long() & 0xFFFFFFFF


def random_bits(step: Tensor, tensor: int, numel: int) -> Tensor:
    """Returns 16 random bits for each element of a tensor in one step: int64, shape (numel,).

    Args:
        step: int64, 0-d: committed updates.
        tensor: the row of the step table.
    """
    index = torch.arange(numel, device=step.device)
    pair = index >> 1
    key = _scrambled((step & 0xFFFFFFFF) + 0x9E3779B9)
    key = _scrambled(key ^ (step >> 32))
    key = _scrambled(key + tensor) ^ _scrambled(pair >> 32)
    words = _scrambled((pair & 0xFFFFFFFF) * 0x9E3779B9 + key)
    return words >> (index % 2 * 16) & 0xFFFF


def _scrambled(bits: Tensor) -> Tensor:
    bits = bits & 0xFFFFFFFF
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    bits = (bits ^ (bits >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def _pieces(
    values: Tensor, codes: Tensor, scales: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields parts of dense tensors in the order of memory, with the scales of their blocks."""
    if values.numel() > 0:
        blocks = torch.split(scales, _PIECE // ops.QUANT_BLOCK)
        wholes = (memory_order(values), memory_order(codes))
        values_parts, codes_parts = (torch.split(whole, _PIECE) for whole in wholes)
        yield from zip(values_parts, codes_parts, blocks, strict=True)


def _scales(values: Tensor, is_root: bool) -> Tensor:
    kept = memory_order(values)
    magnitudes = bits_of(kept.sqrt() if is_root else kept) & 0x7FFFFFFF
    largest = _of_blocks(magnitudes, 0).amax(1)
    carry = _CARRIES[is_root]
    bits = torch.where(largest < 0x7F000000 - carry, largest + carry & 0x7F800000, 0x7FC00000)
    return bits.int().view(torch.float32)


def _encoded(values: Tensor, scales: Tensor, is_root: bool, random: Tensor | int) -> Tensor:
    kept = memory_order(values)
    factors = (0x7F000000 - bits_of(scales)).int().view(torch.float32)
    multiples = (kept.sqrt() if is_root else kept) * _spread(factors, kept.numel())
    if is_root:
        words = (bits_of(multiples) + (random << 3)).clamp(min=_CODE_BASE) >> 19 & 0xFF
    else:
        moved = multiples + torch.full_like(multiples, _OFFSET).copysign(multiples)
        bits = bits_of(moved) + (random << 4)
        words = (bits >> 24 & 0x80) | (bits >> 20 & 0x7F)
    codes = torch.empty_like(values, dtype=torch.uint8)
    memory_order(codes).copy_(words)
    return codes


def _are_kept(values: Tensor, codes: Tensor, scales: Tensor, is_root: bool) -> Tensor:
    """Returns for each block whether codes stand for exactly these numbers."""
    are_same = decode(codes, scales, is_root) == values
    return _of_blocks(memory_order(are_same).byte(), 1).amin(1).bool()


def _of_blocks(elements: Tensor, filler: int) -> Tensor:
    """Returns what elements have as a row for each block; what is missing of the last is filled."""
    missing = -elements.numel() % ops.QUANT_BLOCK
    return torch.nn.functional.pad(elements, (0, missing), value=filler).view(-1, ops.QUANT_BLOCK)


def _spread(of_blocks: Tensor, numel: int) -> Tensor:
    """Returns for each element what its block has."""
    return of_blocks.repeat_interleave(ops.QUANT_BLOCK)[:numel]
