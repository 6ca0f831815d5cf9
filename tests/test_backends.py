"""Who may run a step, and what the others are told."""

import re
import types

import pytest
import torch

import lrs_ext
from lrs_ext import ops
from lrs_ext.__main__ import main
from lrs_ext.backends import select_backend


def test_an_unusable_backend_is_refused_with_the_reason_and_the_way_out():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    with pytest.raises(ValueError, match=r"must be one of .*'cuda', 'triton', 'cpu', 'reference'"):
        select_backend("tpu", cpu)
    with pytest.raises(RuntimeError, match=r"'cuda' cannot be used .* on cpu: .*; available") as e:
        select_backend("cuda", cpu)
    available = re.search(r"available here: \[(.*)\]", str(e.value))[1]
    assert "'cpu'" in available
    assert "'reference'" in available
    assert "'cuda'" not in available
    with pytest.raises(RuntimeError, match=r"'cpu' .* on meta: it updates CPU tensors, not meta"):
        select_backend("cpu", meta)
    with pytest.raises(RuntimeError, match=r"no kernel .* on meta: .*backend='reference' runs any"):
        select_backend(None, meta)


def test_without_parameters_any_backend_will_do(monkeypatch):
    groups = [{"params": []}]  # as on a rank that got none
    opt = lrs_ext.SGD(groups, lr=0.5, backend="cuda")
    opt.step()
    assert int(opt.schedule_buffer.step) == 1
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot be used .* on cpu"):
        opt.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    for backend in ("tpu", None):
        monkeypatch.setenv("LRS_EXT_BACKEND", "tpu")
        with pytest.raises(ValueError, match=r"must be one of .*'cuda', 'triton', 'cpu'"):
            lrs_ext.SGD(groups, lr=0.5, backend=backend)


def test_the_environment_chooses_the_backend_unless_an_argument_does(monkeypatch):
    cpu = torch.device("cpu")
    assert select_backend(None, cpu) == "cpu"
    monkeypatch.setenv("LRS_EXT_BACKEND", "reference")
    assert select_backend(None, cpu) == "reference"
    assert select_backend("cpu", cpu) == "cpu"
    monkeypatch.setenv("LRS_EXT_BACKEND", "")
    assert select_backend(None, cpu) == "cpu"


CAPABILITIES = {"cuda:0": (8, 9), "cuda:1": (7, 5), "cuda:2": (12, 0), "cuda:3": (8, 0)}


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda:0", None),
        ("cuda:1", "cuda:1 has compute capability 7.5, .* need 8.0: use the triton backend"),
        ("cuda:2", None),  # made from PTX
        ("cuda:3", "built for sm_86,90: reinstall with LRS_CUDA_ARCHS=80"),
    ],
)
def test_a_gpu_needs_code_of_its_own_whatever_the_others_are(monkeypatch, device, reason):
    native = types.SimpleNamespace(
        has_cuda=True, cuda_unavailable_reason=lambda: "", cuda_architectures="86,90"
    )
    monkeypatch.setattr(ops, "_C", native)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", CAPABILITIES.__getitem__)
    found = ops.cuda_unavailable_reason.__wrapped__(device)
    assert found is None if reason is None else re.search(reason, found)


def test_info_says_what_the_environment_asks_for(monkeypatch, capsys):
    assert main(["info"]) == 0
    assert "LRS_EXT_BACKEND" not in capsys.readouterr().out
    monkeypatch.setenv("LRS_EXT_BACKEND", "tpu")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"LRS_EXT_BACKEND +tpu, which is not one of cuda, triton, cpu, ref", out)
    assert "parameters on cpu: no kernel" in out
