"""The CUDA backend on a GPU: the numbers of the other backends, launches and streams.

`test_optimizers.py` and `test_no_sync.py` run their matrices on this backend too; here is what only
CUDA has.
"""

import contextlib
import dataclasses
import json

import cases
import pytest
import torch

import lrs_ext
from lrs_ext.backends import unavailable_reason

pytestmark = pytest.mark.gpu

CHUNK = 16384  # the longest that the launcher cuts
SHAPES = [*cases.SHAPES, (CHUNK + 5,), (2 * CHUNK,), (3, CHUNK + 1)]


def shifted(tensor, shift=0, device="cuda"):
    """A copy that begins `shift` elements after a multiple of 16 bytes."""
    base = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=device)
    return base[shift:].view(tensor.shape).copy_(tensor.detach())


class Twins:
    """The same parameters in two optimizers; the second follows the first after each comparison."""

    def __init__(
        self, row, shapes, dtype=torch.float32, shift=0, backends=("cuda", "cpu"), split=list
    ):
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        self.shift, self.params, self.opts = shift, [], []
        for backend in backends:
            device = "cpu" if backend == "cpu" else "cuda"
            params = [shifted(t, shift, device).requires_grad_() for t in tensors]
            optimizer = getattr(lrs_ext, row.name)
            self.params.append(params)
            self.opts.append(optimizer(split(params), lr=row.lr, backend=backend, **row.options))

    def step(self, skip=()):
        ours, theirs = self.params
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            grad = torch.randn(a.shape).to(a.dtype)
            a.grad = None if i in skip else shifted(grad, self.shift, a.device)
            b.grad = None if i in skip else grad.to(b.device)
        for opt in self.opts:
            opt.step()
        self.compare(ours, theirs, cases.PARAM[ours[0].dtype])
        for name in {name for state in self.opts[0].state.values() for name in state}:
            states = [
                [opt.state[p][name] for p in params if name in opt.state.get(p, {})]
                for opt, params in zip(self.opts, self.params, strict=True)
            ]
            self.compare(*states, cases.STATE)

    @torch.no_grad()
    def compare(self, ours, theirs, tolerance):
        a, b = (torch.cat([t.flatten() for t in ts]).cpu().double() for ts in (ours, theirs))
        # Either may be a tolerance away from the exact result.
        rtol, atol = 2 * tolerance.rtol, 2 * tolerance.atol
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)


updates = pytest.mark.parametrize("row", cases.UPDATES, ids=str)
state_updates = pytest.mark.parametrize("row", cases.STATE_UPDATES, ids=str)
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


@pytest.mark.parametrize("shift", [0, 1, 3])
@dtypes
@updates
def test_updates_equal_those_of_the_cpu_backend(row, dtype, shift):
    twins = Twins(row, cases.SHAPES, dtype, shift)
    for k in range(4):
        twins.step(skip=[k, 7] if k < 3 else [])


@pytest.mark.parametrize("shift", [0, 1])
@dtypes
@state_updates
def test_tensors_of_several_chunks(row, dtype, shift):
    twins = Twins(row, SHAPES, dtype, shift)
    for k in range(3):
        twins.step(skip=[k, len(SHAPES) - 1] if k < 2 else [])


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
@dtypes
@state_updates
def test_arrays_that_are_all_misaligned_alike(row, dtype, shift):
    """The first elements go one by one up to an address of 16 bytes, the rest in lanes."""
    twins = Twins(row, [(1,), (7,), (257,), (CHUNK + 5,)], dtype, shift)
    twins.step()
    for state in twins.opts[0].state.values():
        for name in state.keys() - {"step"}:
            state[name] = shifted(state[name], shift)
    for _ in range(3):
        twins.step()


@state_updates
def test_groups_have_their_own_schedules_and_options(row):
    lrs = [lrs_ext.rex(0.05, 6, warmup_steps=2), 0.01, lrs_ext.linear(0.1, 4, min_lr=0.02)]

    def split(params):
        groups = [{"params": params[i::3], "lr": lrs[i], "weight_decay": 0.1 * i} for i in range(3)]
        groups[1]["lr"] = torch.tensor(0.01, device=params[0].device)
        return groups

    twins = Twins(row, SHAPES, split=split)
    for k in range(8):
        ours, theirs = (opt.current_lr() for opt in twins.opts)
        assert ours == pytest.approx(theirs, rel=cases.PARAM[torch.float32].rtol)
        twins.step(skip=[k])


