"""The native core from below: ranges, tables, what makes a table stale, and who may run it."""

import ctypes
import gc
import itertools
import re
import weakref

import cases
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import lrs_ext
from lrs_ext import _C, ops
from lrs_ext.state_storage import Storage

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


def test_gradient_addresses_are_those_of_the_moment(access):
    params = [leaf(3), leaf(0), leaf(5), leaf(7)]
    tensors = Tensors([params])
    step = _C.Step("adam", tensors.native, CHUNK)
    assert tensors.refresh()
    assert not tensors.native.has_gradients
    assert step.gradient_addresses.tolist() == [0, 0, 0, 0]
    for _ in range(3):
        for param in params[:3]:
            param.grad = torch.randn_like(param)
        assert tensors.refresh()
        assert tensors.native.has_gradients
        first, empty, third, last = step.gradient_addresses.tolist()
        assert (first, third, last) == (params[0].grad.data_ptr(), params[2].grad.data_ptr(), 0)
        assert empty != 0  # an empty gradient is still one: its tensor's counter advances


MOVING = ("weight_decay", "momentum", "beta1")


@pytest.mark.parametrize("name", MOVING)
def test_a_group_that_moves_has_the_address_and_length_of_its_values(name):
    values, lr, row = torch.rand(5), torch.rand(3), torch.zeros(_C.group_bytes // 8).long()
    hyper = {name: 0.5}
    _C.write_group_cpu(row.data_ptr(), lr.data_ptr(), 3, 1.0, hyper)
    fixed = row.clone()
    assert fixed.count_nonzero() == 4
    assert fixed[-4:].eq(0).all()
    moving = {name: (values.data_ptr(), 5)}
    _C.write_group_cpu(row.data_ptr(), lr.data_ptr(), 3, 1.0, hyper, moving)
    places = [values.data_ptr(), 5]
    assert row[-4:].tolist() == ([*places, 0, 0] if name == MOVING[0] else [0, 0, *places])
    assert torch.equal(row[:-4], fixed[:-4])


def test_no_other_number_moves():
    lr, row = torch.rand(3), torch.zeros(_C.group_bytes // 8).long()
    with pytest.raises(KeyError, match="eps"):
        _C.write_group_cpu(row.data_ptr(), lr.data_ptr(), 3, 1.0, {}, {"eps": (lr.data_ptr(), 3)})


# What makes a table stale. Each change is applied to tensors that have just been refreshed.


def put(param, data, grad):
    param.data = data
    param.grad = grad


@torch.no_grad()
def set_memory(tensor, source):
    tensor.set_(source)


def grow(tensor):
    tensor.untyped_storage().resize_(1 << 20)


def swap(entries, one, other):
    entries[one], entries[other] = entries[other], entries[one]


STALE = {
    "parameter replaced": lambda t, p: t.param_lists[0].__setitem__(0, leaf(4, 5)),
    "parameter added": lambda t, p: t.param_lists[1].append(leaf(2)),
    "parameter removed": lambda t, p: t.param_lists[1].pop(),
    "group added": lambda t, p: t.param_lists.append([leaf(2)]),
    "parameter's data swapped": lambda t, p: put(p, p.data.clone(), torch.randn(4, 5)),
    "parameter shortened": lambda t, p: put(p, p.data[:2], torch.randn(2, 5)),
    "parameter transposed": lambda t, p: put(p, p.data.t(), torch.randn(5, 4)),
    "state replaced": lambda t, p: t.state[p].update(exp_avg=torch.zeros(4, 5)),
    "state's data swapped": lambda t, p: put(t.state[p]["exp_avg_sq"], torch.zeros(4, 5), None),
    "state entry removed": lambda t, p: t.state[p].pop("exp_avg"),
    "step counter replaced": lambda t, p: t.state[p].update(step=torch.tensor(3.0)),
    "state of a parameter replaced": lambda t, p: t.state.update({p: dict(t.state[p])}),
    "state of a parameter removed": lambda t, p: t.state.pop(p),
    "state of a parameter added": lambda t, p: t.state.update({t.param_lists[1][1]: {}}),
    "states cleared": lambda t, p: t.state.clear(),
    "state dictionary replaced": lambda t, p: setattr(t, "state", dict(t.state)),
    "first gradient": lambda t, p: setattr(t.param_lists[1][1], "grad", torch.randn(6)),
    "sparse gradient": lambda t, p: setattr(p, "grad", torch.randn(4, 5).to_sparse()),
    "gradient with other strides": lambda t, p: setattr(p, "grad", torch.randn(5, 4).t()),
    "gradient with other strides in place": lambda t, p: put(p.grad, torch.randn(5, 4).t(), None),
    "gradient of another shape in place": lambda t, p: put(p.grad, torch.randn(5, 4), None),
    "gradient resized": lambda t, p: p.grad.resize_(2, 5),
    "gradient resized at its place": lambda t, p: p.grad.resize_(5, 4),
    "gradient without memory": lambda t, p: p.grad.untyped_storage().resize_(0),
    "gradient of another dtype in its place": lambda t, p: put(
        p.grad, p.grad.data.view(torch.int32), None
    ),
    "negated gradient": lambda t, p: setattr(p, "grad", torch._neg_view(torch.randn(4, 5))),
    "parameter's data swapped for a view": lambda t, p: put(p, torch.randn(8, 5)[4:], p.grad),
    "parameter's storage swapped": lambda t, p: set_memory(p, torch.randn(4, 5)),
    "state's storage swapped": lambda t, p: t.state[p]["exp_avg"].set_(torch.zeros(4, 5)),
    "state's storage resized": lambda t, p: grow(t.state[p]["exp_avg"]),
    "state exchanged for another": lambda t, p: swap(t.state[p], "exp_avg", "exp_avg_sq"),
    "state of another parameter replaced": lambda t, p: t.state[t.param_lists[1][0]].update(
        exp_avg=torch.zeros(7)
    ),
    "entry of a state added": lambda t, p: t.state[p].update(max_exp_avg_sq=torch.zeros(4, 5)),
}


@pytest.fixture(params=["direct", "objects"])
def access(request, monkeypatch):
    """Both ways of reading gradients: the second is for a torch that lacks a function."""
    if request.param == "objects":
        access = ops._object_access(ctypes.CDLL(torch._C.__file__))
        monkeypatch.setattr(ops, "_tensor_access", lambda: access)
    return request.param


@pytest.fixture
def tensors(access):
    """Two groups; the last parameter has no state and no gradient yet."""
    groups = [[leaf(4, 5), leaf(3)], [leaf(7), leaf(6)]]
    tensors = Tensors(groups, without_state=[groups[1][1]])
    for param in [*groups[0], groups[1][0]]:
        param.grad = torch.randn_like(param)
    assert tensors.refresh()
    return tensors


@pytest.mark.parametrize("change", STALE)
def test_a_changed_tensor_makes_the_table_stale(tensors, change):
    STALE[change](tensors, tensors.param_lists[0][0])
    assert not tensors.refresh()


def test_a_state_that_is_back_is_no_change(tensors):
    param = tensors.param_lists[0][0]
    state, array = tensors.state[param], tensors.state[param]["exp_avg"]
    for _ in range(2):
        state["exp_avg"] = torch.zeros(4, 5)
        state["exp_avg"] = array
        assert tensors.refresh()
    state["exp_avg"] = torch.zeros(4, 5)
    assert not tensors.refresh()
    assert not tensors.refresh()


def test_a_changed_dtype_in_the_same_memory_makes_the_table_stale(access):
    param = leaf(8, dtype=torch.float16)
    tensors = Tensors([[param]])
    address = param.data_ptr()
    param.data = param.data.view(torch.bfloat16)
    assert param.data_ptr() == address
    assert tensors.refresh()  # without a gradient it takes no part
    param.grad = torch.randn_like(param)
    assert not tensors.refresh()


GRADIENTS = {
    "dtype": lambda: torch.randn(4, 5, dtype=torch.bfloat16),
    "shape": lambda: torch.randn(4, 4),
    "dimensions": lambda: torch.randn(20),
    "device": lambda: torch.randn(4, 5, device="meta"),
}


@pytest.mark.parametrize("difference", GRADIENTS)
def test_a_given_gradient_must_match_its_parameter(tensors, difference):
    rest = [torch.randn(3), None, None]
    assert tensors.refresh([torch.randn(4, 5), *rest])
    assert not tensors.refresh([GRADIENTS[difference](), *rest])


def test_new_gradients_and_values_leave_the_table_valid(tensors):
    param, other = tensors.param_lists[0]
    param.grad = torch.randn(4, 5)
    other.grad = None
    with torch.no_grad():
        param.add_(1)
    tensors.state[param]["exp_avg"].zero_()
    assert tensors.refresh()


def test_a_state_that_belongs_to_no_parameter_is_nobodys_business(tensors):
    tensors.state["note"] = 5
    tensors.build()
    assert tensors.refresh()


# Reading gradients without Python objects, and what takes the other way.


def test_this_torch_has_what_direct_reading_takes():
    assert ops._tensor_access().is_direct


def test_a_torch_that_has_not_been_tried_is_read_through_objects(monkeypatch):
    monkeypatch.setattr(ops, "_LAST_DIRECT_TORCH", (2, 0))
    assert not ops._tensor_access.__wrapped__().is_direct


@pytest.mark.parametrize("missing", ops._DIRECT_FUNCTIONS)
def test_a_torch_without_one_of_the_functions_is_read_through_objects(missing, monkeypatch):
    monkeypatch.setitem(ops._DIRECT_FUNCTIONS, missing, "aoti_torch_no_such_function")
    assert not ops._tensor_access.__wrapped__().is_direct


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("dim", "aoti_torch_get_numel"),
        ("sizes", "aoti_torch_get_strides"),
        ("is_negated", "_ZN2at6native7is_conjERKNS_6TensorE"),
        ("bump_version", "_ZN2at6native6is_negERKNS_6TensorE"),
    ],
)
def test_functions_that_do_something_else_are_not_used(name, other, monkeypatch):
    monkeypatch.setitem(ops._DIRECT_FUNCTIONS, name, other)
    assert not ops._tensor_access.__wrapped__().is_direct


