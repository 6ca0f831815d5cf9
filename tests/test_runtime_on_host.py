"""What stands for the CUDA runtime: work comes late and in order; captures forbid as CUDA does."""

import ctypes
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_void_p
from importlib.util import find_spec
from pathlib import Path

import gpu_on_host
import pytest

# Of driver_types.h.
UNSUPPORTED, INVALIDATED, MERGE, ISOLATION, CAPTURED_EVENT = 900, 901, 902, 905, 907
NOT_READY, LAUNCH_FAILURE = 600, 719
NON_BLOCKING, ANY_DIRECTION, GLOBAL, RELAXED = 1, 4, 0, 2


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folders = [Path("/usr/local/cuda/include")]
    folders += gpu_on_host.include_folders() if find_spec("triton") else []
    folder = next((path for path in folders if (path / "cuda_runtime_api.h").exists()), None)
    if folder is None:
        pytest.skip("there are no headers of CUDA: neither the toolkit nor triton is installed")
    built = gpu_on_host.build_runtime(tmp_path_factory.mktemp("runtime"), [folder])
    return ctypes.CDLL(str(built))


class Runtime:
    """Calls functions of the runtime without their prefix, on arrays of four bytes."""

    def __init__(self, library):
        self.library = library

    def __call__(self, name, *arguments):
        return getattr(self.library, f"cuda{name}")(*arguments)

    def made(self, name, *arguments):
        handle = c_void_p()
        assert self(name, byref(handle), *arguments) == 0
        return handle

    def stream(self):
        return self.made("StreamCreateWithPriority", c_uint(NON_BLOCKING), c_int(0))

    def event(self):
        return self.made("EventCreateWithFlags", c_uint(0))

    def array(self, value, allocate="Malloc"):
        flags = [c_uint(0)] if allocate == "HostAlloc" else []
        pointer = self.made(allocate, c_size_t(4), *flags)
        array = ctypes.cast(pointer, POINTER(c_int))
        array[0] = value
        return array

    def copy(self, target, source, stream):
        arguments = (target, source, c_size_t(4), c_int(ANY_DIRECTION), stream)
        return self("MemcpyAsync", *arguments)

    def begin(self, stream, mode=GLOBAL):
        assert self("StreamBeginCapture", stream, c_int(mode)) == 0

    def end(self, stream):
        graph = c_void_p()
        return self("StreamEndCapture", stream, byref(graph)), graph


@pytest.fixture
def cuda(library):
    yield Runtime(library)
    library.on_host_run_everything()


def test_work_waits_until_somebody_synchronizes(cuda):
    for name in ("StreamSynchronize", "DeviceSynchronize"):
        stream, a, b = cuda.stream(), cuda.array(1), cuda.array(2)
        cuda.copy(a, b, stream)
        assert a[0] == 1
        assert cuda(name, *[stream] * (name == "StreamSynchronize")) == 0
        assert a[0] == 2


def test_a_query_runs_one_piece_of_work(cuda):
    stream, a = cuda.stream(), cuda.array(1)
    sources = [cuda.array(value) for value in (2, 3)]
    for source in sources:
        cuda.copy(a, source, stream)
    assert [cuda("StreamQuery", stream), a[0]] == [NOT_READY, 2]
    assert [cuda("StreamQuery", stream), a[0]] == [0, 3]


def test_who_waits_for_work_that_fails_is_told_once(cuda, library):
    callback = ctypes.CFUNCTYPE(None, c_void_p)
    run, drop = callback(lambda data: library.on_host_fail()), callback(lambda data: None)
    stream, event, a = cuda.stream(), cuda.event(), cuda.array(1)
    pageable, direction = (c_int * 1)(0), c_int(ANY_DIRECTION)
    waits = [
        lambda: cuda("StreamSynchronize", stream),
        lambda: cuda("DeviceSynchronize"),
        lambda: cuda("EventSynchronize", event),
        lambda: cuda.copy(pageable, a, stream),
        lambda: library.on_host_run_everything(),
    ]
    for wait in waits:
        library.on_host_enqueue(stream, run, None, drop)
        cuda("EventRecord", event, stream)
        assert [wait(), wait()] == [LAUNCH_FAILURE, 0]
    library.on_host_enqueue(None, run, None, drop)
    assert cuda("Memcpy", pageable, a, c_size_t(4), direction) == LAUNCH_FAILURE


def test_streams_do_not_wait_for_each_other_but_by_events(cuda):
    for waits in (False, True):
        first, second, event = cuda.stream(), cuda.stream(), cuda.event()
        a, b, c = (cuda.array(value) for value in (1, 2, 3))
        cuda.copy(b, a, first)
        cuda("EventRecord", event, first)
        if waits:
            cuda("StreamWaitEvent", second, event, c_uint(0))
        cuda.copy(c, b, second)
        cuda("StreamSynchronize", second)
        assert c[0] == (1 if waits else 2)
        assert cuda("EventQuery", event) == (0 if waits else NOT_READY)
        assert cuda("EventSynchronize", event) == 0
        assert b[0] == 1


