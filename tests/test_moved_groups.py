"""Groups that are removed or put in another order take their schedules along."""

import copy

import pytest
import torch

import lrs_ext

LRS = [lrs_ext.linear(0.25, 8), lrs_ext.cosine(0.5, 8), lrs_ext.rex(0.125, 8), lrs_ext.constant(2)]
DECAYS = [0.0, lrs_ext.linear(0.5, 8), 0.25, lrs_ext.cosine(0.5, 8)]

MOVES = {
    "reversed": lambda groups: groups.reverse(),
    "two exchanged": lambda groups: groups.insert(0, groups.pop(1)),
    "in a new list, as copies": lambda groups: groups.__setitem__(
        slice(None), [dict(groups[i]) for i in (2, 3, 0, 1)]
    ),
    "the first removed": lambda groups: groups.pop(0),
    "two removed": lambda groups: groups.__delitem__(slice(1, 3)),
    "removed and reversed": lambda groups: groups.__setitem__(slice(None), groups[2:0:-1]),
    "all removed": lambda groups: groups.clear(),
}


class Run:
    """Parameters of ours, one a group, beside those of torch, one an optimizer."""

    def __init__(self, name, backend):
        self.ours = [torch.ones(3, device=backend.device, requires_grad=True) for _ in LRS]
        self.theirs = [torch.ones(3, device=backend.device, requires_grad=True) for _ in LRS]
        rows = zip(self.ours, LRS, DECAYS, strict=True)
        groups = [{"params": [p], "lr": lr, "weight_decay": decay} for p, lr, decay in rows]
        self.opt = getattr(lrs_ext, name)(groups, backend=backend.name)
        self.torch_opts = [getattr(torch.optim, name)([p]) for p in self.theirs]
        self.step = 0

    def update(self, steps):
        present = {group["params"][0]: group for group in self.opt.param_groups}
        for _ in range(steps):
            for param in self.ours + self.theirs:
                param.grad = torch.full_like(param, 1.0 + self.step)
            for i, opt in enumerate(self.torch_opts):
                decay = DECAYS[i](self.step) if callable(DECAYS[i]) else DECAYS[i]
                opt.param_groups[0].update(lr=LRS[i](self.step), weight_decay=decay)
                if self.ours[i] in present:
                    opt.step()
            self.opt.step()
            self.step += 1
        for i, (param, expected) in enumerate(zip(self.ours, self.theirs, strict=True)):
            assert torch.allclose(param, expected, rtol=1e-5)
            if param in present and self.step > 0:
                assert present[param]["lr"] == pytest.approx(LRS[i](self.step))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("move", MOVES)
def test_the_next_step_follows(backend, name, move):
    run = Run(name, backend)
    run.update(3)
    MOVES[move](run.opt.param_groups)
    run.update(3)


@pytest.mark.parametrize("move", MOVES)
def test_what_is_asked_first_follows(probe, move):
    run = probe(*LRS)
    run.used()
    schedules = {run.params[i]: LRS[i] for i in range(4)}
    MOVES[move](run.groups)
    expected = [pytest.approx(schedules[group["params"][0]](1)) for group in run.groups]
    shown = [line for line in repr(run.opt).splitlines() if line.startswith("    schedule: ")]
    assert shown == [f"    schedule: { {'lr': schedules[g['params'][0]]} }" for g in run.groups]
    assert [copy.deepcopy(run.opt).current_lr(), run.opt.current_lr()] == [expected, expected]
    saved = run.opt.state_dict()
    run.used()
    run.opt.load_state_dict(saved)
    assert run.opt.current_lr() == expected
    assert [float(run.opt.lr_tensor(i)) for i in range(len(run.groups))] == expected


@pytest.mark.parametrize("move", ["reversed", "the first removed"])
def test_a_checkpoint_of_torch_leaves_the_schedules_where_the_groups_are(probe, move):
    run = probe(*LRS)
    run.used()
    MOVES[move](run.groups)
    lrs = [group["lr"] for group in run.groups]
    theirs = torch.optim.SGD([{"params": group["params"]} for group in run.groups])
    run.opt.load_state_dict(theirs.state_dict())
    assert [group["lr"] for group in run.groups] == lrs


