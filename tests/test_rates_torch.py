"""Rates of optimizers of torch, and on a GPU."""

import pytest
import torch
from test_rates import BUDGET, Driven, expected, make_shape

from lrs_ext.autolrs import rates as rates_module
from lrs_ext.autolrs.rates import check_optimizer, rates_of
from lrs_ext.autolrs.ratios import group_ratios

# Optimizers of torch


def param():
    return torch.zeros(3, requires_grad=True)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_foreach_is_refused(kind):
    opt = kind([param()], lr=0.1, foreach=True)
    with pytest.raises(ValueError, match="not supported for capturable=False and foreach=True"):
        rates_of(opt, [1.0], BUDGET)
    assert opt.param_groups[0]["lr"] == 0.1
    check_optimizer(torch.optim.Adam([param()], lr=0.1, foreach=True, capturable=True))


def test_a_step_that_needs_a_closure_is_refused():
    with pytest.raises(TypeError, match="the step of LBFGS needs a closure"):
        check_optimizer(torch.optim.LBFGS([param()], lr=0.1))


@pytest.mark.parametrize("group", [{}, {"lr": None}, {"lr": torch.ones(2)}, {"lr": -0.1}])
def test_a_group_without_a_learning_rate_has_no_ratio(group):
    with pytest.raises(ValueError, match=r"group 1 has .*: give the optimizer lr=1e-3"):
        group_ratios([{"lr": 0.1}, group])


def test_groups_that_share_a_tensor_get_their_own():
    shared = torch.tensor(0.5)
    opt = torch.optim.SGD([{"params": [param()]}, {"params": [param()]}], lr=shared)
    rates = rates_of(opt, [1.0, 2.0], BUDGET)
    rates.write(torch.tensor(0.25), make_shape())
    assert [float(group["lr"]) for group in opt.param_groups] == [0.25, 0.5]
    assert opt.param_groups[0]["lr"] is shared


@pytest.mark.parametrize("loaded", [0.1, torch.tensor(0.1), torch.tensor(0.1).double()])
def test_a_loaded_learning_rate_is_replaced_by_ours(loaded):
    d = Driven("torch")
    d.write(0.5)
    tensors = [group["lr"] for group in d.groups]
    for group in d.groups:
        group["lr"] = loaded
    d.rates.attach()
    assert all(group["lr"] is lr for group, lr in zip(d.groups, tensors, strict=True))
    assert d.update() == expected(0.5, 0)


OPTIONS = [
    (torch.optim.Adam, {}, "fused=True or capturable=True"),
    (torch.optim.SGD, {}, "give it fused=True"),
    (torch.optim.RMSprop, {}, "give it capturable=True"),
    (torch.optim.SparseAdam, {}, "take an optimizer of lrs_ext"),
    (torch.optim.Adam, {"fused": True}, None),
    (torch.optim.Adam, {"capturable": True}, None),
]


@pytest.mark.parametrize(("kind", "options", "way_out"), OPTIONS)
def test_an_optimizer_that_waits_for_the_gpu_warns(kind, options, way_out, monkeypatch, recwarn):
    opt = kind([param()], lr=0.1, **options)
    rates_of(opt, [1.0], BUDGET)
    assert not recwarn
    monkeypatch.setattr(rates_module, "_is_on_gpu", lambda group: True)
    rates_of(opt, [1.0], BUDGET)
    assert [str(w.message) for w in recwarn if way_out in str(w.message)] or way_out is None
    assert len(recwarn) == (way_out is not None)


# On a GPU


@pytest.mark.gpu
def test_a_learning_rate_on_the_host_moves_to_its_group():
    params = [torch.zeros(3, requires_grad=True, device="cuda")]
    opt = torch.optim.Adam(params, lr=torch.tensor(0.5), capturable=True)
    rates_of(opt, [1.0], BUDGET)
    assert opt.param_groups[0]["lr"].is_cuda


@pytest.mark.gpu
def test_a_captured_step_is_noticed_and_its_replays_are_shown():
    d = Driven(device="cuda")
    d.write(0.5)
    d.update()
    assert not d.opt.was_captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        d.opt.step()
    assert d.opt.was_captured
    for update in range(2, 4):
        graph.replay()
        d.rates.advance()
        assert d.shown == pytest.approx(expected(0.5, update))
        assert d.opt.current_lr() == expected(0.5, update)


@pytest.mark.gpu
def test_a_model_that_moves_takes_its_rates_along():
    d = Driven()
    d.write(0.5)
    d.update()
    for p in d.params:
        p.data = p.data.cuda()
    assert d.used() == expected(0.5, 1)
    d.write(0.25)
    assert d.used() == expected(0.25, 0)
