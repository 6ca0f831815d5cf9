"""What a step reads of live tensors: gradients by two ways, and what makes its table stale."""

import ctypes
import gc
import weakref

import numpy as np
import pytest
import torch
from test_native import CHUNK, Tensors, leaf
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

import lrs_ext
from lrs_ext import _C, ops, torch_functions

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
        access = _C.TensorAccess(**torch_functions.object_functions())
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


def test_parameters_may_be_in_a_tuple(access):
    params = [leaf(3), leaf(2)]
    opt = lrs_ext.SGD(params, lr=1.0)
    opt.param_groups[0]["params"] = tuple(params)
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old - 2.0)


@pytest.mark.parametrize("begin", [0, 5, 7])
def test_parameters_that_share_memory_are_refused(begin):
    memory = torch.zeros(12)
    params = [leaf(3), torch.nn.Parameter(memory[begin:]), torch.nn.Parameter(memory[:8])]
    opt = lrs_ext.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=1.0)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="two parameters share memory"):
        opt.step()
    assert torch.equal(memory, torch.zeros(12))


def test_parameters_may_be_parts_of_one_memory():
    memory = torch.zeros(12)
    parts = [memory[8:], memory[3:8], memory[3:3], memory[:3]]
    params = [torch.nn.Parameter(part) for part in parts]
    opt = lrs_ext.SGD(params, lr=1.0)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    assert torch.equal(memory, -torch.ones(12))


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
    monkeypatch.setattr(torch_functions, "LAST_DIRECT_TORCH", (2, 0))
    assert not ops._tensor_access.__wrapped__().is_direct


@pytest.mark.parametrize("missing", torch_functions.DIRECT_FUNCTIONS)
def test_a_torch_without_one_of_the_functions_is_read_through_objects(missing, monkeypatch):
    monkeypatch.setitem(torch_functions.DIRECT_FUNCTIONS, missing, "aoti_torch_no_such_function")
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
    monkeypatch.setitem(torch_functions.DIRECT_FUNCTIONS, name, other)
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


def test_a_state_that_another_thread_takes_away_is_an_error(access):
    with pytest.raises(RuntimeError, match="changed while the optimizer read it"):
        _C.StepTensors(ops._tensor_access(), [[leaf(4)]], {}, [["exp_avg"]], [torch.tensor(1.0)])


@pytest.mark.parametrize(
    "use", ["step", "step_in_backward", "clip_grad_norm_", "gaps", "gaps_norm"]
)
def test_no_gradient_is_held_after_its_use(backend, use):
    param = torch.nn.Parameter(torch.ones(6, device=backend.device)[:: 2 if "gaps" in use else 1])
    opt = lrs_ext.SGD([param], lr=0.1, backend=backend.name)
    memory = []
    param.register_post_accumulate_grad_hook(
        lambda param: memory.append(StorageWeakRef(param.grad.untyped_storage()))
    )
    if use == "step_in_backward":
        opt.step_in_backward()
    for _ in range(2):
        param.square().sum().backward()
        if "norm" in use:
            lrs_ext.clip_grad_norm_(opt, 1.0)
        elif use != "step_in_backward":
            opt.step()
        param.grad = None
        assert memory[-1].expired()
        opt.step()


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
    access = _C.TensorAccess(**torch_functions.object_functions())
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
