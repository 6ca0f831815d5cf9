"""How long the chunks are that a block or a thread works on, and who works on which."""

import pytest
import torch

import lrs_ext
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


@pytest.mark.parametrize("threads", [2, 3, 7, 40])
@pytest.mark.parametrize(
    "numels",
    [[50_000], [1] * 200 + [40_000] * 2, [40_000] + [0, 3] * 50, [9_000] * 7, [70_000, 5, 70_000]],
    ids=str,
)
def test_the_chunks_of_all_threads_are_all_chunks(numels, threads):
    def stepped(count):
        torch.set_num_threads(count)
        params = [torch.ones(numel, requires_grad=True) for numel in numels]
        for i, param in enumerate(params):
            param.grad = None if i % 3 == 1 else torch.full_like(param, float(i + 1))
        lrs_ext.SGD(params, lr=1.0).step()
        return params

    for i, (one, several) in enumerate(zip(stepped(1), stepped(threads), strict=True)):
        assert (one == (1.0 if i % 3 == 1 else -i)).all()
        assert torch.equal(one, several)
