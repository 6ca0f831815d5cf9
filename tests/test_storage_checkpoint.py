"""Checkpoints of every storage: resuming to the bit, conversion of every kind, copies, errors."""

import copy
import pickle

import cases
import pytest
import reference
import torch
import torch.distributed.checkpoint as dcp
from test_checkpoint import assert_equal_runs, copies, params_of, through_file, update
from test_optimizers import assert_close
from test_storage import arrays_of, make
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import lrs_ext

updates = pytest.mark.parametrize("row", cases.STORED_UPDATES, ids=str)
with_states = pytest.mark.parametrize("row", cases.STORED_UPDATES[1:], ids=str)
storages = pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
# Triton's interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning")
REX = lrs_ext.rex(0.1, 8, warmup_steps=2, min_lr=0.001)
CPU = cases.BACKENDS[0]
SHAPES = ((5,), (2, 3, 40, 5), (300,))


def make_params(backend, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [
        value.to(backend.device, dtype).requires_grad_()
        for value, dtype in zip(
            values, [torch.bfloat16, torch.bfloat16, torch.float32], strict=True
        )
    ]
    params[1].data = params[1].data.contiguous(memory_format=torch.channels_last)
    return params


def trained(row, storage, backend, updates=4, lr=REX, params=None):
    opt = make(row, params or make_params(backend), backend, storage, lr=lr)
    for k in range(updates):
        update(params_of(opt), opt, k)
    return opt


def states_of(opt):
    arrays = [array for param in params_of(opt) for array in opt.state[param].values()]
    return [*arrays, opt.schedule_buffer.step]


def numbers_of(opt):
    """Parameters and states as the numbers that they stand for."""
    kept = [reference.kept_numbers(param, opt.state.get(param, {})) for param in params_of(opt)]
    return [(value, {n: x for n, x in numbers.items() if n != "step"}) for value, numbers in kept]


@updates
@storages
def test_resuming_is_exact(backend, row, storage):
    shapes = ((5,), (2, 3, 4, 5), (200,)) if backend.interpreted else SHAPES
    opt = trained(row, storage, backend, 3, params=make_params(backend, shapes))
    checkpoint = through_file(opt.state_dict())
    resumed = [make(row, copies(params_of(opt)), backend, storage, lr=0.5)]
    if not backend.interpreted:
        resumed.append(trained(row, storage, backend, 2, params=copies(params_of(opt))))
    for other in resumed:
        for param, source in zip(params_of(other), params_of(opt), strict=True):
            param.data.copy_(source.data)
        other.load_state_dict(checkpoint)
    assert_equal_runs([opt, *resumed], 3, 6 if not backend.interpreted else 4)


@updates
@pytest.mark.parametrize("storage", cases.STORAGES[2::3], ids=str)
def test_resuming_is_exact_behind_a_parameter_that_has_no_gradient_any_more(row, storage):
    """Draws depend on the number of a tensor, which no checkpoint of a stateless update has."""

    def step(opt, k):
        generator = torch.Generator().manual_seed(k)
        for index, param in enumerate(params_of(opt)):
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = None if index == 0 and k > 0 else grad
        opt.step()

    opt = make(row, make_params(CPU), CPU, storage, lr=REX)
    for k in range(3):
        step(opt, k)
    resumed = make(row, copies(params_of(opt)), CPU, storage, lr=REX)
    resumed.load_state_dict(through_file(opt.state_dict()))
    for k in range(3, 5):
        step(opt, k)
        step(resumed, k)
        assert all(map(torch.equal, params_of(opt), params_of(resumed)))


@with_states
@storages
def test_loading_keeps_every_address(row, storage):
    opt = trained(row, storage, CPU, 3)
    checkpoint = through_file(opt.state_dict())
    arrays = states_of(opt)
    addresses = [array.data_ptr() for array in arrays]
    before = [array.clone() for array in arrays]
    update(params_of(opt), opt, 3)
    opt.load_state_dict(checkpoint)
    after = states_of(opt)
    assert [array.data_ptr() for array in after] == addresses
    assert all(map(torch.equal, after, before))


# Conversion.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_scales_of_another_dtype_are_powers_of_two_too(dtype):
    param = torch.zeros(600, requires_grad=True)
    opt = lrs_ext.AdamW([param], lr=REX, state_dtype=torch.uint8)
    update([param], opt, 0)
    checkpoint = copy.deepcopy(opt.state_dict())
    before = [array.clone() for array in states_of(opt)]
    for name in ("exp_avg", "exp_avg_sq"):
        saved = checkpoint["state"][0][name]
        saved["scale"] = saved["scale"].to(dtype)
    opt.load_state_dict(checkpoint)
    assert all(map(torch.equal, states_of(opt), before))
    update([param], opt, 1)


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda s: torch.stack([s, s], 1)[:, 0]])
def test_scales_that_are_replaced_by_hand_are_converted(change):
    params = [torch.zeros(600, requires_grad=True) for _ in range(2)]
    opts = [lrs_ext.AdamW([param], lr=REX, state_dtype=torch.uint8) for param in params]
    for param, opt in zip(params, opts, strict=True):
        update([param], opt, 0)
    state = opts[0].state[params[0]]
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        state[name] = change(state[name])
    for param, opt in zip(params, opts, strict=True):
        update([param], opt, 1)
    assert all(map(torch.equal, states_of(opts[0]), states_of(opts[1])))


