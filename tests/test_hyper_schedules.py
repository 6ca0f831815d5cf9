"""Weight decay and momentum that follow schedules: numbers, who is in charge, checkpoints."""

import cases
import numpy as np
import pytest
import reference
import torch
from moving import numbers_in, put, schedule_of, value_of, with_numbers, with_schedules, with_values
from plain_optimizers import plain_optimizer
from test_checkpoint import assert_equal_runs, make_params, params_of, update
from test_optimizers import Oracle, assert_close, randn_params, set_gradients
from torch.optim import lr_scheduler

import lrs_ext
from lrs_ext import ops

rows = pytest.mark.parametrize("row", cases.MOVING, ids=str)
every = pytest.mark.parametrize("row", cases.MOVING_ALL, ids=str)
REX = lrs_ext.rex(0.05, 8, warmup_steps=2, min_lr=0.001)
LINEAR = lrs_ext.linear(0.5, 5)
CPU = cases.Backend("cpu", "cpu")


def make(row, params, backend=CPU, lr=REX, **options):
    options = with_schedules(row) | options
    return getattr(lrs_ext, row.update.name)(params, lr=lr, backend=backend.name, **options)


def make_sgd(backend=CPU, **options):
    param = torch.zeros((), device=backend.device, requires_grad=True)
    return lrs_ext.SGD([param], backend=backend.name, **{"lr": 1.0, **options})


def used_decay(opt):
    """Steps SGD with lr=1 and no momentum from 1 with no gradient; returns the weight decay."""
    for param in params_of(opt):
        param.data.fill_(1.0)
        param.grad = torch.zeros_like(param)
    opt.step()
    return [1.0 - param.item() for param in params_of(opt)]


def decays(schedule, steps):
    return [pytest.approx(float(np.float32(schedule(k))), abs=1e-7) for k in steps]


# Numbers.


@rows
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_update_matches_the_oracle(backend, row, dtype):
    params = randn_params([(), (7,), (257,)], backend, dtype)
    opt = make(row, params, backend)
    oracle = Oracle(row.update.name, opt)
    if row.update.name == "SGD":
        sgd, has_buffer = reference.sgd, "momentum" in row.numbers
        oracle.update = lambda *args, **options: sgd(*args, **options, has_buffer=has_buffer)
    for k in range(8):
        numbers = {n: float(np.float32(value_of(s, k))) for n, s in row.numbers.items()}
        assert numbers_in(opt.param_groups[0], row) == pytest.approx(numbers, rel=1e-7)
        set_gradients(params, skip=[k % 3] if k < 3 else [])
        lr = reference.schedule("rex", k, lr=0.05, total_steps=8, warmup_steps=2, min_lr=0.001)
        oracle.step([lr], [with_numbers(row, numbers)])


@pytest.mark.parametrize(
    "row", [row for row in cases.MOVING if cases.TO_ZERO not in row.numbers.values()], ids=str
)
def test_trajectories_are_those_of_loops_that_write_the_numbers(backend, row):
    params = randn_params([(7,), (257,)], backend)
    opt = make(row, params, backend)
    twins = [param.detach().clone() for param in params]
    options = with_values(row, 0)
    theirs = plain_optimizer(row.update.name)(twins, lr=0.1, foreach=False, **options)
    for k in range(8):
        theirs.param_groups[0].update(with_values(row, k), lr=REX(k))
        set_gradients(params)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.clone()
        opt.step()
        theirs.step()
        for param, twin in zip(params, twins, strict=True):
            assert_close(param, twin, cases.TORCH)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_cycled_momentum_is_that_of_torch(backend, name):
    """OneCycleLR writes momentum or betas[0] before each update, whose bias correction has it."""
    params = randn_params([(7,), (33,)], backend)
    runs = [[param.detach().clone().requires_grad_() for param in params] for _ in range(3)]
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    theirs = getattr(torch.optim, name)(runs[0], lr=0.1, foreach=False, **momentum)
    cycle = lr_scheduler.OneCycleLR(theirs, 0.1, total_steps=12)
    driven = getattr(lrs_ext, name)(runs[1], lr=0.1, backend=backend.name, **momentum)
    driven_cycle = lr_scheduler.OneCycleLR(driven, 0.1, total_steps=12)
    table, gradients = [], []
    for _ in range(11):
        group = theirs.param_groups[0]
        table.append((group["lr"], group["momentum"] if name == "SGD" else group["betas"][0]))
        gradients.append([torch.randn_like(param) for param in params])
        for run in runs[:2]:
            for param, grad in zip(run, gradients[-1], strict=True):
                param.grad = grad.clone()
        theirs.step(), cycle.step()
        driven.step(), driven_cycle.step()
    lrs, momenta = (lrs_ext.from_values(values) for values in zip(*table, strict=True))
    own = {"momentum": momenta} if name == "SGD" else {"betas": (momenta, 0.999)}
    ours = getattr(lrs_ext, name)(runs[2], lr=lrs, backend=backend.name, **own)
    for grads in gradients:
        for param, grad in zip(runs[2], grads, strict=True):
            param.grad = grad.clone()
        ours.step()
    for expected, *others in zip(*runs, strict=True):
        for other in others:
            assert_close(other, expected, cases.TORCH)


