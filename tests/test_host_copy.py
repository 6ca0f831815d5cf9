"""Numbers on their way from a device, with stand-ins for the device."""

import types

import torch

from lrs_ext import host_copy


class Event:
    def __init__(self, device):
        self.device, self.stream = device, None

    def record(self, stream=None):
        self.stream = stream

    def query(self):
        return False


def test_the_copy_is_waited_for_on_its_own_device(monkeypatch):
    """A current device of another number has streams of its own, on which nothing is copied."""
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda of: f"stream of {of}")
    target = types.SimpleNamespace(copy_=lambda value, non_blocking: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: target)
    value = types.SimpleNamespace(device=device, shape=(), dtype=torch.float32)
    copy = host_copy.HostCopy(value)
    assert copy._event.stream == "stream of cuda:1"
    assert not copy.is_here


def test_what_is_on_the_host_is_there_at_once():
    value = torch.tensor(0.5)
    copy = host_copy.HostCopy(value)
    value.zero_()
    assert copy.is_here
    assert copy.read() == 0.5
