"""Groups with `lr_scale`, the key by which timm and others give layers a share of the rate."""

import copy
import pickle

import pytest
import torch

import lrs_ext

REX = lrs_ext.rex(0.1, total_steps=10, warmup_steps=2, min_lr=0.01)
SCALES = (1.0, 0.5, 0.125)


def make(lr=REX, scales=SCALES, cls=lrs_ext.SGD, **options):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr_scale": scale} for scale in scales
    ]
    return cls(groups, lr=lr, **options)


def update(opt, steps=1):
    for _ in range(steps):
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        opt.step()
    return opt


def check(opt, step, schedule=REX, scales=SCALES):
    expected = [scale * schedule(step) for scale in scales]
    assert opt.current_lr() == pytest.approx(expected, rel=1e-6)
    assert [group["lr"] for group in opt.param_groups] == pytest.approx(expected, rel=1e-12)


def test_a_schedule_runs_at_the_share_of_each_group():
    opt = make()
    for k in range(12):
        check(opt, k)
        update(opt)


def test_a_new_group_and_a_longer_schedule_are_scaled_once():
    opt = update(make(), 3)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr_scale": 0.25})
    check(opt, 3, scales=(*SCALES, 0.25))
    longer = REX.with_total_steps(100)  # needs a longer buffer
    opt.set_schedule(longer)
    check(update(opt), 4, longer, (*SCALES, 0.25))
    opt.set_schedule(REX, group=1)
    assert opt.current_lr()[1] == pytest.approx(0.5 * REX(4))
    opt.param_groups[2]["lr"] = REX
    assert opt.current_lr()[2] == pytest.approx(0.125 * REX(4))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda opt: pickle.loads(pickle.dumps(opt)),
        lambda opt: _loaded(make(cls=type(opt)), opt),
        lambda opt: _loaded(make(1.0, scales=(1.0, 1.0, 1.0), cls=type(opt)), opt),
    ],
    ids=["deepcopy", "pickle", "checkpoint", "checkpoint into plain groups"],
)
def test_copies_and_checkpoints_scale_once(name, copied):
    opt = update(make(cls=getattr(lrs_ext, name)), 3)
    twin = copied(opt)
    check(twin, 3)
    check(update(copied(update(twin))), 5)


def _loaded(fresh, opt):
    fresh.load_state_dict(opt.state_dict())
    return fresh


def test_floats_and_what_the_buffer_gets_are_taken_as_they_are():
    opt = make(0.5)
    assert opt.current_lr() == [0.5, 0.5, 0.5]  # as in torch: who writes floats scales them
    opt = make()
    opt.schedule_buffer.fill_(1, REX)
    assert opt.current_lr()[1] == pytest.approx(REX(0))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), "half", True])
def test_what_is_no_share_is_refused(scale):
    with pytest.raises(ValueError, match="lr_scale of a parameter group must be a positive number"):
        make(scales=(1.0, scale))


def test_the_scheduler_of_torch_scales_too():
    opt = make(0.1, cls=torch.optim.SGD)
    scheduler = lrs_ext.ScheduleLR(opt, REX)
    update(opt)
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([scale * REX(1) for scale in SCALES])
    state = opt.state_dict()
    resumed = make(0.1, cls=torch.optim.SGD)
    resumed.load_state_dict(state)
    again = lrs_ext.ScheduleLR(resumed, REX, last_epoch=1)
    assert again.get_last_lr() == pytest.approx([scale * REX(2) for scale in SCALES])
    lists = lrs_ext.ScheduleLR(make(0.1, cls=torch.optim.SGD), [REX] * 3)
    assert lists.get_last_lr() == [REX(0)] * 3


def test_a_search_refuses_what_it_does_not_read():
    opt = make(0.1, scales=(1.0, 0.5))
    model = torch.nn.ParameterList(p for group in opt.param_groups for p in group["params"])
    with pytest.raises(ValueError, match=r"group 1 has lr_scale=0.5.* multiply its lr by it"):
        lrs_ext.AutoLRS(opt, model, (1e-3, 1.0), total_steps=100)
