"""Checks of checkpoints that move between numbers of ranks; see test_distributed.py."""

import copy
from pathlib import Path

import cases
import pytest
import rank_jobs
import torch
import torch.distributed.checkpoint as dcp
from rank_jobs import RANK, REX, SIZE
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lrs_ext

UPDATES = {
    "SGD": {"momentum": 0.9, "dampening": 0.5},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
    "Lion": {"weight_decay": 0.1},
    "LAMB": {"weight_decay": 0.1},
}
MOVING = {"weight_decay": lrs_ext.linear(0.3, 8)}  # of AdamW: its schedule is resumed too
STORAGES = {
    "float32": {},
    "bfloat16": {"state_dtype": torch.bfloat16},
    "blocks": {"state_dtype": torch.uint8},
    "split": {"master_weights": True},
}


def make_model(storage, is_sharded=True):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 130))
    model.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    model.to(rank_jobs.device, torch.bfloat16 if storage == "split" else torch.float32)
    return fully_shard(model, mesh=rank_jobs.mesh_of()) if is_sharded else model


def make(name, storage, model, lr=REX):
    options = UPDATES[name] | STORAGES[storage] | (MOVING if name == "AdamW" else {})
    return getattr(lrs_ext, name)(model.parameters(), lr=lr, **options)


def update(model, opt, step):
    """Update number `step`, with the same gradients on any number of ranks."""
    for k, param in enumerate(p for p in model.parameters() if p.requires_grad):
        grad = rank_jobs.random(param.shape, 100 * step + k, param.dtype)
        param.grad = grad
        if isinstance(param, DTensor):
            param.grad = rank_jobs.spread(grad, param.device_mesh, param.placements)
    opt.step()
    opt.zero_grad()


def numbers_of(model, opt):
    """Returns all that a run goes on from, in whole tensors."""
    options = StateDictOptions(full_state_dict=True)
    state_dict = get_optimizer_state_dict(model, opt, options=options)
    return {
        "params": {n: _whole(p).clone() for n, p in model.named_parameters()},
        "states": copy.deepcopy(state_dict["state"]),
        "groups": [
            {k: g[k] for k in ("lr", "weight_decay", "schedule")}
            for g in state_dict["param_groups"]
        ],
        "step": int(opt.schedule_buffer.step),
        "lr": opt.current_lr(),
    }


def _whole(param):
    return param.full_tensor() if isinstance(param, DTensor) else param.detach()


def save(folder, name, storage, steps):
    """Saves after `steps` updates; then goes on, and leaves what came of it for the others."""
    model = make_model(storage)
    opt = make(name, storage, model)
    for step in range(steps):
        update(model, opt, step)
    state_dict = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt),
    }
    dcp.save(state_dict, checkpoint_id=folder)
    saved = numbers_of(model, opt)
    for step in range(steps, steps + 4):
        update(model, opt, step)
    if RANK == 0:
        torch.save((saved, numbers_of(model, opt)), Path(folder, "expected.pt"))
    else:
        numbers_of(model, opt)


def load(folder, name, storage, steps, is_sharded):
    """Goes on on this number of ranks as those who have saved did on theirs."""
    model = make_model(storage, is_sharded)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    opt = make(name, storage, model, lr=0.7)
    before = [param.detach().clone() for param in model.parameters()]
    state_dict = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt),
    }
    assert int(opt.schedule_buffer.step) == 0
    assert all(map(_same, before, model.parameters()))  # its own step moves nothing
    dcp.load(state_dict, checkpoint_id=folder)
    set_model_state_dict(model, state_dict["model"])
    set_optimizer_state_dict(model, opt, state_dict["optimizer"])
    saved, expected = torch.load(Path(folder, "expected.pt"), map_location=rank_jobs.device)
    has_same_parts = SIZE == 2 and is_sharded
    is_exact = storage != "blocks" or has_same_parts
    assert_close(numbers_of(model, opt), saved, cases.EXACT if is_exact else cases.BLOCKS_APART)
    for step in range(steps, steps + 4):
        update(model, opt, step)
    found = numbers_of(model, opt)
    if has_same_parts:
        assert_close(found, expected, cases.EXACT)
    elif storage in ("float32", "split"):
        assert_close(found, expected, cases.TORCH if name == "LAMB" else cases.EXACT)
    else:  # random bits are those of the parts
        assert_near(found, expected, saved["params"])


