"""Weight decay and momentum that follow schedules: skipped updates, checkpoints, other drivers."""

import copy
import io
import pickle

import cases
import numpy as np
import pytest
import torch
from moving import numbers_in, put, schedule_of, with_values
from plain_optimizers import plain_optimizer
from test_checkpoint import assert_equal_runs, copies, make_params, params_of, through_file, update
from test_hyper_schedules import CPU, LINEAR, decays, every, make, make_sgd, used_decay
from torch.distributed.checkpoint import state_dict as dcp

import lrs_ext

# Skipped updates.


@every
def test_a_skipped_update_does_not_advance(backend, row):
    opt, other = (make(row, make_params(backend), backend) for _ in range(2))
    update(params_of(opt), opt, 0)
    update(params_of(other), other, 0)
    shown = numbers_in(opt.param_groups[0], row)
    opt.found_inf = torch.ones((), device=backend.device)
    opt.grad_scale = torch.ones((), device=backend.device)
    update(params_of(opt), opt, 1)
    del opt.found_inf, opt.grad_scale
    opt.state_dict()  # follows the device
    assert numbers_in(opt.param_groups[0], row) == shown
    assert_equal_runs([opt, other], 1, 5)
    assert numbers_in(opt.param_groups[0], row) == numbers_in(other.param_groups[0], row)


# Checkpoints.


@every
@pytest.mark.parametrize("saved_at", [0, 1, 4, 7])
def test_resuming_is_exact(backend, row, saved_at):
    opt = make(row, make_params(backend), backend)
    for k in range(saved_at):
        update(params_of(opt), opt, k)
    checkpoint = through_file(opt.state_dict())
    fixed = with_values(row, 0)
    resumed = [make(row, copies(params_of(opt)), backend, **own) for own in ({}, fixed)]
    for other in resumed:
        other.load_state_dict(checkpoint)
        assert numbers_in(other.param_groups[0], row) == numbers_in(opt.param_groups[0], row)
    assert_equal_runs([opt, *resumed], saved_at, saved_at + 4)
    for other in resumed:
        assert numbers_in(other.param_groups[0], row) == numbers_in(opt.param_groups[0], row)


@every
def test_floats_that_took_over_are_resumed_too(row):
    opt = make(row, make_params(CPU))
    update(params_of(opt), opt, 0)
    for name in row.numbers:
        put(opt.param_groups[0], name, 0.125)
    checkpoint = through_file(opt.state_dict())
    resumed = make(row, copies(params_of(opt)))
    resumed.load_state_dict(checkpoint)
    assert_equal_runs([opt, resumed], 1, 5)
    assert set(numbers_in(resumed.param_groups[0], row).values()) == {0.125}


def test_what_was_put_there_before_a_checkpoint_of_torch_counts():
    param = torch.zeros((), requires_grad=True)
    theirs = torch.optim.AdamW([param], weight_decay=0.125)
    opt = lrs_ext.AdamW([param], betas=(LINEAR, 0.9))
    opt.param_groups[0].update(weight_decay=LINEAR, betas=(0.25, 0.9))
    opt.load_state_dict(theirs.state_dict())
    for k in range(2):
        group = opt.param_groups[0]
        assert (group["weight_decay"], group["betas"]) == (LINEAR(k), theirs.defaults["betas"])
        update([param], opt, k)


def test_a_number_changed_in_the_checkpoint_is_believed():
    opt = make_sgd(weight_decay=LINEAR, momentum=lrs_ext.linear(0.5, 5))
    used_decay(opt)
    checkpoint = through_file(opt.state_dict())
    checkpoint["param_groups"][0]["weight_decay"] = 0.25
    opt.load_state_dict(checkpoint)
    used_decay(opt)
    assert opt.param_groups[0]["weight_decay"] == 0.25
    assert opt.param_groups[0]["momentum"] == lrs_ext.linear(0.5, 5)(2)


@pytest.mark.parametrize(
    "row", [row for row in cases.MOVING_ALL if row.update.name in cases.TORCH_OPTIMIZERS], ids=str
)
def test_torch_loads_the_checkpoint_and_gives_it_back(backend, row):
    opt = make(row, make_params(backend), backend)
    for k in range(3):
        update(params_of(opt), opt, k)
    plain = plain_optimizer(row.update.name)
    theirs = plain(copies(params_of(opt)), lr=0.1, foreach=False, **with_values(row, 0))
    theirs.load_state_dict(through_file(opt.state_dict()))
    assert numbers_in(theirs.param_groups[0], row) == numbers_in(opt.param_groups[0], row)
    theirs.param_groups[0]["lr"] = 0.02
    update(params_of(theirs), theirs, 3)
    other = make(row, copies(params_of(theirs)), backend, lr=0.1)
    other.load_state_dict(through_file(theirs.state_dict()))
    # From another optimizer: the schedules of this one go on, from its step where it has one.
    step = 0 if row.update.name == "SGD" else 4
    expected = {n: schedule_of(s)(step) for n, s in row.numbers.items()}
    assert numbers_in(other.param_groups[0], row) == expected
    assert int(other.schedule_buffer.step) == step