@pytest.fixture
def plain_gradient():
    """A parameter whose gradient no Python object stands for, as after a backward pass."""
    param = leaf(4, 5)
    param.sum().backward()
    return param


def test_gradients_get_no_objects(plain_gradient):
    tensors = Tensors([[plain_gradient]])
    before = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    assert tensors.refresh()
    assert tensors.native.has_gradients
    assert sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()) == before


@pytest.mark.parametrize("end", ["refresh", "failed refresh", "destruction"])
def test_gradients_are_held_until_they_are_no_longer_needed(access, end):
    param = leaf(4, 5)
    tensors = Tensors([[param]])
    memory = np.ones((4, 5), dtype=np.float32)
    param.grad, held = torch.from_numpy(memory), weakref.ref(memory)
    del memory
    assert tensors.refresh()
    param.grad = None
    gc.collect()
    assert held() is not None
    if end == "refresh":
        assert tensors.refresh()
        assert not tensors.native.has_gradients
    elif end == "failed refresh":
        tensors.state.clear()
        assert not tensors.refresh()
    else:
        tensors.native = None
    assert held() is None


def test_a_gradient_is_let_go_after_the_step(access):
    param = torch.nn.Parameter(torch.ones(3))
    opt = lrs_ext.SGD([param], lr=1.0)
    for _ in range(2):
        memory = np.full(3, 2.0, dtype=np.float32)
        param.grad, held = torch.from_numpy(memory), weakref.ref(memory)
        del memory
        opt.step()
        param.grad = None
        assert held() is None
    assert param.tolist() == [-3.0] * 3


