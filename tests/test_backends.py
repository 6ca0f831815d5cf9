"""Who may run a step, and what the others are told."""

import re

import pytest
import torch

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


def test_the_environment_chooses_the_backend_unless_an_argument_does(monkeypatch):
    cpu = torch.device("cpu")
    assert select_backend(None, cpu) == "cpu"
    monkeypatch.setenv("LRS_EXT_BACKEND", "reference")
    assert select_backend(None, cpu) == "reference"
    assert select_backend("cpu", cpu) == "cpu"
    monkeypatch.setenv("LRS_EXT_BACKEND", "")
    assert select_backend(None, cpu) == "cpu"
