"""The native core from below: ranges, tables, and who may run it."""

import itertools

import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrs_ext import _C, ops

CHUNK = 2048


# Ranges: how a kernel cuts a tensor into chunks, and a chunk into 16-byte lanes and the rest.


@st.composite
def layouts(draw):
    """Sizes and addresses of a parameter, its gradient and a float32 state."""
    size = draw(st.sampled_from([2, 4]))
    element_bytes = [size, size, 4]
    offsets = [draw(st.integers(0, 40)) for _ in element_bytes]
    if draw(st.booleans()):  # the same element of every array is aligned
        element = draw(st.integers(0, 40))
        offsets = [element] * 3
    addresses = [4096 + n * b for n, b in zip(offsets, element_bytes, strict=True)]
    chunk = draw(st.sampled_from([1, 3, 7, 8, 16, 100, 2048]))
    lane = draw(st.sampled_from([4, 16 // size]))
    return draw(st.integers(0, 20 * chunk)), chunk, lane, addresses, element_bytes


def is_aligned(element, lane, addresses, element_bytes):
    pairs = zip(addresses, element_bytes, strict=True)
    return all((address + element * size) % min(16, lane * size) == 0 for address, size in pairs)


@given(layouts())
def test_ranges_tile_a_tensor_and_lanes_are_aligned(layout):
    numel, chunk, lane, addresses, element_bytes = layout
    position = 0
    for begin, first, last, end in _C.chunk_ranges(*layout):
        assert begin == position
        assert begin <= first <= last <= end
        assert end - begin == min(chunk, numel - begin)
        aligned = [i for i in range(begin, end) if is_aligned(i, lane, addresses, element_bytes)]
        lanes = (last - first) // lane
        assert (last - first) % lane == 0
        # As many lanes as fit behind the first aligned element, none if there is no such element.
        assert lanes == ((end - aligned[0]) // lane if aligned else 0)
        assert lanes == 0 or first == aligned[0]
        position = end
    assert position == numel


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**33 + 5, 2**45 + 3])
def test_ranges_of_more_elements_than_32_bits_count(numel):
    chunk = 2 ** (numel.bit_length() - 3)
    ranges = _C.chunk_ranges(numel, chunk, 4, [4096 + 4] * 3, [4, 4, 4])
    assert len(ranges) == -(-numel // chunk)
    assert [r[0] for r in ranges] == [i * chunk for i in range(len(ranges))]
    assert [r[3] for r in ranges] == [*(r[0] for r in ranges[1:]), numel]
    assert all(first == begin + 3 for begin, first, _, end in ranges if end - begin > 3)


# Tables: the rows that a kernel reads.


class Tensors:
    """Parameters in groups with states, as an optimizer keeps them, and their StepTensors."""

    def __init__(self, groups, names=("exp_avg", "exp_avg_sq"), without_state=()):
        self.param_lists, self.state, self.names = groups, {}, [list(names) for _ in groups]
        for param in [param for group in groups for param in group]:
            if not any(param is other for other in without_state):
                self.state[param] = {name: torch.rand_like(param).float() for name in names}
                self.state[param]["step"] = torch.tensor(3.0)
        self.build()

    def build(self):
        steps = [self.state.get(p, {}).get("step") for group in self.param_lists for p in group]
        tables = self.param_lists, self.state, self.names, steps
        self.native = _C.StepTensors(ops._tensor_access(), *tables)

    def refresh(self, gradients=None):
        return self.native.refresh(self.param_lists, self.state, gradients)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


SHAPES = [(), (0,), (1,), (CHUNK,), (3, 0, 2), (3 * CHUNK + 1,), (5, 7), (CHUNK - 1,)]


def test_a_table_covers_every_element_of_every_tensor_once():
    groups = [[leaf(*shape, dtype=dtype) for shape in SHAPES] for dtype in cases.DTYPES]
    tensors = Tensors(groups)
    step = _C.Step("adam", tensors.native, CHUNK)
    params = [param for group in groups for param in group]
    covered = [torch.zeros(param.numel(), dtype=torch.int64) for param in params]
    for tensor, index in step.chunk_rows.tolist():
        part = covered[tensor][index * CHUNK : (index + 1) * CHUNK]
        assert part.numel() > 0
        part += 1
    for param, counts in zip(params, covered, strict=True):
        assert counts.shape == (param.numel(),)
        assert counts.eq(1).all()


def test_a_row_has_the_addresses_size_group_and_dtype_of_its_tensor():
    groups = [[leaf(*shape, dtype=dtype) for shape in SHAPES] for dtype in cases.DTYPES]
    idle = [groups[0][3], groups[2][0]]
    tensors = Tensors(groups, without_state=idle)
    rows = _C.Step("adam", tensors.native, CHUNK).tensor_rows.tolist()
    expected = []
    positions = itertools.count()  # among all, those without a state included
    for index, group in enumerate(groups):
        for param in group:
            position = next(positions)
            if any(param is other for other in idle):
                continue
            state = tensors.state[param]
            states = [state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr(), 0]
            uncompressed = [0, 0, 0, 0]  # no scales, no remainder
            counter = state["step"].data_ptr()
            code = cases.DTYPES.index(param.dtype)
            rest = [counter, param.numel(), index, code, position]
            expected.append([param.data_ptr(), *states, *uncompressed, *rest])
    assert rows == expected


def test_a_row_has_the_addresses_of_scales_and_remainder():
    params = [leaf(3, 100, dtype=dtype) for dtype in cases.DTYPES[:2]]
    names = ["exp_avg", "exp_avg_sq"]
    state = {}
    for param in params:
        state[param] = {name: torch.zeros_like(param, dtype=torch.uint8) for name in names}
        state[param] |= {f"{name}_scale": torch.zeros(3) for name in names}
    state[params[1]]["master_remainder"] = torch.zeros_like(params[1], dtype=torch.int16)
    steps = [torch.tensor(0.0) for _ in params]
    access = ops._tensor_access()
    tensors = _C.StepTensors(access, [params], state, [names], steps, "block8")
    for row, param in zip(
        _C.Step("adam", tensors, CHUNK, "block8").tensor_rows.tolist(), params, strict=True
    ):
        own = state[param]
        assert row[1:4] == [own["exp_avg"].data_ptr(), own["exp_avg_sq"].data_ptr(), 0]
        scales = [own[f"{name}_scale"].data_ptr() for name in names]
        assert row[4:7] == [*scales, 0]
        remainder = own.get("master_remainder")
        assert row[7] == (0 if remainder is None else remainder.data_ptr())


MISMATCHES = {
    "codes of another type": lambda s: s.update(exp_avg=torch.zeros(300)),
    "too few scales": lambda s: s.update(exp_avg_scale=torch.zeros(2)),
    "scales of another type": lambda s: s.update(exp_avg_scale=torch.zeros(3).double()),
    "a remainder of another type": lambda s: s.update(master_remainder=torch.zeros(300)),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_arrays_of_another_kind_than_the_storage_are_refused(mismatch):
    param = leaf(300, dtype=torch.bfloat16)
    state = {
        "exp_avg": torch.zeros(300, dtype=torch.uint8),
        "exp_avg_scale": torch.zeros(3),
        "master_remainder": torch.zeros(300, dtype=torch.int16),
    }
    tables = [[param]], {param: state}, [["exp_avg"]], [torch.tensor(0.0)]
    _C.StepTensors(ops._tensor_access(), *tables, "block8")
    MISMATCHES[mismatch](state)
    with pytest.raises(ValueError):  # noqa: PT011 - of the native core, for no user's eyes
        _C.StepTensors(ops._tensor_access(), *tables, "block8")


@pytest.mark.parametrize(("state_type", "dtype"), [("float32", torch.float32), ("bfloat16", None)])
def test_more_states_than_there_is_room_for_are_refused(state_type, dtype):
    param, count = leaf(300), 3 if state_type == "bfloat16" else 4
    state = {f"state{i}": torch.zeros(300, dtype=dtype or torch.bfloat16) for i in range(count)}
    tables = [[param]], {param: state}, [list(state)], [torch.tensor(0.0)]
    with pytest.raises(ValueError, match="more states than the storage has room for"):
        _C.StepTensors(ops._tensor_access(), *tables, state_type)


def test_a_chunk_is_a_whole_number_of_quantisation_blocks():
    with pytest.raises(ValueError, match="whole number of quantisation blocks"):
        _C.Step("adam", Tensors([[leaf(3)]]).native, 2045)


def test_tables_of_many_tensors():
    params = [leaf(1 + i % 3) for i in range(9001)]
    tensors = Tensors([params[:4500], params[4500:]])
    step = _C.Step("adam", tensors.native, CHUNK)
    assert step.chunk_rows.tolist() == [[i, 0] for i in range(len(params))]
    assert step.tensor_rows[:, 0].tolist() == [param.data_ptr() for param in params]
    assert step.tensor_rows[:, 10].tolist() == [0] * 4500 + [1] * 4501


MOVING = ("weight_decay", "momentum", "beta1")


@pytest.mark.parametrize("name", MOVING)
def test_a_group_that_moves_has_the_address_and_length_of_its_values(name):
    values, lr, row = torch.rand(5), torch.rand(3), torch.zeros(_C.group_bytes // 8).long()
    hyper = {name: 0.5}
    _C.write_group_cpu(row.data_ptr(), lr.data_ptr(), 3, hyper)
    fixed = row.clone()
    assert fixed.count_nonzero() == 3
    assert fixed[-4:].eq(0).all()
    moving = {name: (values.data_ptr(), 5)}
    _C.write_group_cpu(row.data_ptr(), lr.data_ptr(), 3, hyper, moving)
    places = [values.data_ptr(), 5]
    assert row[-4:].tolist() == ([*places, 0, 0] if name == MOVING[0] else [0, 0, *places])
    assert torch.equal(row[:-4], fixed[:-4])


def test_no_other_number_moves():
    lr, row = torch.rand(3), torch.zeros(_C.group_bytes // 8).long()
    with pytest.raises(KeyError, match="eps"):
        _C.write_group_cpu(row.data_ptr(), lr.data_ptr(), 3, {}, {"eps": (lr.data_ptr(), 3)})
