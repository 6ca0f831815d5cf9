"""How long the chunks are that a block works on."""

import pytest

from lrs_ext.chunk_lengths import chunk_elements


@pytest.mark.parametrize(
    ("state_type", "bandwidth", "longest"),
    [
        ("float32", 0.0, 2048),
        ("float32", 3.35e12, 2048),
        ("float32", 4.8e12, 4096),
        ("bfloat16", 3.35e12, 4096),
        ("bfloat16", 4.8e12, 8192),
        ("block8", 4.8e12, 16384),
    ],
)
def test_chunks_of_faster_memory_are_longer(state_type, bandwidth, longest):
    assert chunk_elements("cuda", "adam", state_type, 2**26, bandwidth) == longest
    assert chunk_elements("cuda", "adam", state_type, 2**10, bandwidth) == 1024