def _same(before, after):
    if isinstance(before, DTensor):
        before, after = before.to_local(), after.detach().to_local()
    return torch.equal(before, after)


def assert_close(found, expected, tolerance):
    close = {"rtol": tolerance.rtol, "atol": tolerance.atol}
    torch.testing.assert_close(found["params"], expected["params"], **close)
    assert set(found["states"]) == set(expected["states"])
    for name, states in expected["states"].items():
        assert set(found["states"][name]) == set(states)
        for key, value in states.items():
            own = found["states"][name][key]
            torch.testing.assert_close(own.to(value.dtype), value, **close)
    assert_same_schedule(found, expected)


def assert_near(found, expected, start):
    """Parameters have gone from `start` to about the same place."""
    for name, value in expected["params"].items():
        distance = (found["params"][name].float() - value.float()).norm()
        assert distance <= cases.STEPS_APART * (value.float() - start[name].float()).norm(), name
    assert_same_schedule(found, expected)


def assert_same_schedule(found, expected):
    for key in ("groups", "step", "lr"):
        assert found[key] == expected[key]


def whole_state_dicts_go_both_ways(name):
    """Gathered from all ranks, and given out by the first."""
    model, other = make_model("float32"), make_model("float32")
    opt, resumed = (make(name, "float32", m) for m in (model, other))
    for step in range(3):
        update(model, opt, step)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    gathered = get_optimizer_state_dict(
        model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    assert bool(gathered.get("state")) == (RANK == 0)
    set_model_state_dict(other, get_model_state_dict(model))
    set_optimizer_state_dict(other, resumed, gathered if RANK == 0 else {}, options=options)
    for step in range(3, 6):
        update(model, opt, step)
        update(other, resumed, step)
    tolerance = cases.TORCH if name == "LAMB" else cases.EXACT
    assert_close(numbers_of(other, resumed), numbers_of(model, opt), tolerance)


def flat_state_dicts_go_on(name):
    """By names of parameters, from keys of the groups that are alive, as torchtitan has them."""
    model, other = make_model("float32"), make_model("float32")
    opt, resumed = (make(name, "float32", m) for m in (model, other))
    for step in range(3):
        update(model, opt, step)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    set_model_state_dict(other, get_model_state_dict(model))
    set_optimizer_state_dict(other, resumed, flat, options=options)
    assert int(resumed.schedule_buffer.step) == 3
    for step in range(3, 6):
        update(model, opt, step)
        update(other, resumed, step)
    tolerance = cases.TORCH if name == "LAMB" else cases.EXACT
    assert_close(numbers_of(other, resumed), numbers_of(model, opt), tolerance)


def state_dicts_of_this_rank_resume(storage):
    """Without torch.distributed.checkpoint: each rank keeps its own, to the bit."""
    for name in ("SGD", "AdamW", "Lion"):
        model, other = make_model(storage), make_model(storage)
        opt, resumed = (make(name, storage, m) for m in (model, other))
        for step in range(3):
            update(model, opt, step)
        set_model_state_dict(other, get_model_state_dict(model))
        resumed.load_state_dict(opt.state_dict())
        for step in range(3, 6):
            update(model, opt, step)
            update(other, resumed, step)
        assert_close(numbers_of(other, resumed), numbers_of(model, opt), cases.EXACT)


def a_checkpoint_of_one_process_is_shared_out(storage):
    """One of whole tensors, in the hands of every rank."""
    alone, model = make_model(storage, is_sharded=False), make_model(storage)
    alone_opt, opt = make("AdamW", storage, alone), make("AdamW", storage, model)
    for step in range(3):
        update(alone, alone_opt, step)
    for param, other in zip(model.parameters(), alone.parameters(), strict=True):
        local = rank_jobs.spread(other.detach(), param.device_mesh, param.placements)
        param.detach().to_local().copy_(local.to_local())
    opt.load_state_dict(alone_opt.state_dict())
    found, saved = numbers_of(model, opt), numbers_of(alone, alone_opt)
    if storage == "blocks":
        saved["states"] = found["states"]  # codes there, numbers here: compared by what they do
    assert_close(found, saved, cases.EXACT)
    start = copy.deepcopy(saved["params"])
    for step in range(3, 6):
        update(alone, alone_opt, step)
        update(model, opt, step)
    found, expected = numbers_of(model, opt), numbers_of(alone, alone_opt)
    if storage in ("float32", "split"):
        assert_close(found, expected, cases.EXACT)
    else:
        assert_near(found, expected, start)


def asking_moves_nothing(name):
    """A state dict of a new optimizer, whose first gradients may be zero on some ranks only."""
    model, other = make_model("float32"), make_model("float32")
    opt, untouched = (make(name, "float32", m) for m in (model, other))
    state_dict = get_optimizer_state_dict(model, opt)
    assert int(opt.schedule_buffer.step) == 0
    for states in state_dict["state"].values():
        for key, value in states.items():
            if key != "momentum_buffer" or value is not None:
                assert not _whole(value).any()
    for step in range(3):
        update(model, opt, step)
        update(other, untouched, step)
    tolerance = cases.TORCH if name == "LAMB" else cases.EXACT
    assert_close(numbers_of(model, opt), numbers_of(other, untouched), tolerance)
    # A learning rate of zero with a gradient on one rank only is a step on all of them.
    model = make_model("float32")
    opt = make(name, "float32", model)
    opt.param_groups[0]["lr"] = 0.0
    for param in (p for p in model.parameters() if p.requires_grad):
        param.grad = torch.zeros_like(param)
    if RANK == 0:
        model[0].weight.grad._local_tensor[0, 0] = 1.0
    opt.step()
    assert int(opt.schedule_buffer.step) == 1


def what_a_wrapper_keeps_comes_back(storage):
    model = make_model(storage)
    opt = make("AdamW", storage, model)
    update(model, opt, 0)
    weight = model[0].weight
    opt.state[weight]["slow"] = torch.full_like(weight, 1.25, requires_grad=False)
    opt.state[weight]["rank"] = torch.arange(3, device=rank_jobs.device)
    update(model, opt, 1)
    resumed = make_model(storage)
    set_model_state_dict(resumed, get_model_state_dict(model))
    resumed_opt = make("AdamW", storage, resumed)
    resumed_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    update(model, opt, 2)
    update(resumed, resumed_opt, 2)
    assert_close(numbers_of(resumed, resumed_opt), numbers_of(model, opt), cases.EXACT)
    state = resumed_opt.state[resumed[0].weight]
    assert state["slow"].placements == weight.placements
    assert torch.equal(state["slow"].to_local(), torch.full_like(weight.to_local(), 1.25))
    assert torch.equal(state["rank"], torch.arange(3, device=rank_jobs.device))


def errors_say_the_way_out():
    model, alone = make_model("float32"), make_model("float32", is_sharded=False)
    opt, alone_opt = (make("AdamW", "float32", m) for m in (model, alone))
    update(model, opt, 0)
    update(alone, alone_opt, 0)
    for target, source, message in (
        (alone_opt, opt.state_dict(), "is a DTensor, its parameter is not: gather it"),
        (opt, _with_another_shape(alone_opt.state_dict()), "belongs to another model"),
    ):
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(source)


def _with_another_shape(state_dict):
    states = {k: {**s, "exp_avg": torch.zeros(2, 2)} for k, s in state_dict["state"].items()}
    return {**state_dict, "state": states}
