"""Groups are looked at again only when something has been put into them: what counts as that."""

import functools

import pytest
import torch

import lrs_ext
from lrs_ext import ops


class Groups:
    """Two known groups and the schedules of their rows."""

    def __init__(self):
        self.groups = [{"params": [], "lr": 0.5, "eps": 1e-8}, {"params": [], "lr": 0.25}]
        self.schedules = [lrs_ext.rex(0.1, total_steps=10), None]
        self.known = ops.KnownGroups()
        self.look()

    def look(self):
        self.known.look_at(self.groups, self.schedules)
        self.known.confirm()

    def are_unchanged(self):
        return self.known.are_unchanged(self.groups, self.schedules)

    def put(self, *values):
        self.known.put(self.groups, "lr", list(values))


CHANGES = {
    "a value": lambda g: g.groups[1].update(lr=0.125),
    "an equal value": lambda g: g.groups[0].update(lr=float("0.5")),
    "a new key": lambda g: g.groups[0].update(name="first"),
    "a key less": lambda g: g.groups[0].pop("eps"),
    "no key at all": lambda g: g.groups[1].clear(),
    "an equal group": lambda g: g.groups.__setitem__(0, dict(g.groups[0])),
    "another order": lambda g: g.groups.reverse(),
    "a group more": lambda g: g.groups.append({}),
    "a group less": lambda g: g.groups.pop(),
    "another schedule": lambda g: g.schedules.__setitem__(1, lrs_ext.constant(0.1)),
    "no schedule": lambda g: g.schedules.__setitem__(0, None),
    "a look without a confirmation": lambda g: g.known.look_at(g.groups, g.schedules),
    "forgetting": lambda g: g.known.forget(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_until_all_has_been_seen_again(change):
    groups = Groups()
    assert groups.are_unchanged()
    CHANGES[change](groups)
    assert not groups.are_unchanged()
    groups.put(0.75, None)
    assert not groups.are_unchanged()
    groups.look()
    assert groups.are_unchanged()


def test_a_value_that_is_put_by_us_is_no_change():
    groups = Groups()
    groups.put(0.75, None)
    assert groups.are_unchanged()
    assert [group["lr"] for group in groups.groups] == [0.75, 0.25]
    groups.groups[0]["lr"] = 0.5
    groups.put(None, 0.125)
    assert not groups.are_unchanged()
    assert [group["lr"] for group in groups.groups] == [0.5, 0.125]


def test_what_changes_by_a_call_of_ours_is_no_change():
    groups = Groups()
    for group in groups.groups:
        groups.known.change(groups.groups, functools.partial(group.update, eps=1.0))
        assert groups.are_unchanged()
    groups.groups[0]["lr"] = 0.125
    groups.known.change(groups.groups, groups.groups[1].clear)
    assert not groups.are_unchanged()


def test_changes_of_other_groups_are_none_of_ours():
    groups, others = Groups(), Groups()
    others.put(1.0, 2.0)
    others.groups[0].clear()
    assert groups.are_unchanged()
    assert not others.are_unchanged()
    others.groups.clear()
    others.look()
    shared = Groups()
    shared.groups[0] = groups.groups[0]
    shared.look()
    shared.put(1.5, None)
    assert shared.are_unchanged()
    assert not groups.are_unchanged()


def test_a_group_of_another_class_is_never_known():
    class Logged(dict):
        pass

    groups = Groups()
    groups.groups[1] = Logged(groups.groups[1])
    groups.look()
    assert not groups.are_unchanged()


def make(**options):
    param = torch.nn.Parameter(torch.zeros(3))
    options = {"betas": (0.9, 0.5), **options}
    return param, lrs_ext.AdamW([param], lr=lrs_ext.linear(0.5, total_steps=8), **options)


MOVING = {
    "weight_decay": lrs_ext.linear(0.25, total_steps=8),
    "betas": (lrs_ext.linear(0.75, total_steps=8), 0.5),
}
moving = pytest.mark.parametrize("options", [{}, MOVING], ids=["fixed", "moving"])


def update(param, opt, steps=1):
    for _ in range(steps):
        param.grad = torch.full((3,), 1.0 / (1 + opt.committed_steps))
        opt.step()


def is_known(opt):
    return opt._preparation.tables.known_groups.are_unchanged(
        opt.param_groups, opt.schedule_buffer.schedules
    )


@moving
def test_the_groups_are_known_from_the_second_step_on(options):
    param, opt = make(**options)
    update(param, opt, 2)
    for _ in range(3):
        assert is_known(opt)
        update(param, opt)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.5 * 3 / 8)


def set_lr(opt):
    opt.param_groups[0]["lr"] = 0.03125


def set_decay(opt):
    opt.param_groups[0]["weight_decay"] = 0.5


def set_amsgrad(opt):
    opt.param_groups[0]["amsgrad"] = True


def set_maximize(opt):
    opt.param_groups[0]["maximize"] = True


def fill(opt):
    opt.schedule_buffer.fill_(0, lrs_ext.constant(0.0625))


def set_schedule(opt):
    opt.set_schedule(lrs_ext.constant(0.0625))


def replace_group(opt):
    opt.param_groups[0] = {**opt.param_groups[0], "betas": (0.25, 0.5)}


def schedule_decay(opt):
    opt.param_groups[0]["weight_decay"] = lrs_ext.linear(0.5, total_steps=8)


def roll_back(opt):
    opt.schedule_buffer.set_step_(0)
    opt.current_lr()


def reload(opt):
    state_dict = opt.state_dict()
    state_dict["param_groups"][0]["eps"] = 1.0
    opt.load_state_dict(state_dict)


INTERVENTIONS = [
    set_lr,
    set_decay,
    set_amsgrad,
    set_maximize,
    fill,
    set_schedule,
    replace_group,
    schedule_decay,
    roll_back,
    reload,
]


@moving
@pytest.mark.parametrize("intervene", INTERVENTIONS)
def test_the_next_step_follows_what_was_put_there(intervene, options):
    results = []
    for remembers in (True, False):
        param, opt = make(**options)
        update(param, opt, 3)
        assert is_known(opt)
        intervene(opt)
        for _ in range(3):
            if not remembers:
                opt._preparation.tables.known_groups.forget()
            update(param, opt)
        shown = [opt.param_groups[0][key] for key in ("lr", "weight_decay", "betas")]
        results.append([param.tolist(), shown, opt.current_lr()])
    assert results[0] == results[1]
    param, opt = make(**options)
    update(param, opt, 6)
    assert results[0][0] != param.tolist()


@pytest.mark.parametrize("betas", [[0.5, 0.9], (torch.tensor(0.5), torch.tensor(0.9))])
def test_what_may_change_in_its_place_is_looked_at_in_each_step(betas):
    param, opt = make(betas=(0.5, 0.9))
    opt.param_groups[0]["betas"] = betas
    update(param, opt, 3)
    assert not is_known(opt)
    row = opt._preparation.tables.all[0].groups.rows
    before = row.clone()
    if isinstance(betas, list):
        betas[0] = 0.25
    else:
        betas[0].fill_(0.25)
    update(param, opt)
    assert not torch.equal(row, before)


@pytest.mark.parametrize(
    ("name", "key"), [("AdamW", "weight_decay"), ("AdamW", "eps"), ("SGD", "momentum")]
)
def test_a_tensor_that_changes_in_its_place_counts_from_the_next_step(name, key):
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    numbers = [torch.tensor(0.5), 0.5]
    opts = [
        getattr(lrs_ext, name)([param], lr=0.1, **{key: number})
        for param, number in zip(params, numbers, strict=True)
    ]
    for param, opt in zip(params, opts, strict=True):
        update(param, opt, 2)
    numbers[0].fill_(0.25)
    opts[1].param_groups[0][key] = 0.25
    for param, opt in zip(params, opts, strict=True):
        update(param, opt, 2)
    assert torch.equal(*params)


@pytest.mark.parametrize(
    ("number", "value"),
    [(torch.tensor(-0.5)._neg_view(), 0.5), (torch._efficientzerotensor(()), 0.0)],
    ids=["negated", "without memory"],
)
@pytest.mark.parametrize("key", ["weight_decay", "lr"])
def test_a_tensor_counts_as_what_it_is_worth(key, number, value):
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    for param, worth in zip(params, [number, value], strict=True):
        update(param, lrs_ext.AdamW([param], **{"lr": 0.1, key: worth}), 2)
    assert torch.equal(*params)


@pytest.mark.parametrize("shape", [(2,), (0,)])
@pytest.mark.parametrize("key", ["weight_decay", "eps", "betas"])
def test_a_tensor_that_is_not_one_number_is_an_error(key, shape):
    param, opt = make()
    value = torch.zeros(shape)
    opt.param_groups[0][key] = (value, value) if key == "betas" else value
    with pytest.raises(ValueError, match="must be 1-element, got shape"):
        update(param, opt, 2)


def test_an_invalid_number_is_an_error_in_each_step():
    param, opt = make()
    update(param, opt, 2)
    opt.param_groups[0]["weight_decay"] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match="weight_decay"):
            update(param, opt)
    opt.param_groups[0]["weight_decay"] = 0.0
    update(param, opt)