def test_a_momentum_that_touches_zero_keeps_its_buffer(backend):
    """There is one from the first update on, though the first momentum is 0."""
    opt = make_sgd(backend, momentum=lrs_ext.from_values([0.0, 0.5, 0.0, 0.5]))
    param, buffers = params_of(opt)[0], []
    for _ in range(4):
        param.grad = torch.ones_like(param)
        opt.step()
        buffers.append(opt.state[param]["momentum_buffer"].item())
    assert buffers == [1.0, 1.5, 1.0, 1.5]


def test_a_step_writes_nothing_to_the_group_table(monkeypatch):
    for row in cases.MOVING_ALL:
        opt = make(row, randn_params([(5,)], CPU))
        set_gradients(params_of(opt))
        opt.step()
        before, rows_before = (
            opt._preparation.tables.all[0].groups.rows.clone(),
            opt._numbers.hyper_schedules.rows(0),
        )
        with monkeypatch.context() as patch:
            patch.setattr(ops.GroupTable, "write", None)
            for _ in range(7):
                opt.step()
        assert torch.equal(opt._preparation.tables.all[0].groups.rows, before)
        assert opt._numbers.hyper_schedules.rows(0) is rows_before


def test_the_device_reads_its_own_step(backend):
    opt = make_sgd(backend, weight_decay=LINEAR)
    opt.schedule_buffer.step.fill_(3)
    assert used_decay(opt) == decays(LINEAR, [3])
    assert used_decay(opt) == decays(LINEAR, [4])


# The host's side.


@every
def test_groups_show_floats_in_step(backend, row):
    opt = make(row, randn_params([(3,)], backend), backend)
    for k in range(8):
        shown = numbers_in(opt.param_groups[0], row)
        assert shown == {n: schedule_of(s)(k) for n, s in row.numbers.items()}
        assert {type(value) for value in shown.values()} == {float}
        if "beta1" in row.numbers:
            assert opt.param_groups[0]["betas"][1] == row.update.options["betas"][1]
        set_gradients(params_of(opt))
        opt.step()


def test_a_float_takes_over_and_the_found_float_hands_back(backend):
    opt = make_sgd(backend, weight_decay=LINEAR)
    group = opt.param_groups[0]
    used = [*used_decay(opt)]
    found = group["weight_decay"]
    group["weight_decay"] = 0.25
    used += used_decay(opt) + used_decay(opt)
    assert group["weight_decay"] == 0.25
    group["weight_decay"] = found
    used += used_decay(opt)
    assert group["weight_decay"] == LINEAR(4)
    group["weight_decay"] = float(repr(LINEAR(4)))  # an equal float is a new decision
    used += used_decay(opt) + used_decay(opt)
    first, fourth, fifth = decays(LINEAR, [0, 3, 4])
    assert used == [first, 0.25, 0.25, fourth, fifth, fifth]


@every
def test_putting_back_what_was_found_changes_nothing(row):
    opts = [make(row, make_params(CPU)) for _ in range(2)]
    for k in range(6):
        group = opts[0].param_groups[0]
        found = numbers_in(group, row)
        for name in found:
            put(group, name, 0.123)
        if k % 2:
            opts[0].sync_groups()
        for name, value in found.items():
            put(group, name, value)
        assert_equal_runs(opts, k, k + 1)
        assert numbers_in(group, row) == numbers_in(opts[1].param_groups[0], row)


@pytest.mark.parametrize("total_steps", [3, 5, 50])
def test_a_schedule_put_into_a_group_counts_from_the_next_step(backend, total_steps):
    """It is a function of the absolute step; its row may be shorter or longer than the last."""
    opt = make_sgd(backend, weight_decay=LINEAR)
    used = [*used_decay(opt), *used_decay(opt)]
    new = lrs_ext.cosine(0.75, total_steps)
    opt.param_groups[0]["weight_decay"] = new
    used += [value for _ in range(4) for value in used_decay(opt)]
    assert used == decays(LINEAR, [0, 1]) + decays(new, [2, 3, 4, 5])
    assert opt.param_groups[0]["weight_decay"] == new(6)
    opt.param_groups[0]["weight_decay"] = LINEAR
    assert used_decay(opt) == decays(LINEAR, [6])


