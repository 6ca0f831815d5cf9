"""A GradScaler's scale and overflows, read on the device: no step is half taken."""

import itertools
import json

import cases
import pytest
import torch
from test_no_sync import no_sync
from test_optimizers import leaf
from test_storage import arrays_of, make

import lrs_ext
from lrs_ext import table_set
from lrs_ext.grad_scaling import GradScaling

# Triton's interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning")
updates = pytest.mark.parametrize("row", cases.STORED_UPDATES, ids=str)
storages = pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
some_storages = pytest.mark.parametrize("storage", cases.STORAGES[::4], ids=str)
SHAPES = [(5,), (3, 40), ()]
REX = lrs_ext.rex(0.1, 8, warmup_steps=2, min_lr=0.001)


def make_params(backend, dtypes=cases.DTYPES[:2]):
    generator = torch.Generator().manual_seed(0)
    return [
        leaf(torch.randn(shape, generator=generator), backend, dtype)
        for dtype, shape in itertools.product(dtypes, SHAPES)
    ]


def make_scaler(backend, scale=2.0**10, **options):
    return torch.amp.GradScaler(backend.device, init_scale=scale, **options)


def backward(params, scaler, k, bad=None):
    """Gradients of the scaled loss of update k: an entry of the parameter `bad` overflows."""
    generator = torch.Generator().manual_seed(k)
    loss = 0.0
    for index, param in enumerate(params):
        param.grad = None
        factors = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        if index == bad:
            factors.view(-1)[-1] = torch.inf
        loss = loss + (param * factors).sum().float()
    (loss if scaler is None else scaler.scale(loss)).backward()


def everything(opt):
    return [array.detach().clone() for array in arrays_of(opt)]


def shown(opt):
    """The groups' learning rates; a GPU is asked which updates it skipped."""
    opt.current_lr()
    return [group["lr"] for group in opt.param_groups]


def assert_same(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@updates
@storages
def test_powers_of_two_change_nothing(backend, row, storage):
    if backend.interpreted and storage not in cases.STORAGES[::4]:
        pytest.skip("takes long")
    scaled = make(row, make_params(backend), backend, storage, lr=REX)
    plain = make(row, make_params(backend), backend, storage, lr=REX)
    scaler = make_scaler(backend, growth_interval=2)
    for k in range(4):
        params, others = (opt.param_groups[0]["params"] for opt in (scaled, plain))
        backward(params, scaler, k)
        backward(others, None, k)
        grads = [param.grad.clone() for param in params]
        scaler.step(scaled)
        scaler.update()
        plain.step()
        assert_same([param.grad for param in params], grads)
        assert_same(everything(scaled), everything(plain))
        assert scaled.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == REX(k + 1)


@pytest.mark.parametrize("scale", [3.0, 1000.0, 0.7])
def test_any_scale_is_undone(backend, scale):
    row = cases.STORED_UPDATES[3]
    scaled = make(row, make_params(backend, cases.DTYPES[:1]), backend)
    plain = make(row, make_params(backend, cases.DTYPES[:1]), backend)
    scaler = make_scaler(backend, scale)
    for k in range(3):
        backward(scaled.param_groups[0]["params"], scaler, k)
        backward(plain.param_groups[0]["params"], None, k)
        scaler.step(scaled)
        scaler.update()
        plain.step()
        for a, b in zip(everything(scaled), everything(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=cases.TORCH.rtol, atol=cases.TORCH.atol)


def two_groups(row, backend, storage):
    params = make_params(backend)
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.05}]
    opt = make(row, groups, backend, storage, lr=REX)
    return params, opt


@updates
@storages
@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("unscaled_first", [False, True], ids=["", "unscale_"])
def test_an_overflow_changes_nothing(backend, row, storage, bad_step, unscaled_first):
    if backend.interpreted and (unscaled_first or storage not in cases.STORAGES[::4]):
        pytest.skip("takes long")
    params, opt = two_groups(row, backend, storage)
    others, expected = two_groups(row, backend, storage)
    scaler = make_scaler(backend)
    for k in range(4):
        backward(params, scaler, k, bad=4 if k == bad_step else None)
        if unscaled_first:
            scaler.unscale_(opt)
        grads = [param.grad.clone() for param in params]
        before = everything(opt)
        lrs = [group["lr"] for group in opt.param_groups]
        scaler.step(opt)
        scaler.update()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
        if k == bad_step:
            after = everything(opt)
            if k == 0:  # the states have come into being
                assert_same(after[: len(params)], before[: len(params)])
                assert all(not array.any() for s in opt.state.values() for array in s.values())
            else:
                assert_same(after, before)
            if backend.device == "cpu":  # known at once
                assert [group["lr"] for group in opt.param_groups] == lrs
            assert shown(opt) == lrs
            assert opt.current_lr() == [float(torch.tensor(lr)) for lr in lrs]
            assert scaler.get_scale() == 2.0**9
            continue
        backward(others, None, k)
        expected.step()
        assert_same(everything(opt), everything(expected))
        assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in expected.param_groups]
    assert opt.schedule_buffer.step.item() == 3