def every_float():
    """Every mantissa with exponents of 0 and 1, of all others 4,096; 0, infinity and nan."""
    mantissas = torch.arange(2**23, dtype=torch.int32)
    near_one = [mantissas + (exponent << 23) for exponent in (127, 128)]
    exponents = torch.arange(255, dtype=torch.int32) << 23
    others = (exponents[:, None] + mantissas[:: 2**11] + 1).flatten()
    special = torch.tensor([0, 0x7F800000, 0x7FC00000], dtype=torch.int32)
    return torch.cat([*near_one, others, special]).view(torch.float32)


@pytest.mark.parametrize("eps", [0.0, 1e-40, 1e-8, 1.0])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_roots_and_reciprocals_are_rounded_to_nearest(state_dtype, eps):
    """Adam's move with betas of 0 is that of g / (|g| + eps): equal to the CPU's to the bit."""
    moved = []
    for device in ("cuda", "cpu"):
        param = torch.zeros_like(every_float(), device=device).requires_grad_()
        param.grad = every_float().to(device)
        options = {"betas": (0.0, 0.0), "eps": eps, "state_dtype": state_dtype}
        lrs_ext.Adam([param], lr=1.0, **options).step()
        moved.append(param.detach().cpu())
    is_nan = [move.isnan() for move in moved]
    assert torch.equal(*is_nan)
    assert torch.equal(*(move[~is_nan[0]] for move in moved))


@pytest.mark.parametrize("count", [16, 17, 400, 3801, 7600, 7601])
@state_updates
def test_more_tensors_than_a_launch_takes(row, count):
    twins = Twins(row, [(1 + i % 3,) for i in range(count)])
    twins.step()
    twins.step(skip=range(count - 1))  # all launches but the last find no gradient
    twins.step(skip=range(1, count))
    assert [opt.schedule_buffer.step.item() for opt in twins.opts] == [3, 3]


@dtypes
@state_updates
def test_triton_and_cuda_agree(row, dtype):
    reason = unavailable_reason("triton", "cuda")
    if reason is not None:
        pytest.skip(reason)
    twins = Twins(row, SHAPES, dtype, backends=("cuda", "triton"))
    for k in range(3):
        twins.step(skip=[k, len(SHAPES) - 1] if k < 2 else [])


@pytest.mark.parametrize("row", cases.SCHEDULES, ids=str)
def test_a_buffer_filled_on_the_device_holds_the_float32_of_the_host(row):
    budget = () if row.total_steps is None else (row.total_steps,)
    schedule = getattr(lrs_ext, row.name)(row.lr, *budget, **row.options)
    capacity = schedule.capacity if row.total_steps is None else 1200
    buffer = lrs_ext.ScheduleBuffer(1, capacity, "cuda").fill_(0, schedule)
    expected = torch.from_numpy(schedule.values(0, capacity)).float()
    # Both are not negative: neighbouring floats have neighbouring bits.
    ulps = buffer.values[0].cpu().view(torch.int32) - expected.view(torch.int32)
    assert ulps.abs().max() <= 1


@state_updates
def test_a_step_counts_once_and_leaves_the_ticket_at_zero(row):
    twins = Twins(row, SHAPES)
    opt, skipped = twins.opts[0], twins.params[0][3]
    for k in range(1, 6):
        twins.step(skip=[3] if k > 2 else [])
        assert opt.schedule_buffer.step.item() == k
        assert not opt._preparation.tables.all[0].table._ticket.any()
    if row.name != "SGD":  # it keeps no count
        counts = {p: int(state["step"]) for p, state in opt.state.items()}
        assert counts.pop(skipped) == 2
        assert set(counts.values()) == {5}
    for param in twins.params[0]:
        param.grad = None
    opt.step()
    assert opt.schedule_buffer.step.item() == 5