def test_a_momentum_that_begins_to_move_gets_its_buffer(backend):
    opt, plain = make_sgd(backend), make_sgd(backend)
    for o in (opt, plain):
        update(params_of(o), o, 0)
    opt.param_groups[0]["momentum"] = lrs_ext.linear(0.9, 4)
    for k in range(1, 4):
        plain.param_groups[0]["momentum"] = lrs_ext.linear(0.9, 4)(k)
        for o in (opt, plain):
            update(params_of(o), o, k)
        torch.testing.assert_close(params_of(opt)[0], params_of(plain)[0])


def test_each_group_follows_its_own(backend):
    params = [torch.ones((), device=backend.device, requires_grad=True) for _ in range(4)]
    own = [{}, {"weight_decay": 0.125}, {"weight_decay": lrs_ext.constant(0.25)}]
    groups = [{"params": [p], **o} for p, o in zip(params, own, strict=False)]
    opt = lrs_ext.SGD(groups, lr=1.0, weight_decay=LINEAR, backend=backend.name)
    for k in range(7):
        if k == 2:  # starts at the present step, with the default
            opt.add_param_group({"params": params[3:]})
        (late,) = decays(LINEAR, [k])
        assert used_decay(opt) == [late, 0.125, 0.25, *[late] * (k >= 2)]


@every
def test_set_schedule_leaves_the_numbers_alone(row):
    opt, other = (make(row, make_params(CPU)) for _ in range(2))
    for o in (opt, other):
        o.set_schedule(lrs_ext.cosine(0.04, 500 if o is opt else 8))
        o.param_groups[0]["lr"] = 0.02
    assert_equal_runs([opt, other], 0, 7)


def test_parameters_that_move_to_another_dtype_take_the_schedules_along(backend):
    opt = make_sgd(backend, weight_decay=LINEAR)
    used = used_decay(opt)
    params_of(opt)[0].data = params_of(opt)[0].data.double().float()
    assert used + used_decay(opt) == decays(LINEAR, [0, 1])


@pytest.mark.gpu
def test_parameters_that_move_to_a_gpu_take_the_schedules_along():
    opt = lrs_ext.SGD([torch.ones((), requires_grad=True)], lr=1.0, weight_decay=LINEAR)
    used = used_decay(opt)
    params_of(opt)[0].data = params_of(opt)[0].data.cuda()
    params_of(opt)[0].grad = None
    assert used + used_decay(opt) == decays(LINEAR, [0, 1])
    assert opt._numbers.hyper_schedules.rows(0)["weight_decay"].is_cuda


# sync_groups.


def test_sync_groups_writes_to_the_device_without_a_step(backend):
    """As a loop needs it that only replays a captured step: here the kernel runs by itself."""
    if backend.name == "reference":
        pytest.skip("it has no table")
    opt = make_sgd(backend, weight_decay=0.125, lr=1.0)
    used_decay(opt)
    (param,) = params_of(opt)
    groups = opt._preparation.tables.all[0].groups.rows.data_ptr()

    def replayed():
        param.data.fill_(1.0)
        param.grad.zero_()
        opt._preparation.tables.all[0].table.refresh([[param]], opt.state)
        opt._preparation.tables.all[0].table.run()
        return 1.0 - param.item()

    group, step = opt.param_groups[0], opt.schedule_buffer.step
    group["weight_decay"] = 0.25
    assert replayed() == 0.125
    for change, expected in [
        ({"weight_decay": 0.25}, 0.25),
        ({"weight_decay": LINEAR}, decays(LINEAR, [3])[0]),
        ({"weight_decay": lrs_ext.cosine(0.5, 900)}, decays(lrs_ext.cosine(0.5, 900), [4])[0]),
        ({"weight_decay": 0.5, "lr": 0.5}, 0.25),
    ]:
        group.update(change)
        opt.sync_groups()
        assert replayed() == expected
    assert (opt._preparation.tables.all[0].groups.rows.data_ptr(), int(step)) == (groups, 6)


def test_sync_groups_puts_all_numbers_into_the_table():
    opt = lrs_ext.Adam([torch.ones(3, requires_grad=True)], weight_decay=0.1)
    opt.param_groups[0].update(weight_decay=0.2, betas=(0.5, 0.6), eps=0.3, lr=0.4)
    opt.sync_groups()
    numbers = opt._preparation.tables.all[0].groups.rows[0].view(torch.float64).tolist()
    assert numbers[2:8] == [0.2, 0.0, 0.5, 0.6, 0.3, 0.0]
    assert opt.schedule_buffer.values[0, 0].item() == float(np.float32(0.4))
    assert not opt.state
    assert int(opt.schedule_buffer.step) == 0