def test_the_default_stream_of_each_device_is_its_own(cuda):
    a, b = cuda.array(1), cuda.array(2)
    cuda.copy(a, b, None)
    cuda("SetDevice", c_int(1))
    cuda("DeviceSynchronize")
    assert a[0] == 1
    cuda("SetDevice", c_int(0))
    cuda("DeviceSynchronize")
    assert a[0] == 2


def test_page_locked_memory_is_read_late_and_pageable_memory_at_once(cuda):
    stream, a, b = cuda.stream(), cuda.array(0), cuda.array(0)
    locked, pageable = cuda.array(1, "HostAlloc"), (c_int * 1)(1)
    cuda.copy(a, locked, stream)
    cuda.copy(b, pageable, stream)
    locked[0] = pageable[0] = 2
    cuda("StreamSynchronize", stream)
    assert (a[0], b[0]) == (2, 1)


def test_a_copy_to_pageable_memory_waits(cuda):
    stream, a, b = cuda.stream(), cuda.array(1), cuda.array(2)
    pageable, locked = (c_int * 1)(0), cuda.array(0, "HostAlloc")
    cuda.copy(a, b, stream)
    cuda.copy(locked, a, stream)
    assert locked[0] == 0
    cuda.copy(pageable, a, stream)
    assert (pageable[0], locked[0]) == (2, 2)


def test_a_captured_graph_runs_only_when_it_is_replayed(cuda):
    stream, other, event = cuda.stream(), cuda.stream(), cuda.event()
    a, b, c = (cuda.array(value) for value in (1, 2, 3))
    cuda.begin(stream)
    cuda.copy(b, a, stream)
    cuda("EventRecord", event, stream)
    assert cuda("StreamWaitEvent", other, event, c_uint(0)) == 0  # takes part from here on
    cuda.copy(c, b, other)
    status, graph = cuda.end(stream)
    assert status == 0
    executable = cuda.made("GraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
    cuda("DeviceSynchronize")
    assert (b[0], c[0]) == (2, 3)
    for before, value in ((3, 4), (4, 5)):
        cuda("GraphLaunch", executable, stream)
        a[0] = value
        assert c[0] == before
        cuda("StreamSynchronize", stream)
        assert (b[0], c[0]) == (value, value)


FORBIDDEN = {
    "Malloc": lambda cuda, *_: cuda("Malloc", byref(c_void_p()), c_size_t(4)),
    "Memcpy": lambda cuda, *_: cuda("Memcpy", None, None, c_size_t(0), c_int(ANY_DIRECTION)),
    "StreamSynchronize": lambda cuda, stream, *_: cuda("StreamSynchronize", stream),
    "StreamQuery": lambda cuda, stream, *_: cuda("StreamQuery", stream),
    "DeviceSynchronize": lambda cuda, *_: cuda("DeviceSynchronize"),
    "EventQuery of another stream": lambda cuda, _, other: cuda("EventQuery", other),
}


@pytest.mark.parametrize("call", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_a_capture_forbids_ends_it(cuda, call):
    stream, other = cuda.stream(), cuda.event()
    cuda("EventRecord", other, cuda.stream())
    cuda.begin(stream)
    assert call(cuda, stream, other) == UNSUPPORTED
    assert cuda.end(stream)[0] == INVALIDATED
    assert cuda("StreamSynchronize", stream) == 0


def test_a_relaxed_capture_permits_what_another_stream_waits_for(cuda):
    stream, other = cuda.stream(), cuda.stream()
    cuda.begin(stream, RELAXED)
    assert cuda("StreamSynchronize", other) == 0
    assert cuda.end(stream)[0] == 0


def test_events_join_captures_only_from_within(cuda):
    stream, other, event = cuda.stream(), cuda.stream(), cuda.event()
    cuda("EventRecord", event, other)
    cuda.begin(stream)
    assert cuda("StreamWaitEvent", stream, event, c_uint(0)) == ISOLATION
    assert cuda.end(stream)[0] == INVALIDATED
    cuda.begin(stream)
    cuda("EventRecord", event, stream)
    assert cuda("EventQuery", event) == CAPTURED_EVENT
    assert cuda.end(stream)[0] == INVALIDATED
    cuda.begin(stream)
    cuda("EventRecord", event, stream)
    cuda.begin(other)
    assert cuda("StreamWaitEvent", other, event, c_uint(0)) == MERGE
    assert [cuda.end(stream)[0], cuda.end(other)[0]] == [INVALIDATED] * 2
    assert cuda("StreamWaitEvent", other, event, c_uint(0)) == CAPTURED_EVENT