def test_each_step_counts_as_a_change(access):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = lrs_ext.SGD(params, lr=1.0)
    for grads in ((True, True), (True, False), (False, True)):
        for param, has_gradient in zip(params, grads, strict=True):
            param.grad = torch.ones(3) if has_gradient else None
        before = [param._version for param in params]
        opt.step()
        assert [param._version for param in params] == [
            version + has for version, has in zip(before, grads, strict=True)
        ]


def test_a_tensor_of_inference_mode_has_no_count_of_changes(access):
    with torch.inference_mode():
        param, other = torch.ones(3), torch.ones(3)
        param.grad, other.grad = torch.ones(3), torch.ones(3)
        opt = lrs_ext.SGD([param, other], lr=1.0)
        for _ in range(2):
            opt.step()
    assert param.tolist() == other.tolist() == [-1.0] * 3


def trained():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    opt = lrs_ext.AdamW(model.parameters(), lr=lrs_ext.rex(0.1, total_steps=8))
    for step in range(8):
        opt.zero_grad()
        model(torch.randn(6, 5)).square().sum().backward()
        if step == 3:
            model[0].bias.grad = None
        if step == 5:
            model[2].weight.data = model[2].weight.data.clone()
        opt.step()
    return [*model.parameters(), *(a for state in opt.state.values() for a in state.values())]


