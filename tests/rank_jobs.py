"""What the checks on several ranks share: a process group, meshes, spread parameters."""

import os
from datetime import timedelta
from pathlib import Path

import cases
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lrs_ext

RANK = int(os.environ.get("RANK", "0"))
SIZE = int(os.environ.get("WORLD_SIZE", "1"))
REX = lrs_ext.rex(0.1, 8, warmup_steps=2, min_lr=0.001)

# On 2 and on 4 ranks: even and uneven parts, empty ones, one element, nothing at all.
SHAPES = [(8, 3), (5, 40), (3,), (1, 7), (0, 2), (300,)]
# How a mesh of all ranks, of 2 x half of them, spreads a tensor.
SPREADS = {
    "shard": (None, [Shard(0)]),
    "replicate": (None, [Replicate()]),
    "columns": (None, [Shard(1)]),
    "hybrid": ((2, -1), [Replicate(), Shard(0)]),
    "blocks": ((2, -1), [Shard(0), Shard(1)]),
}


device = "cpu"


def start(folder, engine):
    """Joins the ranks; called first on each of them. With NCCL each has a GPU of its own."""
    global device
    torch.set_num_threads(1)
    if engine == "nccl":
        device = "cuda"
        torch.cuda.set_device(RANK)
    store = dist.FileStore(str(Path(folder, "store")), SIZE)
    timeout = timedelta(seconds=60)
    dist.init_process_group(engine, store=store, rank=RANK, world_size=SIZE, timeout=timeout)


def mesh_of(shape=None):
    """Returns a mesh of all ranks; -1 stands for what is left of them."""
    if shape is None:
        return init_device_mesh(device, (SIZE,))
    return init_device_mesh(device, (shape[0], SIZE // shape[0]), mesh_dim_names=("outer", "inner"))


def placements_for(shape, placements):
    """Returns the placements with Replicate where the shape has no such dimension."""
    return [Replicate() if p.is_shard() and p.dim >= len(shape) else p for p in placements]


def random(shape, seed, dtype=torch.float32):
    """Returns the same numbers on every rank."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, dtype)


def spread(tensor, mesh, placements):
    return distribute_tensor(
        tensor, mesh, placements_for(tensor.shape, placements), src_data_rank=None
    )


class Twins:
    """An optimizer on spread parameters and one, alike, on whole ones, on every rank.

    Args:
        update: a row of `cases.UPDATES`.
        how: a key of `SPREADS`.
    """

    def __init__(self, update, how, dtype=torch.float32, shapes=SHAPES, lr=REX, **options):
        shape, placements = SPREADS[how]
        self.mesh, self.placements, self.dtype = mesh_of(shape), placements, dtype
        wholes = [random(s, k, dtype) for k, s in enumerate(shapes)]
        self.wholes = [torch.nn.Parameter(w.clone()) for w in wholes]
        self.params = [torch.nn.Parameter(spread(w, self.mesh, placements)) for w in wholes]
        make = getattr(lrs_ext, update.name)
        options = update.options | options
        self.whole_opt = make(self.wholes, lr=lr, **options)
        self.opt = make(self.params, lr=lr, **options)

    def give_gradients(self, step, scale=1.0, skip=()):
        for k, (param, whole) in enumerate(zip(self.params, self.wholes, strict=True)):
            whole.grad = param.grad = None
            if k not in skip:
                whole.grad = scale * random(whole.shape, 1000 * step + k, self.dtype)
                param.grad = spread(whole.grad, self.mesh, self.placements)

    def step(self):
        self.opt.step()
        self.whole_opt.step()

    def check(self, tolerance=cases.EXACT):
        """Parameters and states are those of the other optimizer, on every rank."""
        close = {"rtol": tolerance.rtol, "atol": tolerance.atol}
        for param, whole in zip(self.params, self.wholes, strict=True):
            torch.testing.assert_close(param.detach().full_tensor(), whole.detach(), **close)
            states, expected = self.opt.state.get(param, {}), self.whole_opt.state.get(whole, {})
            assert set(states) == set(expected)
            for name, value in states.items():
                if isinstance(value, DTensor):
                    assert value.placements == param.placements
                    assert value.shape == param.shape
                    value = value.full_tensor()
                torch.testing.assert_close(value, expected[name], **close)
        assert torch.equal(self.opt.schedule_buffer.step, self.whole_opt.schedule_buffer.step)
        assert self.opt.current_lr() == self.whole_opt.current_lr()