def saved_groups(opt):
    """The groups of a checkpoint without what the host last believed to be the learning rate."""
    groups = opt.state_dict()["param_groups"]
    for group in groups:
        group["schedule"] = json.loads(group["schedule"])
        del group["schedule"]["shown"]
    return groups


@updates
def test_a_checkpoint_after_an_overflow_is_that_of_before(backend, row):
    params, opt = two_groups(row, backend, cases.STORAGES[0])
    scaler = make_scaler(backend)
    for k, bad in enumerate([None, 0, None, 5]):
        before = saved_groups(opt)
        backward(params, scaler, k, bad)
        scaler.step(opt)
        scaler.update()
        if bad is not None:
            assert saved_groups(opt) == before


def test_every_step_may_overflow_and_the_schedule_waits(backend):
    params, opt = two_groups(cases.STORED_UPDATES[1], backend, cases.STORAGES[0])
    scaler = make_scaler(backend)
    before = [param.detach().clone() for param in params]
    for k in range(5):
        backward(params, scaler, k, bad=0)
        scaler.step(opt)
        scaler.update()
    assert_same([param.detach() for param in params], before)
    assert scaler.get_scale() == 2.0**5
    assert shown(opt)[0] == REX(0)
    assert opt.schedule_buffer.step.item() == 0
    backward(params, scaler, 0)
    scaler.step(opt)
    assert opt.param_groups[0]["lr"] == REX(1)


def test_schedulers_of_torch_stay_where_they_are_on_an_overflow(backend):
    """As torch's documentation advises: the scale tells whether the step was taken."""
    param = leaf(torch.ones(3), backend)
    opt = lrs_ext.AdamW([param], lr=0.1, backend=backend.name)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    scaler = make_scaler(backend)
    for k, bad in enumerate([None, 0, None]):
        backward([param], scaler, k, bad)
        scale = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        if scaler.get_scale() >= scale:
            scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.025)
    assert opt.schedule_buffer.step.item() == 2


@some_storages
def test_parameters_without_gradients_take_no_part(backend, storage):
    params, opt = two_groups(cases.STORED_UPDATES[1], backend, storage)
    scaler = make_scaler(backend)
    frozen = params[1].detach().clone()
    for k, bad in enumerate([0, None, 2, None]):
        backward(params, scaler, k, bad)
        params[1].grad = None
        scaler.step(opt)
        scaler.update()
    assert torch.equal(params[1], frozen)
    assert params[1] not in opt.state
    assert opt.schedule_buffer.step.item() == 2


def test_a_disabled_scaler_and_no_gradients_are_fine(backend):
    params, opt = two_groups(cases.STORED_UPDATES[1], backend, cases.STORAGES[0])
    disabled = make_scaler(backend, enabled=False)
    backward(params, disabled, 0)
    disabled.step(opt)
    assert opt.schedule_buffer.step.item() == 1
    scaler = make_scaler(backend)
    opt.zero_grad()
    scaler.scale(torch.ones((), device=backend.device))
    scaler.step(opt)
    assert opt.schedule_buffer.step.item() == 1


@updates
@some_storages
def test_neither_scale_nor_overflow_is_read_by_the_host(backend, row, storage):
    params, opt = two_groups(row, backend, storage)
    scaler = make_scaler(backend)
    for k, bad in enumerate([None, 1, None]):
        backward(params, scaler, k, bad)
        with no_sync(backend):
            scaler.step(opt)
        scaler.update()
    assert opt.schedule_buffer.step.item() == 2


def test_a_scale_of_another_type_is_refused():
    param = torch.ones(3, requires_grad=True)
    opt = lrs_ext.SGD([param], lr=0.5)
    param.grad = torch.ones(3)
    opt.grad_scale = torch.ones((), dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"must be float32 on the parameters' device cpu"):
        opt.step()
    assert param.tolist() == [1.0] * 3
    assert opt.schedule_buffer.step.item() == 0


def test_a_scale_on_another_device_is_moved():
    scaling = table_set.scaling_on(
        GradScaling(torch.ones(()), torch.zeros(())), torch.device("meta")
    )
    assert scaling.loss_scale.is_meta
    assert scaling.found_inf.is_meta
    assert scaling.norm is scaling.max_norm is None
