"""What runs CUDA kernels on the host: right kernels give right numbers, wrong ones are reported."""

import ctypes

import host_cuda
import pytest
import torch
from test_host_cuda import same_bits

# The rewritten notations.


@pytest.mark.parametrize(
    ("cuda", "cpp"),
    [
        ("k<<<1, n>>>(a, b);", "on_host::launch(on_host::Configuration(1, n), k, a, b);"),
        (
            "k<T<1>, 2><<<f(n), 1>>>();",
            "on_host::launch(on_host::Configuration(f(n), 1), k<T<1>, 2>);",
        ),
        ("k(const __grid_constant__ G<1, 2> g)", "k(const G<1, 2>& g)"),
        ("__shared__ T a;", "static T a; on_host::enter_shared(&a, sizeof(a));"),
        ("__shared__ T a[2][n];", "static T a[2][n]; on_host::enter_shared(&a, sizeof(a));"),
    ],
)
def test_cuda_as_cpp(cuda, cpp):
    assert host_cuda.as_cpp(cuda) == cpp


# What runs the blocks: probe.cu has kernels that are right, and wrong ones that must be reported.


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    source = host_cuda.EMULATION / "probe.cu"
    library = host_cuda.build(tmp_path_factory.mktemp("probe"), [source], "probe.so")
    return host_cuda.Runner(library)


def call(probe, name, *arguments):
    """Calls a function of the probe; returns its report."""
    function = getattr(probe.native, name)
    function.restype = ctypes.c_char_p
    values = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments
    ]
    return function(*values).decode()


ORDERS = [0, 1, 2, 3]  # as numbered, reversed, two shuffles
THREADS = 96


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_exchange_values_within_a_warp(probe, order):
    probe.set_order(order)
    values, sums = torch.arange(float(THREADS)) ** 2, torch.zeros(THREADS, 5)
    assert call(probe, "sums", values, sums) == ""
    warp, eight, sixteen = (values.view(-1, width) for width in (32, 8, 16))
    suffix = sixteen.flip(1).cumsum(1).flip(1)
    columns = [warp.sum(1).repeat_interleave(32), eight.sum(1).repeat_interleave(8)]
    neighbours = warp.clone()
    neighbours[:, :16] = warp[:, :16].unflatten(1, (8, 2)).flip(2).flatten(1)
    columns += [suffix.flatten(), warp[:, 5].repeat_interleave(32), neighbours.flatten()]
    assert torch.equal(sums, torch.stack(columns, 1))


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_make_shared_memory_safe_and_their_absence_shows(probe, order):
    probe.set_order(order)
    values, sums = torch.arange(float(THREADS)), torch.zeros(3, THREADS)
    assert call(probe, "block_sum", values, sums) == ""
    assert sums.eq(values.sum()).all()
    # Each block finds its shared memory undefined, whatever the last one left there.
    assert call(probe, "block_sum_without_barriers", values, sums) == ""
    assert (sums.isnan().sum(1) == THREADS - 1).all()


@pytest.mark.parametrize("name", ["different_barriers", "early_return", "missing_lane"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_that_not_all_threads_reach_is_reported(probe, name, order):
    probe.set_order(order)
    assert "threads wait for others that never come: thread " in call(probe, name)
    values, sums = torch.arange(float(THREADS)), torch.zeros(3, THREADS)
    assert call(probe, "block_sum", values, sums) == ""  # nothing is left over
    assert sums.eq(values.sum()).all()


@pytest.mark.parametrize("size", [8, 16])
def test_a_misaligned_vector_access_is_reported(probe, size):
    source = torch.arange(64, dtype=torch.uint8)
    for reads, writes in ((0, 0), (4, 0), (0, 4), (12, 12)):
        target = torch.zeros(64, dtype=torch.uint8)
        report = call(probe, f"copy{size}", target[writes:], source[reads:])
        aligned = reads == writes == 0
        assert report == ("" if aligned else "a vector access is not aligned")
        copied = source[reads : reads + size] if aligned else torch.zeros(size, dtype=torch.uint8)
        assert torch.equal(target[writes : writes + size], copied)


def test_a_grid_runs_every_thread_of_every_block_once(probe):
    count = torch.zeros(1, dtype=torch.int32)
    for blocks, threads in ((1, 1), (7, 33), (3, 1024)):
        before = probe.launches, probe.blocks
        assert call(probe, "count", count.zero_(), blocks, threads) == ""
        assert count.item() == blocks * threads
        assert (probe.launches, probe.blocks) == (before[0] + 1, before[1] + blocks)
    for blocks, threads in ((0, 1), (1, 0), (1, 1025)):
        assert call(probe, "count", count, blocks, threads) == "an invalid configuration"


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_conversions_are_those_of_torch(probe, name):
    dtype = getattr(torch, name)
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    loaded, stored = torch.empty(2**16), torch.empty(2**16, dtype=dtype)
    call_void(probe, f"load_{name}", values, loaded)
    assert same_bits(loaded, values.float())
    finite = loaded[loaded.isfinite()].unique()
    ties = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    infinity = torch.tensor(float("inf"))
    beside = [torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)]
    for numbers in (loaded, ties, *beside, torch.tensor([65519.9, 65520.0, 3.4e38, -3.4e38])):
        stored = torch.empty(numbers.shape, dtype=dtype)
        call_void(probe, f"store_{name}", numbers, stored)
        assert same_bits(stored, numbers.to(dtype))


def call_void(probe, name, source, target):
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (source, target))
    getattr(probe.native, name)(*pointers, ctypes.c_int64(source.numel()))
