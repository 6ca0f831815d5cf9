"""Parameters on several devices: pairs of devices, and an optimizer beside one for each device.

Without a GPU, half of the parameters on the CPU count as those of another device.
"""

import itertools

import cases
import pytest
import torch

import lrs_ext

REX = lrs_ext.rex(0.1, 8, warmup_steps=2, min_lr=0.001)
SHAPES = [(5,), (3, 40), (), (300,)]
CPU, GPU, ELSEWHERE = torch.device("cpu"), torch.device("cuda", 0), torch.device("cpu", 0)
gpu = pytest.mark.gpu
PAIRS = [
    pytest.param((CPU, ELSEWHERE), id="half of the cpu"),
    pytest.param((CPU, GPU), id="cpu and cuda", marks=gpu),
    pytest.param((GPU, CPU), id="cuda and cpu", marks=gpu),
    pytest.param(
        (GPU, torch.device("cuda", 1)),
        id="two cuda",
        marks=pytest.mark.two_gpus,
    ),
]
ACCELERATORS = [PAIRS[0], PAIRS[3]]  # or what stands for them
adamw = cases.UpdateRow("AdamW", {"weight_decay": 0.1})


def place(tensor, device):
    param = tensor.detach().to(device, copy=True).requires_grad_()
    param.is_elsewhere = device == ELSEWHERE
    return param


def make_params(devices, dtypes=(torch.float32, torch.bfloat16)):
    """Parameters of all shapes and dtypes on each device, in turns."""
    generator = torch.Generator().manual_seed(0)
    return [
        place(torch.randn(shape, generator=generator).to(dtype), device)
        for dtype, shape, device in itertools.product(dtypes, SHAPES, devices)
    ]


def set_gradients(params, k, skip=()):
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(100 * k + index)
        gradient = torch.randn(param.shape, generator=generator)
        param.grad = None if index in skip else gradient.to(param.device, param.dtype)


def make(row, groups, **options):
    return getattr(lrs_ext, row.name)(groups, **{"lr": row.lr} | row.options | options)


class Twins:
    """One optimizer of two groups on both devices, and one for each device."""

    def __init__(self, devices, row=adamw, **options):
        self.devices = devices
        self.params, others = make_params(devices), make_params(devices)
        half = len(self.params) // 2
        second = {"lr": lrs_ext.linear(0.05, 6), "weight_decay": 0.25}
        groups = [{"params": self.params[:half]}, {"params": self.params[half:], **second}]
        self.opt = make(row, groups, **{"lr": REX} | options)
        self.apart = [
            make(
                row,
                [{"params": others[i:half:2]}, {"params": others[half + i :: 2], **second}],
                **{"lr": REX} | options,
            )
            for i in range(2)
        ]
        self.others = others
        self.steps = 0

    @property
    def opts(self):
        return [self.opt, *self.apart]

    def set_gradients(self, skip=()):
        for params in (self.params, self.others):
            set_gradients(params, self.steps, skip)

    def step(self, skip=()):
        self.set_gradients(skip)
        for opt in self.opts:
            opt.step()
        self.steps += 1
        self.compare()

    def compare(self):
        for index, (ours, theirs) in enumerate(zip(self.params, self.others, strict=True)):
            assert torch.equal(ours, theirs), index
            apart = self.apart[index % 2]
            mine, other = self.opt.state.get(ours, {}), apart.state.get(theirs, {})
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[name], other[name]) for name in mine), index
            assert all(state.device == ours.device for state in mine.values())
        buffers = self.opt.schedule_buffers
        assert list(buffers) == list(self.devices)
        for buffer, apart in zip(buffers.values(), self.apart, strict=True):
            assert torch.equal(buffer.step, apart.schedule_buffer.step)
            assert torch.equal(buffer.values, apart.schedule_buffer.values)
        for ours, theirs in zip(self.opt.param_groups, self.apart[0].param_groups, strict=True):
            assert {k: v for k, v in ours.items() if k != "params"} == {
                k: v for k, v in theirs.items() if k != "params"
            }
        assert self.opt.current_lr() == self.apart[0].current_lr()


def states_of(opt):
    return [value for state in opt.state.values() for value in state.values()]
