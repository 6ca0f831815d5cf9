"""Triton's kernels give the bits of the CPU's, where an element does not depend on the others."""

import itertools

import cases
import pytest
import torch

import lrs_ext

pytest.importorskip("triton")
DEVICE = next(backend.device for backend in cases.BACKENDS if backend.name == "triton")
# Elements, and how many of them the parameter starts after a multiple of 16 bytes: pieces and a
# rest, blocks of quantisation that are not full, a path without wide accesses.
PARTS = [(1, 0), (2048 + 517, 0), (300, 1)]


def params(dtypes, device):
    generator = torch.Generator().manual_seed(0)
    for dtype, (numel, shift) in itertools.product(dtypes, PARTS):
        values = torch.randn(shift + numel, generator=generator).to(device, dtype)
        yield values[shift:].requires_grad_()


PLAIN, *STORED = cases.STORAGES
ROWS = [
    *((row, PLAIN) for row in cases.UPDATES if row.name != "LAMB"),
    *itertools.product(cases.STORED_UPDATES, STORED),
]


@pytest.mark.parametrize(("row", "storage"), ROWS, ids=str)
def test_steps_are_those_of_the_cpu(row, storage):
    dtypes = cases.DTYPES if storage == PLAIN else cases.DTYPES[:2]
    options = row.options | storage.options
    lr = lrs_ext.rex(row.lr, 8, warmup_steps=2)
    rows = [[*params(dtypes, device)] for device in ("cpu", DEVICE)]
    make = getattr(lrs_ext, row.name)
    opts = [
        make(own, lr=lr, backend=backend, **options)
        for own, backend in zip(rows, ("cpu", "triton"), strict=True)
    ]
    for step in range(3):
        for index, pair in enumerate(zip(*rows, strict=True)):
            grad = torch.randn(pair[0].shape) * 10.0 ** (2 * step - index)
            for param in pair:
                param.grad = None if index == step else grad.to(param.device, param.dtype)
        for opt in opts:
            opt.step()
        for ours, theirs in zip(*rows, strict=True):
            assert torch.equal(ours, theirs.cpu())
            states = [opt.state.get(p, {}) for opt, p in zip(opts, (ours, theirs), strict=True)]
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][name], states[1][name].cpu()) for name in states[0])