def test_sync_groups_refuses_what_a_step_refuses():
    opt = make_sgd()
    for bad in ({"weight_decay": float("nan")}, {"lr": -1.0}):
        before = dict(opt.param_groups[0])
        opt.param_groups[0].update(bad)
        with pytest.raises(ValueError, match=r"must be finite"):
            opt.sync_groups()
        opt.param_groups[0].update(before)


# Mistakes.

TOO_HIGH = lrs_ext.linear(1.0, 5)
NEARLY_ONE = lrs_ext.constant(1 - 1e-9)  # 1 in float32
TABLE = lrs_ext.from_values([0.5, 1.0, 0.5])
BAD_BETAS = [{"betas": (s, 0.9)} for s in (TOO_HIGH, NEARLY_ONE, TABLE)]
MISTAKES = {
    "SGD": [
        *[{"momentum": s} for s in (TOO_HIGH, NEARLY_ONE, TABLE)],
        {"momentum": lrs_ext.constant(0.9), "nesterov": True, "dampening": 0.1},
        {"momentum": lrs_ext.constant(0.0), "nesterov": True},
        {"weight_decay": lrs_ext.from_values([1e39, 0.0])},
    ],
    "Adam": BAD_BETAS,
    "AdamW": [*BAD_BETAS, {"betas": (LINEAR, torch.tensor(0.9))}, {"betas": (LINEAR, 1.0)}],
    "Lion": BAD_BETAS,
    "LAMB": BAD_BETAS,
}
WORDS = r"Invalid (momentum value|beta parameter at index [01]|weight_decay value): (1.0|inf)"
WORDS += r"|Nesterov momentum requires a momentum and zero dampening|both floats or both Tensors"


@pytest.mark.parametrize(
    ("name", "mistake"), [(name, bad) for name, every in MISTAKES.items() for bad in every], ids=str
)
def test_schedules_out_of_range_are_refused(name, mistake):
    optimizer = getattr(lrs_ext, name)
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    with pytest.raises(ValueError, match=WORDS):
        optimizer(params, **mistake)
    opt = optimizer(params[:1], lr=0.1, weight_decay=LINEAR)
    with pytest.raises(ValueError, match=WORDS):
        opt.add_param_group({"params": params[1:], **mistake})
    assert len(opt.param_groups) == 1
    before = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    number = before["momentum"] if name == "SGD" else before["betas"][0]
    opt.param_groups[0].update(mistake)
    params[0].grad = torch.ones(3)
    with pytest.raises(ValueError, match=WORDS):
        opt.step()
    assert torch.equal(params[0], torch.ones(3))
    group = opt.param_groups[0]
    assert (group["momentum"] if name == "SGD" else group["betas"][0]) is number
    assert group["weight_decay"] is before["weight_decay"]
    group.update(before)
    opt.step()
    assert group["weight_decay"] == LINEAR(1)


def test_the_way_out_is_in_the_message():
    with pytest.raises(ValueError, match=r"linear\(.*\) must be in \[0, 1\) at every step.*scaled"):
        make_sgd(momentum=TOO_HIGH)
    make_sgd(momentum=TOO_HIGH.scaled(0.9))


def test_nesterov_needs_a_momentum_somewhere_only():
    opt = make_sgd(momentum=lrs_ext.linear(0.9, 2), nesterov=True)
    for k in range(4):
        update(params_of(opt), opt, k)
        opt.param_groups[0]["weight_decay"] = lrs_ext.constant(0.1 + k)  # checks all again
    assert opt.param_groups[0]["momentum"] == 0.0


@pytest.mark.parametrize(
    ("name", "key", "put"),
    [
        ("AdamW", "betas", lambda schedule: {"betas": (0.9, schedule)}),
        ("AdamW", "eps", lambda schedule: {"eps": schedule}),
        ("Lion", "betas", lambda schedule: {"betas": (schedule, schedule)}),
        ("SGD", "dampening", lambda schedule: {"momentum": 0.9, "dampening": schedule}),
    ],
)
def test_other_numbers_cannot_follow_a_schedule(name, key, put):
    options = put(lrs_ext.linear(0.5, total_steps=10))
    message = rf"{key} cannot follow a schedule, got linear\(.*: lr, weight_decay, and momentum or"
    with pytest.raises(TypeError, match=message):
        getattr(lrs_ext, name)([torch.zeros(2, requires_grad=True)], lr=0.1, **options)
    optimizer = getattr(lrs_ext, name)([torch.zeros(2, requires_grad=True)], lr=0.1)
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)], **options})
    assert len(optimizer.param_groups) == 1