def test_a_group_that_comes_after_one_was_removed_has_its_own_numbers(probe):
    run = probe(*LRS)
    decay = lrs_ext.linear(0.5, 8)
    run.groups[0]["weight_decay"] = decay
    run.used()
    removed = run.groups.pop(0)
    run.opt.add_param_group({**removed, "lr": LRS[3], "weight_decay": decay})
    run.used()
    schedules = [*LRS[1:], LRS[3]]
    assert run.opt.current_lr() == [pytest.approx(schedule(2)) for schedule in schedules]
    assert [group["weight_decay"] for group in run.groups] == [0, 0, 0, decay(2)]
    run.opt.load_state_dict(run.opt.state_dict())


def test_what_the_host_has_put_there_goes_along(probe):
    run = probe(*LRS)
    run.used()
    run.groups[1]["lr"] = 0.75
    run.buffer.write_(2, 0.5, steps=2)
    run.groups.reverse()
    assert run.used()[1:3] == [0.75, 0.5]
    run.opt.set_schedule(LRS[0], group=2)
    del run.groups[0]
    run.opt.set_schedule(lrs_ext.linear(1.0, 16), group=2)
    assert run.used() == [pytest.approx(lr) for lr in (1.0 - 2 / 16, LRS[0](2), 0.5, 0.0)]


def test_the_buffers_are_those_of_the_groups_as_they_lie_now(probe):
    run = probe(*LRS)
    run.used()
    run.groups.reverse()
    [buffer] = run.opt.schedule_buffers.values()
    buffer.write_(0, 0.75, steps=1)
    assert run.used() == pytest.approx([LRS[0](1), LRS[1](1), LRS[2](1), 0.75])


def test_groups_that_nobody_knows_are_an_error(probe):
    run = probe(*LRS)
    run.groups.append({**run.groups[0], "params": []})
    with pytest.raises(RuntimeError, match="are 5 parameter groups where there were 4: add them"):
        run.used()


def test_one_that_takes_the_place_of_another_is_an_error_where_a_schedule_is_in_charge(probe):
    run = probe(*LRS[:2])
    removed = run.groups.pop(0)
    run.groups.append({**removed, "lr": LRS[2], "schedule": {}})
    with pytest.raises(RuntimeError, match=r"group 0 is not the one .* groups with add_param"):
        run.used()


def test_a_captured_graph_and_a_driver_keep_their_groups(probe):
    run = probe(*LRS)
    run.opt._preparation.was_captured = True
    run.groups.reverse()
    with pytest.raises(RuntimeError, match="other groups are not in the captured graph"):
        run.used()
    run = probe(0.5, 0.25)
    run.plateau = lrs_ext.ReduceOnPlateau(run.opt)
    run.groups.reverse()
    with pytest.raises(RuntimeError, match="removed or put in another order under AutoLRS"):
        run.used()


CHANGES = {
    "a new group": lambda opt, new: opt.add_param_group({"params": [new]}),
    "one removed": lambda opt, _: opt.param_groups.pop(0),
    "longer rows": lambda opt, _: opt.set_schedule(lrs_ext.linear(0.5, 16), group=0),
}


@pytest.mark.parametrize("is_seen", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_schedule_that_was_put_aside_may_be_handed_back(probe, change, is_seen):
    run = probe(*LRS)
    run.used()
    group = run.groups[1]
    found, group["lr"] = group["lr"], 0.0
    if is_seen:
        assert run.used()[1] == 0.0
    CHANGES[change](run.opt, torch.zeros_like(run.params[0], requires_grad=True))
    assert run.used()[1] == 0.0
    group["lr"] = found
    step = 2 + is_seen
    assert [run.used()[1], run.used()[1]] == [pytest.approx(LRS[1](step + k)) for k in range(2)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_was_filled_before_keeps_its_schedule(probe, change):
    run = probe(*LRS)
    run.used()
    group, schedule = run.groups[1], lrs_ext.linear(0.75, 8)
    run.buffer.fill_(1, schedule)
    CHANGES[change](run.opt, torch.zeros_like(run.params[0], requires_grad=True))
    assert run.used()[1] == pytest.approx(schedule(1))
    assert group["lr"] == schedule(2)
    assert repr(schedule) in repr(run.opt)