def test_both_ways_train_the_same(monkeypatch):
    directly = trained()
    access = ops._object_access(ctypes.CDLL(torch._C.__file__))
    monkeypatch.setattr(ops, "_tensor_access", lambda: access)
    through_objects = trained()
    assert len(directly) == 16
    assert all(map(torch.equal, directly, through_objects))


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_gradients_read(tensors):
    with Watch() as watch:
        assert tensors.refresh()
    assert watch.seen.count(torch.Tensor.grad.__get__) == 4


class Tenfold(torch.Tensor):
    """Whose gradient is another one in Python than in C++."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 10 * result if func == torch.Tensor.grad.__get__ else result


def test_the_gradient_of_a_subclass_is_what_it_says(access):
    param = torch.ones(3).as_subclass(Tenfold).requires_grad_()
    tensors = Tensors([[param]])
    param.grad = torch.ones(3)
    step = _C.Step("adam", tensors.native, CHUNK)
    assert tensors.refresh()
    [address] = step.gradient_addresses.tolist()
    assert ctypes.c_float.from_address(address).value == 10.0


def test_a_parameter_that_is_no_leaf_any_more_warns(access):
    param = leaf(3)
    tensors = Tensors([[param]])
    with torch.no_grad():
        param.requires_grad_(False)
    param.mul_(leaf(3))
    with pytest.warns(UserWarning, match="not a leaf"):
        assert tensors.refresh()


# Backends.


def test_an_unusable_backend_is_refused_with_the_reason_and_the_way_out():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    with pytest.raises(ValueError, match=r"must be one of .*'cuda', 'triton', 'cpu', 'reference'"):
        ops.select_backend("tpu", cpu)
    with pytest.raises(RuntimeError, match=r"'cuda' cannot be used .* on cpu: .*; available") as e:
        ops.select_backend("cuda", cpu)
    available = re.search(r"available here: \[(.*)\]", str(e.value))[1]
    assert "'cpu'" in available
    assert "'reference'" in available
    assert "'cuda'" not in available
    with pytest.raises(RuntimeError, match=r"'cpu' .* on meta: it updates CPU tensors, not meta"):
        ops.select_backend("cpu", meta)
    with pytest.raises(RuntimeError, match=r"no kernel .* on meta: .*backend='reference' runs any"):
        ops.select_backend(None, meta)


def test_the_environment_chooses_the_backend_unless_an_argument_does(monkeypatch):
    cpu = torch.device("cpu")
    assert ops.select_backend(None, cpu) == "cpu"
    monkeypatch.setenv("LRS_EXT_BACKEND", "reference")
    assert ops.select_backend(None, cpu) == "reference"
    assert ops.select_backend("cpu", cpu) == "cpu"
    monkeypatch.setenv("LRS_EXT_BACKEND", "")
    assert ops.select_backend(None, cpu) == "cpu"


@pytest.mark.parametrize(
    ("state_dtype", "bandwidth", "longest"),
    [
        (torch.float32, 0.0, 2048),
        (torch.float32, 3.35e12, 2048),
        (torch.float32, 4.8e12, 4096),
        (torch.bfloat16, 3.35e12, 4096),
        (torch.bfloat16, 4.8e12, 8192),
        (torch.uint8, 4.8e12, 16384),
    ],
)
def test_chunks_of_faster_memory_are_longer(state_dtype, bandwidth, longest, monkeypatch):
    monkeypatch.setattr(_C, "memory_bandwidth", lambda device: bandwidth, raising=False)
    arguments = ("cuda", "adam", Storage(state_dtype=state_dtype))
    device = torch.device("cuda", 0)
    assert ops._chunk_elements(*arguments, 2**26, device) == longest
    assert ops._chunk_elements(*arguments, 2**10, device) == 1024