def error_bound(dtype, name, value):
    """What one conversion of a number may change: half a rounding step, of the block or its own."""
    if dtype == torch.float32:
        return value.abs() * cases.STATE.rtol  # codes are decoded in float32
    if dtype == torch.bfloat16:
        return value.abs() * 2**-8
    flat = reference.flat(value)
    is_root = name == "exp_avg_sq"
    kept = flat.sqrt() if is_root else flat.abs()
    scale = torch.cat([b.max().expand(len(b)) for b in kept.split(reference.BLOCK)])
    # Half a step of the mantissa (and 1/256, as there is no half of 8 bits), and all of what is too
    # small for the smallest code.
    step = kept * (1 + 1 / 128) / (32 if is_root else 16) + scale * 1.25 * 2.0**-16
    bound = torch.empty_like(value)
    reference.flat(bound).copy_(2 * kept * step + step**2 if is_root else step)
    return bound


@with_states
@pytest.mark.parametrize("source", cases.STORAGES, ids=str)
@pytest.mark.parametrize("target", cases.STORAGES, ids=str)
def test_every_kind_loads_every_other(row, source, target):
    opt = trained(row, source, CPU)
    other = make(row, copies(params_of(opt)), CPU, target, lr=0.5)
    other.load_state_dict(through_file(opt.state_dict()))
    assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    pairs = list(zip(numbers_of(opt), numbers_of(other), strict=True))
    for ((_, numbers), (_, found)), param in zip(pairs, params_of(other), strict=True):
        assert set(numbers) == set(found)
        for name, number in numbers.items():
            assert other.state[param][name].dtype == target.state_dtype
            difference = (found[name] - number).abs()
            bound = error_bound(target.state_dtype, name, number)
            if source.state_dtype == target.state_dtype:
                bound = 0.0
            assert (difference <= bound * (1 + 1e-5)).all(), name
    if source.master_weights and target.master_weights:
        assert all(torch.equal(a, b) for (a, _), (b, _) in pairs)
    for k in (4, 5):
        update(params_of(other), other, k)


@pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
@pytest.mark.parametrize("name", cases.TORCH_OPTIMIZERS)
def test_checkpoints_go_to_torch_and_come_back(name, storage):
    """Torch rounds states to the dtype of their parameters: here they are float32."""
    row = next(r for r in cases.STORED_UPDATES[1:] if r.name == name)
    shapes = [(5,), (300,), (40, 7)]

    def params():
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]

    theirs = getattr(torch.optim, name)(params(), lr=0.05, foreach=False, **row.options)
    for k in range(4):
        update(params_of(theirs), theirs, k)
    ours = make(row, copies(params_of(theirs)), CPU, storage)
    ours.load_state_dict(through_file(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == 0.05
    for (_, found), (_, exact) in zip(numbers_of(ours), numbers_of(theirs), strict=True):
        assert set(found) == set(exact)
        for key, number in exact.items():
            difference = (found[key] - number).abs()
            assert (difference <= error_bound(storage.state_dtype, key, number) * (1 + 1e-5)).all()
    float32 = make(row, copies(params_of(theirs)), CPU)
    float32.load_state_dict(through_file(ours.state_dict()))
    back = getattr(torch.optim, name)(copies(params_of(theirs)), foreach=False)
    back.load_state_dict(through_file(float32.state_dict()))
    for (_, found), (_, sent) in zip(numbers_of(back), numbers_of(ours), strict=True):
        for key, number in sent.items():
            assert_close(found[key], number, cases.STATE)
    for k in (4, 5):
        update(params_of(back), back, k)
        assert all(p.isfinite().all() for p in params_of(back))


@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", cases.TORCH_OPTIMIZERS)
def test_torch_does_not_take_codes_for_numbers(name, kind):
    row = next(r for r in cases.STORED_UPDATES[1:] if r.name == name)
    params = [torch.ones(n).requires_grad_() for n in (1, 300)]
    opt = make(row, params, CPU, cases.StorageRow(torch.uint8))
    update(params, opt, 0)
    theirs = getattr(torch.optim, name)(copies(params), lr=0.1, **row.options)
    theirs.load_state_dict(through_file(opt.state_dict()))
    theirs.param_groups[0].update({"foreach": None, "fused": None} | kind)
    with pytest.raises((AttributeError, TypeError), match="dict"):
        update(params_of(theirs), theirs, 1)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@with_states
@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("target", [torch.uint8, torch.float32], ids=str)
def test_distributed_checkpoints_of_blocks(row, options, target, tmp_path):
    """They load in place, so that another kind is refused, but whole state dicts are converted."""

    def make_one(dtype):
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 2))
        opt = make(row, list(model.parameters()), CPU, cases.StorageRow(dtype), lr=REX)
        return model, opt

    model, opt = make_one(torch.uint8)
    for k in range(3):
        update(params_of(opt), opt, k)
        opt.zero_grad()
    saved = get_optimizer_state_dict(model, opt, options=options)
    dcp.save(saved, checkpoint_id=str(tmp_path))
    other_model, other = make_one(target)
    other_model.load_state_dict(model.state_dict())
    state_dict = get_optimizer_state_dict(other_model, other, options=options)
    if target == torch.uint8:
        dcp.load(state_dict, checkpoint_id=str(tmp_path))
    else:
        with pytest.raises(dcp.api.CheckpointException, match="Missing key"):
            dcp.load(state_dict, checkpoint_id=str(tmp_path))
        state_dict = copy.deepcopy(saved)
    set_optimizer_state_dict(other_model, other, state_dict, options=options)
    for (_, found), (_, numbers) in zip(numbers_of(other), numbers_of(opt), strict=True):
        for name, number in numbers.items():
            assert torch.equal(found[name], number)
    if target == torch.uint8:
        assert_equal_runs([opt, other], 3, 5)


