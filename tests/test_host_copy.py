"""Numbers on their way from a device, with stand-ins for the device."""

import types

import pytest
import torch

from lrs_ext import host_copy


class Event:
    def __init__(self, device):
        self.device, self.stream = device, None

    def record(self, stream=None):
        self.stream = stream

    def query(self):
        return False


@pytest.fixture
def value(monkeypatch):
    """A number on a device; `value.pinned` counts the pieces of host memory taken for it."""
    number = types.SimpleNamespace(
        device=torch.device("cuda", 1), shape=(), dtype=torch.float32, pinned=0
    )

    def pinned(*shape, **options):
        number.pinned += 1
        return types.SimpleNamespace(copy_=lambda value, non_blocking: None)

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda of: f"stream of {of}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return number


def test_the_copy_is_waited_for_on_its_own_device(value):
    """A current device of another number has streams of its own, on which nothing is copied."""
    copy = host_copy.HostCopy(value)
    assert copy._event.stream == "stream of cuda:1"
    assert not copy.is_here


def test_nobody_asks_for_a_number_in_a_capture(value, monkeypatch):
    """To query an event is an error there, which ends the capture."""
    copy = host_copy.HostCopy(value)
    monkeypatch.setattr(Event, "query", lambda self: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not copy.is_here
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert copy.is_here


def test_no_replay_of_a_graph_writes_to_host_memory(value, monkeypatch):
    """It would be somebody else's by then."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    copy = host_copy.HostCopy(value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert value.pinned == 0
    assert not copy.is_here


def test_what_is_on_the_host_is_there_at_once():
    value = torch.tensor(0.5)
    copy = host_copy.HostCopy(value)
    value.zero_()
    assert copy.is_here
    assert copy.read() == 0.5
