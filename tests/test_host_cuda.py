"""The CUDA kernels without a GPU: run block by block on the host, they must give the CPU's bits.

Each step takes the blocks and the threads in another order. All arrays lie between fences.
"""

import copy
import dataclasses

import cases
import host_cuda
import numpy as np
import pytest
import torch
from moving import with_schedules
from test_lamb import OtherParts

import lrs_ext
from lrs_ext import ops

CHUNK = 2048  # the shortest that the launcher cuts
# Twice as many where gradients are close to each other and aligned.
FEW_TENSORS = 256
TENSORS_PER_LAUNCH = 300
TENSORS_IN_ARGUMENTS = 8
SHAPES = [*cases.SHAPES, (CHUNK,), (CHUNK + 5,), (3, CHUNK + 1)]
FENCE = 64  # bytes


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return host_cuda.HostCuda(tmp_path_factory.mktemp("host_cuda"))


@pytest.fixture
def cuda(built):
    """The native module with kernels on the host, in use."""
    with built.installed():
        yield built
    built.runner.set_order(0)


class Fenced:
    """Copies of tensors, `shift` elements after a multiple of 16 bytes and with fences around."""

    def __init__(self):
        self.bases = []

    def copy(self, tensor, shift):
        size = tensor.element_size()
        begin = FENCE + shift * size
        base = torch.full((begin + tensor.numel() * size + FENCE,), 0xA5, dtype=torch.uint8)
        assert base.data_ptr() % 16 == 0
        self.bases.append((base, begin, base.numel() - FENCE))
        inside = base[begin:-FENCE].view(tensor.dtype).view(tensor.shape)
        return inside.copy_(tensor.detach())

    def check(self):
        for base, begin, end in self.bases:
            assert base[:begin].eq(0xA5).all()
            assert base[end:].eq(0xA5).all()


class Twins:
    """The same parameters in an optimizer on the CUDA kernels and in one on the CPU loops.

    Args:
        shifts: of parameters, gradients and states, in elements from a multiple of 16 bytes.
        split: makes the parameter groups.
        odd_one: a parameter whose gradient lies one element further than the others.
    """

    def __init__(
        self,
        cuda,
        row,
        shapes,
        *,
        dtype=torch.float32,
        shifts=(0, 0, 0),
        split=list,
        odd_one=None,
    ):
        self.cuda, self.shifts, self.fenced, self.steps = cuda, shifts, Fenced(), 0
        self.odd_one = odd_one
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        self.ours = [self.fenced.copy(t, shifts[0]).requires_grad_() for t in tensors]
        self.theirs = [t.requires_grad_() for t in tensors]
        self.opts = [
            getattr(lrs_ext, row.name)(split(params), lr=row.lr, backend=backend, **row.options)
            for params, backend in ((self.ours, "cuda"), (self.theirs, "cpu"))
        ]

    def step(self, skip=()):
        """Takes a step with both, without gradients for the parameters `skip`, and compares."""
        for i, (a, b) in enumerate(zip(self.ours, self.theirs, strict=True)):
            b.grad = None if i in skip else torch.randn(b.shape).to(b.dtype)
            shift = self.shifts[1] + (i == self.odd_one)
            a.grad = None if i in skip else self.fenced.copy(b.grad, shift)
        self.cuda.runner.set_order(self.steps)
        for opt in self.opts:
            opt.step()
        self.steps += 1
        self.compare()
        if self.steps == 1:
            self.place_states()

    def place_states(self):
        for param, state in self.opts[0].state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == param.shape != ():
                    state[name] = self.fenced.copy(value, self.shifts[2])

    def compare(self):
        self.fenced.check()
        ours, theirs = map(self.tensors, self.opts)
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if not same_bits(ours[name], theirs[name])]
        table = self.opts[0]._preparation.tables.all[0].table
        assert table is None or not table._ticket.any()

    @staticmethod
    def tensors(opt):
        """Everything that a step changes, by name."""
        params = [param for group in opt.param_groups for param in group["params"]]
        found = {"schedule": opt.schedule_buffer.step}
        for i, param in enumerate(params):
            state = {**opt.state.get(param, {}), "counter": opt.step_counters.get(param)}
            named = {"param": param.detach(), **state}
            tensors = {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}
            found |= {f"{name} {i}": value for name, value in tensors.items()}
        return found