def test_a_checkpoint_out_of_range_changes_nothing():
    opt = make_sgd(momentum=lrs_ext.linear(0.5, 5))
    checkpoint = opt.state_dict()
    saved = checkpoint["param_groups"][0]["schedule"]
    checkpoint["param_groups"][0]["schedule"] = saved.replace('"lr": 0.5', '"lr": 1.5')
    used_decay(opt)
    with pytest.raises(ValueError, match=r"Invalid momentum value: 1\.5"):
        opt.load_state_dict(checkpoint)
    assert int(opt.schedule_buffer.step) == 1
    assert opt.param_groups[0]["momentum"] == 0.4
    used_decay(opt)
    assert opt.param_groups[0]["momentum"] == pytest.approx(0.3)


def test_loading_reaches_the_device_at_once_and_keeps_the_rows(backend):
    opt = make_sgd(backend, weight_decay=LINEAR)
    row, groups = (
        opt._numbers.hyper_schedules.rows(0)["weight_decay"],
        opt._preparation.tables.all[0].groups,
    )
    checkpoint = opt.state_dict()
    opt.param_groups[0]["weight_decay"] = 0.25
    opt.sync_groups()
    opt.load_state_dict(checkpoint)
    assert opt._preparation.tables.all[0].groups is groups
    assert opt._numbers.hyper_schedules.rows(0)["weight_decay"] is row
    assert opt._preparation.tables.all[0]._written[0][2] == {"weight_decay": row}
    assert used_decay(opt) == decays(LINEAR, [0])


@every
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_to_the_bit_and_share_nothing(row, steps, copied):
    params = make_params(CPU)
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.05}]
    opt = make(row, groups)
    for k in range(steps):
        update(params, opt, k)
    other = copied(opt)
    update(params_of(other), other, steps)
    update(params, opt, steps)
    assert_equal_runs([opt, other], steps + 1, steps + 4)
    for group, own in zip(opt.param_groups, other.param_groups, strict=True):
        assert numbers_in(group, row) == numbers_in(own, row)
    mine, theirs = (o._numbers.hyper_schedules.rows(0) for o in (opt, other))
    assert all(mine[name].data_ptr() != theirs[name].data_ptr() for name in mine)


@every
def test_distributed_checkpoints_carry_the_schedules(row):
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [make(row, models[0].parameters()), make(row, models[1].parameters())]
    for k in range(3):
        update(params_of(opts[0]), opts[0], k)
    saved = io.BytesIO()
    torch.save(dcp.get_optimizer_state_dict(models[0], opts[0]), saved)
    saved.seek(0)
    models[1].load_state_dict(models[0].state_dict())
    dcp.set_optimizer_state_dict(models[1], opts[1], torch.load(saved, weights_only=True))
    assert_equal_runs(opts, 3, 7)
    assert numbers_in(opts[0].param_groups[0], row) == numbers_in(opts[1].param_groups[0], row)


# Together with what else steps or drives an optimizer.


@every
def test_gradient_release_uses_the_same_numbers(row):
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [make(row, model.parameters()) for model in models]
    opts[1].step_in_backward()
    for k in range(6):
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(k))
        for model, opt in zip(models, opts, strict=True):
            opt.zero_grad()
            model(batch).square().mean().backward()
            opt.step()
    for param, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(param, other)


@every
def test_the_schedules_are_rolled_back_by_autolrs(row):
    model = torch.nn.Linear(3, 2)
    opt = make(row, model.parameters(), lr=0.01)
    auto = lrs_ext.AutoLRS(opt, model, lr_bounds=(1e-4, 1e-1), total_steps=60, num_trials=3)
    steps = []
    for batch in auto.batches([torch.randn(4, 3) for _ in range(10)]):
        steps.append(int(opt.schedule_buffer.step))
        shown = numbers_in(opt.param_groups[0], row)
        assert shown == {n: schedule_of(s)(steps[-1]) for n, s in row.numbers.items()}
        if len(steps) == 6:
            auto.load_state_dict(auto.state_dict())
        loss = model(batch).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        auto.step(loss.detach())
    assert steps.count(0) > 1  # each trial has the numbers of the first
    assert steps[-1] < len(steps) - 1 == 59


def test_a_plateau_leaves_the_numbers_alone(backend):
    opt = make_sgd(backend, lr=1.0, weight_decay=LINEAR)
    plateau = lrs_ext.ReduceOnPlateau(opt, patience=0, factor=0.5)
    used = []
    for _ in range(3):
        used += used_decay(opt)
        plateau.step(torch.ones((), device=backend.device))
    expected = [float(np.float32(LINEAR(k))) for k in range(3)]
    assert used == pytest.approx([expected[0], expected[1], expected[2] * 0.5], abs=1e-7)