@with_states
@storages
@pytest.mark.parametrize("moved", ["before", "after"])
def test_a_checkpoint_loads_into_another_memory_layout(row, storage, moved):
    """Blocks are cut in the order of memory, so that codes do not stay: at most one more rounding.

    Memory that has moved after the last step is the harder case: the present states lie otherwise.
    """
    opt = trained(row, storage, CPU)
    other = make(row, copies(params_of(opt)), CPU, storage, lr=REX)
    if moved == "after":
        update(params_of(other), other, 9)
    for param, source in zip(params_of(other), params_of(opt), strict=True):
        param.data = source.detach().clone(memory_format=torch.contiguous_format)
    other.load_state_dict(through_file(opt.state_dict()))
    for (value, numbers), (found_value, found) in zip(
        numbers_of(opt), numbers_of(other), strict=True
    ):
        assert torch.equal(value, found_value)
        for name, number in numbers.items():
            contiguous = number.contiguous()
            bound = error_bound(storage.state_dtype, name, contiguous)
            if storage.state_dtype != torch.uint8:
                bound = 0.0
            assert ((found[name] - contiguous).abs() <= bound * (1 + 1e-5)).all(), name
    for param in params_of(other):
        for name, array in other.state[param].items():
            if name != "step" and not name.endswith("_scale"):
                assert array.is_contiguous()
    update(params_of(other), other, 4)


@with_states
@storages
def test_parameters_that_move_in_memory_take_their_states_along(row, storage):
    opt = trained(row, storage, CPU)
    before = numbers_of(opt)
    for param in params_of(opt):
        param.data = param.data.clone(memory_format=torch.contiguous_format)
        param.grad = torch.zeros_like(param)
    opt.param_groups[0].update(lr=0.0)
    opt.step()
    for (value, _), (found, _) in zip(before, numbers_of(opt), strict=True):
        assert torch.equal(value, found)


# Copies and groups.


@updates
@storages
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_to_the_bit_and_share_nothing(row, storage, copied):
    opt = trained(row, storage, CPU, 3)
    other = copied(opt)
    update(params_of(other), other, 3)
    assert opt.schedule_buffer.step.item() == 3
    update(params_of(opt), opt, 3)
    assert_equal_runs([opt, other], 4, 6)


@with_states
@storages
def test_added_groups_are_kept_alike_and_resume(row, storage):
    def make_two(params):
        opt = make(row, params[:2], CPU, storage)
        opt.add_param_group({"params": params[2:], "lr": 0.01})
        return opt

    opt = make_two(make_params(CPU))
    for k in range(3):
        update(params_of(opt), opt, k)
    for name, array in opt.state[params_of(opt)[2]].items():
        if name != "step" and not name.endswith("_scale"):
            assert array.dtype == storage.state_dtype
    resumed = make_two(copies(params_of(opt)))
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert_equal_runs([opt, resumed], 3, 6)


# Errors leave everything as it is.


def spoil(name, change):
    def spoiled(checkpoint):
        for state in checkpoint["state"].values():
            if name in state:
                state[name] = change(state[name])
                return
        raise AssertionError(name)

    return spoiled


def cut(blocks):
    return {"codes": blocks["codes"][:1], "scale": blocks["scale"]}


SPOILED = {
    "codes": (spoil("exp_avg", cut), "exp_avg has shape"),
    "scales": (
        spoil("exp_avg", lambda b: b | {"scale": torch.zeros(9)}),
        "exp_avg_scale has shape",
    ),
    "remainder": (spoil("master_remainder", lambda t: t[:1]), "master_remainder has shape"),
    "amsgrad": (lambda c: c["param_groups"][0].update(amsgrad=True), "needs float32 states"),
    "lr": (lambda c: c["param_groups"][0].update(lr=-1.0), "learning rate"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_checkpoint_that_does_not_fit_changes_nothing(what):
    row, storage = cases.STORED_UPDATES[2], cases.StorageRow(torch.uint8, master_weights=True)
    opt = trained(row, storage, CPU)
    checkpoint = copy.deepcopy(opt.state_dict())
    update(params_of(opt), opt, 4)
    arrays = arrays_of(opt)
    before = [array.detach().clone() for array in arrays]
    change, message = SPOILED[what]
    change(checkpoint)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(checkpoint)
    assert all(a is b for a, b in zip(arrays_of(opt), arrays, strict=True))
    assert all(map(torch.equal, arrays, before))
    update(params_of(opt), opt, 5)