def same_bits(a, b):
    """Whether two tensors are equal to the bit, but for the kind of a nan."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    is_nan = a.isnan() & b.isnan()
    bits = (t.masked_fill(is_nan, 0).flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(*bits)


updates = pytest.mark.parametrize("row", cases.UPDATES, ids=str)
state_updates = pytest.mark.parametrize("row", cases.STATE_UPDATES, ids=str)
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


def same(shift):
    return (shift, shift, shift)


@pytest.mark.parametrize("shift", [0, 1, 3])
@dtypes
@updates
def test_updates(cuda, row, dtype, shift):
    """Of more tensors than a launch carries, and of as many as it does."""
    assert len(cases.SHAPES) > TENSORS_IN_ARGUMENTS
    shapes = cases.SHAPES[-TENSORS_IN_ARGUMENTS:] if shift == 3 else cases.SHAPES
    twins = Twins(cuda, row, shapes, dtype=dtype, shifts=same(shift))
    for k in range(4):
        twins.step(skip=[k, 7] if k < 3 else [])


# Parameter, gradient and states misaligned alike: lanes after a head. Otherwise: no lanes at all,
# or, of 2-byte types, lanes that begin where all are aligned.
@pytest.mark.parametrize(
    "shifts", [same(0), same(1), same(2), same(5), (1, 0, 0), (0, 3, 1), (4, 0, 4), (2, 6, 2)]
)
@dtypes
@state_updates
def test_misaligned_arrays_of_several_chunks(cuda, row, dtype, shifts):
    before = cuda.runner.blocks
    twins = Twins(cuda, row, SHAPES, dtype=dtype, shifts=shifts)
    for k in range(3):
        twins.step(skip=[k, len(SHAPES) - 1] if k < 2 else [])
    numels = [param.numel() for param in twins.ours]
    assert cuda.runner.blocks - before >= sum(-(-numel // CHUNK) for numel in numels)


@pytest.mark.parametrize("shifts", [same(0), same(1), same(2), (4, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", cases.STORAGES[1:], ids=str)
@pytest.mark.parametrize("row", cases.STORED_UPDATES, ids=str)
def test_storages(cuda, row, storage, dtype, shifts):
    shapes = [(), (0,), (127,), (128,), (7, 37), (CHUNK + 133,)]
    row = dataclasses.replace(row, options=row.options | storage.options)
    twins = Twins(cuda, row, shapes, dtype=dtype, shifts=shifts)
    for k in range(3):
        twins.step(skip=[k])


@pytest.mark.parametrize("shifts", [same(0), same(1), (4, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
@pytest.mark.parametrize("row", cases.STORED_UPDATES[1:3], ids=str)
def test_chunks_that_a_block_goes_through_in_several_rounds(
    cuda, row, storage, dtype, shifts, monkeypatch
):
    monkeypatch.setattr(ops, "chunk_elements", lambda *_: 2 * CHUNK)
    shapes = [(2 * CHUNK,), (2 * CHUNK - 5,), (CHUNK + 128,), (5 * CHUNK + 261,)]
    row = dataclasses.replace(row, options=row.options | storage.options)
    twins = Twins(cuda, row, shapes, dtype=dtype, shifts=shifts)
    for _ in range(2):
        twins.step()


@dtypes
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_scaled_and_clipped_gradients(cuda, dtype, shift):
    """Also more tensors than one launch takes."""
    row = next(row for row in cases.UPDATES if row.name == "AdamW")
    shapes = [*SHAPES, *[(3,)] * 2 * TENSORS_PER_LAUNCH] if shift == 1 else SHAPES
    twins = Twins(cuda, row, shapes, dtype=dtype, shifts=same(shift))
    for k, found_inf in enumerate([1.0, 0.0, 1.0, 0.0]):
        before = {name: tensor.clone() for name, tensor in twins.tensors(twins.opts[0]).items()}
        norms = []
        for opt in twins.opts:
            opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
        twins.step(skip=[k])
        for opt in twins.opts:
            norms.append(lrs_ext.clip_grad_norm_(opt, 0.5))
            del opt.grad_scale, opt.found_inf
        # The order of additions differs.
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        after = twins.tensors(twins.opts[0])
        if found_inf and k > 0:
            assert all(same_bits(before[name], after[name]) for name in before)
        twins.opts[0]._steps._scaling = twins.opts[1]._steps._scaling  # the same norm for both
        twins.opts[1]._steps._scaling = copy.copy(twins.opts[1]._steps._scaling)


@state_updates
def test_longer_chunks(cuda, row):
    """Enough elements for chunks of twice the least length, in tensors of no multiple of it."""
    before = cuda.runner.blocks
    shapes = [(3_000_001,), (2 * CHUNK + 1,), (1_300_000,)]
    twins = Twins(cuda, row, shapes, shifts=same(1))
    twins.step()
    numels = [param.numel() for param in twins.ours]
    passes, chunk = (2, 2 * CHUNK) if row.name == "LAMB" else (1, CHUNK)
    assert cuda.runner.blocks - before == passes * sum(-(-numel // chunk) for numel in numels)


@dtypes
@state_updates
def test_groups_with_schedules_and_options_of_their_own(cuda, row, dtype):
    lrs = [lrs_ext.rex(0.05, 6, warmup_steps=2), 0.01, lrs_ext.linear(0.1, 4, min_lr=0.02)]

    def split(params):
        return [
            {"params": params[i::3], "lr": lr, "weight_decay": 0.1 * i} for i, lr in enumerate(lrs)
        ]

    twins = Twins(cuda, row, SHAPES, dtype=dtype, split=split)
    for k in range(8):
        twins.step(skip=[k])


@dtypes
@pytest.mark.parametrize("row", cases.MOVING, ids=str)
def test_groups_with_numbers_that_move(cuda, row, dtype):
    own = with_schedules(row)
    split = [{"weight_decay": 0.25}, {}, {"maximize": True}]

    def groups(params):
        return [{"params": params[i::3], **group} for i, group in enumerate(split)]

    twins = Twins(
        cuda, dataclasses.replace(row.update, options=own), SHAPES, dtype=dtype, split=groups
    )
    for k in range(7):
        if k == 3:
            for opt in twins.opts:
                opt.param_groups[1]["weight_decay"] = lrs_ext.linear(0.5, 9)
        twins.step(skip=[k])


@dtypes
@state_updates
def test_gradients_that_are_no_numbers(cuda, row, dtype):
    twins = Twins(cuda, row, [(300,), (CHUNK + 5,)], dtype=dtype)
    twins.step()
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 6e4, 1e-7])
    for _ in range(3):
        for params in (twins.ours, twins.theirs):
            for param in params:
                param.grad[: len(special)] = special.to(dtype)
        for opt in twins.opts:
            opt.step()
        twins.compare()


# Launches and counters.

LAUNCHED = cases.STATE_UPDATES[1::2]  # hundreds of tensors take a while


# The last: 64 GiB apart is as good as unaligned, so one of both has to do.
@pytest.mark.parametrize(
    ("count", "odd_one", "launches"),
    [
        (FEW_TENSORS, 1, 1),
        (2 * FEW_TENSORS, None, 1),
        (TENSORS_PER_LAUNCH, 1, 1),
        (TENSORS_PER_LAUNCH + 1, 1, 2),
        (2 * TENSORS_PER_LAUNCH, None, 1),
        (2 * TENSORS_PER_LAUNCH + 1, None, 2),
        (3 * TENSORS_PER_LAUNCH + 1, 1, 3),  # what is left is close to each other again
    ],
)
@pytest.mark.parametrize("row", LAUNCHED, ids=str)
def test_more_tensors_than_a_launch_takes(cuda, row, count, odd_one, launches):
    twins = Twins(cuda, row, [((i + 1) % 4,) for i in range(count)], odd_one=odd_one)
    twins.step()
    before = cuda.runner.launches
    twins.step()
    passes = 2 if row.name == "LAMB" else 1
    assert cuda.runner.launches - before == passes * launches
    twins.step(skip=range(count - 1))  # all launches but the last find no gradient
    twins.step(skip=range(1, count))
    assert twins.opts[0].schedule_buffer.step.item() == 4


@pytest.mark.parametrize("longest", [0, CHUNK + 5])
@pytest.mark.parametrize("row", LAUNCHED, ids=str)
def test_the_last_launch_commits_though_it_has_no_chunks(cuda, row, longest):
    twins = Twins(cuda, row, [(longest,), *[(0,)] * 2 * TENSORS_PER_LAUNCH])
    for k in range(3):
        twins.step(skip=[k])
    assert twins.opts[0].schedule_buffer.step.item() == 3


@state_updates
def test_a_step_counts_once_and_one_without_gradients_not_at_all(cuda, row):
    twins = Twins(cuda, row, SHAPES)
    for k in range(1, 6):
        twins.step(skip=[3] if k > 2 else [])
        assert twins.opts[0].schedule_buffer.step.item() == k
    before = cuda.runner.launches
    twins.step(skip=range(len(SHAPES)))
    assert twins.opts[0].schedule_buffer.step.item() == 5
    assert cuda.runner.launches == before


def test_lambs_norms_of_parts_are_completed_between_its_passes(cuda):
    """Twice the norm is twice the learning rate, to the bit."""
    torch.manual_seed(0)
    before = [torch.randn(shape) for shape in SHAPES]
    params, others = ([b.clone().requires_grad_() for b in before] for _ in range(2))
    opts = [lrs_ext.LAMB(p, lr, backend="cuda") for p, lr in ((params, 0.01), (others, 0.02))]
    for _ in range(3):
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn(param.shape)
            other.grad = param.grad.clone()
        opts[0]._steps.launches(opts[0], False)[0][0].spread = OtherParts()
        for opt in opts:
            opt.step()
        assert all(map(torch.equal, params, others))
    assert opts[0].schedule_buffer.step.item() == 3


@pytest.mark.parametrize("row", cases.SCHEDULES, ids=str)
def test_a_schedule_is_filled_in_as_on_the_cpu(cuda, row):
    budget = () if row.name == "inverse_sqrt" else (row.total_steps,)
    schedule = getattr(lrs_ext, row.name)(row.lr, *budget, **row.options)
    native = ops.native_schedule.__wrapped__(schedule)
    points = np.array(native.points, dtype=np.int64)
    ours, theirs = torch.full((1201,), -1.0), torch.full((1201,), -1.0)
    native.fill_cuda(
        target=ours.data_ptr(), count=1200, points=points.ctypes.data, device=0, stream=0
    )
    native.fill_cpu(theirs.data_ptr(), 1200)
    assert same_bits(ours, theirs)
    assert ours[-1] == -1.0


def test_a_group_is_written_as_on_the_cpu(cuda):
    lr, hyper = torch.rand(5), {"beta1": 0.9, "weight_decay": 0.1}
    moving = {"beta1": (lr.data_ptr(), 4), "weight_decay": (lr.data_ptr(), 3)}
    ours, theirs = (ops.GroupTable(3, torch.device("cpu")).rows for _ in range(2))
    arguments = (lr.data_ptr(), 5, hyper, moving)
    cuda.module.write_group_cuda(ours[1].data_ptr(), *arguments, 0, 0)
    cuda.module.write_group_cpu(theirs[1].data_ptr(), *arguments)
    assert torch.equal(ours, theirs)
    assert ours[1].count_nonzero() == 8