def run(row, shapes, steps, dtype=torch.float32):
    """Parameters and states after some steps with a schedule and fixed random numbers."""
    torch.manual_seed(1)
    params = [torch.randn(s).to("cuda", dtype).requires_grad_() for s in shapes]
    opt = getattr(lrs_ext, row.name)(params, lr=lrs_ext.rex(row.lr, steps), **row.options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape).to("cuda", dtype)
        opt.step()
    return [*params, *(t for state in opt.state.values() for t in state.values())]


@dtypes
@state_updates
def test_runs_are_identical_to_the_bit(row, dtype):
    first = run(row, [*SHAPES, (1_000_003,)], 3, dtype)
    for _ in range(19):
        again = run(row, [*SHAPES, (1_000_003,)], 3, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def on(device, row, dtype):
    """Parameters and states, on the CPU, after steps with chunks of several rounds of a block."""
    generator = torch.Generator().manual_seed(0)

    def random(shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    params = [random(shape).requires_grad_() for shape in [(5_000_003,), (3 * CHUNK,), (3, 700)]]
    opt = getattr(lrs_ext, row.name)(params, lr=row.lr, **row.options)
    for _ in range(2):
        for param in params:
            param.grad = random(param.shape)
        opt.step()
    states = [opt.state[param] for param in params]
    return [t.detach().cpu() for t in (*params, *(t for s in states for t in s.values()))]


@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=str)
@pytest.mark.parametrize("storage", cases.STORAGES[3:], ids=str)
@pytest.mark.parametrize("row", [cases.STORED_UPDATES[i] for i in (2, 4)], ids=str)
def test_large_tensors_of_every_storage_equal_those_of_the_cpu_to_the_bit(row, storage, dtype):
    row = dataclasses.replace(row, options=row.options | storage.options)
    found, expected = (on(device, row, dtype) for device in ("cuda", "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# How the kernels are launched.


@contextlib.contextmanager
def sync_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(row, lr, shapes=((33,), (5, 7))):
    params = [torch.randn(shape).cuda().requires_grad_() for shape in shapes]
    return params, getattr(lrs_ext, row.name)(params, lr=lr, backend="cuda", **row.options)


@state_updates
def test_no_step_waits_whoever_sets_the_learning_rate(row):
    params, opt = make(row, lrs_ext.rex(0.1, 5, warmup_steps=2))
    tensor = torch.tensor(0.01, device="cuda")
    schedule = lrs_ext.linear(0.1, 4, sampling=(0.5,))
    with sync_is_an_error():
        for lr in (None, None, 0.02, 0.03, tensor, None, schedule, None, None):
            if lr is not None:
                opt.param_groups[0]["lr"] = lr
            for param in params:
                param.grad = torch.randn_like(param)
            opt.step()
            opt.zero_grad()
    assert opt.schedule_buffer.step.item() == 9


@state_updates
def test_a_step_is_one_kernel_or_lambs_two_and_nothing_else(row, tmp_path):
    params, opt = make(row, lrs_ext.rex(0.1, 20), SHAPES)
    for param in params:
        param.grad = torch.randn_like(param)
    opt.step()  # makes states and tables
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            opt.step()
        torch.cuda.synchronize()
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    on_device = {"kernel", "gpu_memcpy", "gpu_memset"}
    names = [event["name"] for event in events if event.get("cat") in on_device]
    kernels = (
        ["lamb_moments_kernel", "lamb_params_kernel"] if row.name == "LAMB" else ["step_kernel"]
    )
    assert len(names) == 5 * len(kernels)
    assert all(name in found for name, found in zip(kernels * 5, names, strict=True))


@state_updates
def test_a_step_runs_on_the_current_stream(row):
    """A gradient is written late on the stream; a step on another one would find the old one."""
    params, opt = make(row, 0.1, [(33,)])
    twin, other = make(row, 0.1, [(33,)])
    with torch.no_grad():
        twin[0].copy_(params[0])
    for param in (*params, *twin):
        param.grad = torch.ones_like(param)
    opt.step()
    other.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        params[0].grad.fill_(-3.0)
        opt.step()
    torch.cuda.synchronize()
    twin[0].grad.fill_(-3.0)
    other.step()
    assert torch.equal(params[0], twin[0])
