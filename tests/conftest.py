"""Marks, the backend fixture and the switches that every test shares."""

import functools
import os

import hypothesis
import pytest
import torch
from cases import BACKENDS, HAS_GPU

if not HAS_GPU:
    # Read when triton is imported: its kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("LRS_EXT_BACKEND", None)

import lrs_ext

hypothesis.settings.register_profile("lrs_ext", deadline=None, derandomize=True, max_examples=200)
hypothesis.settings.load_profile("lrs_ext")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "two_gpus: needs two CUDA devices")


def pytest_collection_modifyitems(items):
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


# Where nothing depends on threads: many tiny parallel regions crawl when several tests run at once.
ONE_THREAD = (
    "accelerate",
    "autolrs",
    "batches",
    "docs",
    "forecast",
    "lightning",
    "rates",
    "search",
    "snapshot",
    "surrogate",
    "transformers",
)


@pytest.fixture(autouse=True)
def one_thread(request):
    """Keeps the tests of AutoLRS and of frameworks to one thread."""
    threads = torch.get_num_threads()
    if any(name in request.module.__name__ for name in ONE_THREAD):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
