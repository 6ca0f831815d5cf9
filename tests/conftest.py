"""Marks, the backend fixture and the switches that every test shares."""

import functools
import importlib.util
import os

import hypothesis
import pytest
import torch
from cases import BACKENDS, HAS_GPU

if not HAS_GPU:
    # Read when triton is imported: its kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("LRS_EXT_BACKEND", None)

import device_twins
import distribution
import interpreter

import lrs_ext
from lrs_ext import param_devices

if not HAS_GPU and importlib.util.find_spec("triton"):
    interpreter.speed_up()
    interpreter.round_to_nearest()

torch.set_num_threads(1)  # also for fixtures of modules
hypothesis.settings.register_profile("lrs_ext", deadline=None, derandomize=True, max_examples=200)
hypothesis.settings.load_profile("lrs_ext")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "two_gpus: needs two CUDA devices")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return distribution.scheduling(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: distribution.place_of(item.nodeid))
    devices = torch.cuda.device_count() if HAS_GPU else 0
    for item in items:
        if item.get_closest_marker("gpu") and devices < 1:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("two_gpus") and devices < 2:
            item.add_marker(pytest.mark.skip(reason="fewer than two CUDA devices"))


def backend_param(backend):
    marks = [pytest.mark.gpu] if backend.device == "cuda" else []
    return pytest.param(backend, id=str(backend), marks=marks)


@pytest.fixture(params=[backend_param(backend) for backend in BACKENDS])
def backend(request):
    """Each backend on each device that it serves."""
    return request.param


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.two_gpus)])
def engine(request):
    """By which torch lets two ranks exchange data; see `ranks.Ranks`."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=HAS_GPU)
def scaled_bfloat16(monkeypatch):
    """Lets a GradScaler unscale bfloat16 gradients on a GPU, where torch's kernel refuses them."""
    foreach = torch._amp_foreach_non_finite_check_and_unscale_

    def unscale(gradients, found_inf, inverse_scale):
        if gradients[0].dtype != torch.bfloat16:
            foreach(gradients, found_inf, inverse_scale)
            return
        for gradient in gradients:
            is_finite = gradient.isfinite().all()
            found_inf.copy_(torch.where(is_finite, found_inf, torch.ones_like(found_inf)))
            gradient.mul_(inverse_scale)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", unscale)


@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny parallel regions crawl when several tests run at once."""
    torch.set_num_threads(1)


@pytest.fixture
def several_threads(one_thread):
    """For tests of enough elements to be shared out among threads."""
    torch.set_num_threads(3)


class Probe:
    """SGD on one 0-d parameter a group: from 0 and with gradient -1, an update leaves lr there."""

    def __init__(self, backend, *lrs):
        self.params = [torch.zeros((), device=backend.device, requires_grad=True) for _ in lrs]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(self.params, lrs, strict=True)]
        self.opt = lrs_ext.SGD(groups, backend=backend.name)
        self.groups, self.buffer = self.opt.param_groups, self.opt.schedule_buffer

    def used(self):
        """Steps once and returns the learning rate that each group's update used."""
        for param in self.params:
            param.data.zero_()
            param.grad = torch.full_like(param, -1.0)
        self.opt.step()
        return [param.item() for param in self.params]


@pytest.fixture
def probe(backend):
    return functools.partial(Probe, backend)


@pytest.fixture
def mark_elsewhere(monkeypatch):
    """Parameters that carry `is_elsewhere` are on the second half of the CPU."""
    monkeypatch.setattr(
        param_devices,
        "device_of",
        lambda param: (
            device_twins.ELSEWHERE if getattr(param, "is_elsewhere", False) else param.device
        ),
    )


@pytest.fixture(params=device_twins.PAIRS)
def devices(request, mark_elsewhere):
    return request.param
