"""Checkpoints of schedules that are tables: each table once, to the bit, through every way."""

import io

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_checkpoint import through_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import lrs_ext

LENGTH, GROUPS = 5000, 10
# Numbers that float32 has not; their end is the smallest there is.
DOUBLES = np.append(np.random.default_rng(0).random(LENGTH - 1), 5e-324)
FLOATS = DOUBLES.astype(np.float32)
SCHEDULES = {
    "float64": lrs_ext.from_values(DOUBLES),
    "float32": lrs_ext.from_values(FLOATS),
    "function": lrs_ext.from_function(lambda k: 0.1 / (k + 3), total_steps=LENGTH),
    "joined": lrs_ext.join(
        [lrs_ext.from_values(FLOATS), lrs_ext.rex(0.1, 50), lrs_ext.from_values(DOUBLES)], [4, 9]
    ),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


def make(lr, model=None, **options):
    model = model or torch.nn.ParameterList([torch.zeros(3) for _ in range(GROUPS)])
    return model, lrs_ext.AdamW([{"params": [p]} for p in model.parameters()], lr=lr, **options)


def update(opt, steps):
    for _ in range(steps):
        for group in opt.param_groups:
            group["params"][0].grad = torch.ones(3)
        opt.step()
        opt.zero_grad()


def in_charge(opt):
    return [opt._numbers.schedules(index) for index in range(len(opt.param_groups))]


def saved_bytes(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return file.getbuffer().nbytes


@schedules
def test_resuming_is_exact(schedule):
    _, opt = make(schedule, weight_decay=schedule.scaled(0.5))
    update(opt, 5)
    _, resumed = make(0.7)
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert in_charge(resumed) == in_charge(opt)
    assert in_charge(resumed)[3] == {"lr": schedule, "weight_decay": schedule.scaled(0.5)}
    assert [group["lr"] for group in resumed.param_groups] == [schedule(5)] * GROUPS
    assert torch.equal(resumed.schedule_buffer.values, opt.schedule_buffer.values)
    again = through_file(resumed.state_dict())["param_groups"]
    assert again == opt.state_dict()["param_groups"]


@pytest.mark.parametrize(("values", "width"), [(DOUBLES, 8), (FLOATS, 4)], ids=["64", "32"])
def test_groups_share_a_table(values, width):
    _, opt = make(0.1)
    without = saved_bytes(opt.state_dict())
    for index, group in enumerate(opt.param_groups):
        opt.set_schedule(lrs_ext.from_values(values), index)
        group["weight_decay"] = lrs_ext.from_values(values.copy())
    opt.sync_groups()
    assert saved_bytes(opt.state_dict()) - without < 1.5 * width * LENGTH
    _, resumed = make(0.1)
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert saved_bytes(resumed.state_dict()) - without < 1.5 * width * LENGTH
    assert len({id(schedules["lr"].table) for schedules in in_charge(resumed)}) == 1


@schedules
def test_torch_carries_tables_along(schedule):
    model, opt = make(schedule)
    update(opt, 5)
    theirs = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    theirs.load_state_dict(through_file(opt.state_dict()))
    _, back = make(0.7)
    back.load_state_dict(through_file(theirs.state_dict()))
    assert in_charge(back) == in_charge(opt)


@schedules
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("lr", [0.7, lrs_ext.rex(0.1, 9), lrs_ext.from_values([0.1, 0.2])], ids=str)
def test_distributed_checkpoints_need_no_table_of_the_same_length(schedule, flat, lr, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = make(schedule)
    update(opt, 5)
    dcp.save(get_optimizer_state_dict(model, opt, options=options), checkpoint_id=str(tmp_path))
    model, resumed = make(lr)
    state_dict = get_optimizer_state_dict(model, resumed, options=options)
    dcp.load(state_dict, checkpoint_id=str(tmp_path))
    set_optimizer_state_dict(model, resumed, state_dict, options=options)
    assert in_charge(resumed) == in_charge(opt)
    assert resumed.current_lr() == opt.current_lr()


def test_a_scheduler_of_torch_describes_a_table_once():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]} for _ in range(GROUPS)], lr=1.0)
    scheduler = lrs_ext.ScheduleLR(optimizer, [lrs_ext.from_values(FLOATS)] * GROUPS)
    assert saved_bytes(scheduler.state_dict()) < 20 * LENGTH
