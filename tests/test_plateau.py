"""ReduceOnPlateau: the decisions of torch, on the device, without a wait."""

import copy
import gc
import io
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_no_sync import no_sync
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

import lrs_ext

LRS = (0.5, 0.125)


def params_of(device="cpu"):
    params = [torch.zeros((), device=device, requires_grad=True) for _ in LRS]
    return params, [{"params": [p], "lr": lr} for p, lr in zip(params, LRS, strict=True)]


class Ours:
    """SGD of lrs_ext: from 0 and with gradient -1, an update leaves the learning rate there."""

    make = staticmethod(lrs_ext.SGD)

    def __init__(self, device="cpu", **options):
        self.params, groups = params_of(device)
        self.opt = self.make(groups)
        self.plateau = lrs_ext.ReduceOnPlateau(self.opt, **options)

    def used(self):
        for param in self.params:
            param.data.zero_()
            param.grad = torch.full_like(param, -1.0)
        self.opt.step()
        return [param.item() for param in self.params]

    def saved(self):
        file = io.BytesIO()
        torch.save((self.opt.state_dict(), self.plateau.state_dict()), file)
        file.seek(0)
        return torch.load(file, weights_only=True)


class OfTorch(Ours):
    make = staticmethod(torch.optim.SGD)


KINDS = {"lrs_ext": Ours, "torch": OfTorch}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def torch_rates(metrics, **options):
    """The learning rates of the updates that follow each metric, decided by torch."""
    opt = torch.optim.SGD(params_of()[1])
    plateau = ReduceLROnPlateau(opt, **options)
    rates = []
    for metric in metrics:
        plateau.step(metric)
        rates.append([group["lr"] for group in opt.param_groups])
    return rates


# The decisions.

METRICS = st.lists(
    st.one_of(
        st.floats(-2, 2),
        st.integers(-2, 2).map(float),
        st.sampled_from([math.nan, math.inf, -math.inf]),
    ),
    max_size=60,
)
OPTIONS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "factor": st.sampled_from([0.0, 0.1, 0.5, 0.9]),
        "patience": st.integers(0, 4),
        "threshold": st.sampled_from([0.0, 1e-4, 0.1, 0.5]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 3),
        "min_lr": st.sampled_from([0.0, 0.01, [0.3, 0.0], [0.0, 0.125]]),
        "eps": st.sampled_from([0.0, 1e-8, 0.05]),
    }
)


@given(METRICS, OPTIONS)
@settings(max_examples=300)
def test_any_metrics_lead_to_the_decisions_of_torch(metrics, options):
    opt = lrs_ext.SGD(params_of()[1])
    plateau = lrs_ext.ReduceOnPlateau(opt, **options)
    for metric, expected in zip(metrics, torch_rates(metrics, **options), strict=True):
        plateau.step(torch.tensor(metric, dtype=torch.float64))
        assert [group["lr"] for group in opt.param_groups] == expected
        assert opt.current_lr() == [np.float32(lr) for lr in expected]


@given(METRICS, OPTIONS)
@settings(max_examples=100)
def test_any_metrics_lead_to_the_same_on_optimizers_of_torch(metrics, options):
    opt = torch.optim.SGD(params_of()[1])
    plateau = lrs_ext.ReduceOnPlateau(opt, **options)
    for metric, expected in zip(metrics, torch_rates(metrics, **options), strict=True):
        plateau.step(metric)
        rates = [group["lr"].item() for group in opt.param_groups]
        assert rates == pytest.approx(expected, rel=1e-6)


@kinds
def test_the_defaults_are_those_of_torch(kind):
    metrics = [1.0, 0.9, *[0.9] * 11, 0.8, *[0.9] * 30]
    run, expected = kind(), torch_rates(metrics)
    for metric, rates in zip(metrics, expected, strict=True):
        run.plateau.step(torch.tensor(metric))
        assert run.used() == pytest.approx(rates, rel=1e-6)
    assert expected[-1] == pytest.approx([0.5 * 1e-3, 0.125 * 1e-3])


# Where the learning rate is.


def test_it_works_on_every_backend(probe, backend):
    p = probe(0.5, 0.125)
    plateau = lrs_ext.ReduceOnPlateau(p.opt, patience=0, factor=0.5)
    buffer = p.buffer.values.data_ptr()
    for expected in ([0.5, 0.125], [0.25, 0.0625], [0.125, 0.03125]):
        plateau.step(torch.ones((), device=backend.device))
        assert p.used() == expected
        assert p.opt.current_lr() == expected
        assert [p.opt.lr_tensor(group).item() for group in (0, 1)] == expected
    assert p.opt.schedule_buffer.values.data_ptr() == buffer


@kinds
def test_nothing_reads_from_the_device(kind, backend):
    if backend.name != "cpu":
        return
    run = kind(patience=1)
    metrics = [torch.tensor(x) for x in (1.0, 2.0, 3.0, math.nan, 4.0)]
    for metric in metrics:
        with no_sync(backend):
            run.plateau.step(metric)
            run.plateau.step(metric[None].half())
    assert run.used() == pytest.approx([0.5 * 1e-4, 0.125 * 1e-4])


class CountingOps(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_more_groups_take_no_more_launches():
    def launches(num_groups):
        params = [torch.zeros(2, requires_grad=True) for _ in range(num_groups)]
        opt = lrs_ext.SGD([{"params": [param]} for param in params], lr=0.5)
        plateau = lrs_ext.ReduceOnPlateau(opt)
        with CountingOps() as ops:
            plateau.step(torch.tensor(1.0))
        return ops.count

    assert launches(40) == launches(2)


class OnGPU(torch.Tensor):
    """Stands for a number on a GPU: a copy of it that nobody waits for is not there yet."""

    def to(self, *target, non_blocking=False):
        there = self.as_subclass(torch.Tensor).to(*target)
        return torch.full_like(there, math.nan) if non_blocking else there


@kinds
def test_a_metric_on_a_gpu_is_waited_for_where_parameters_are_on_the_cpu(kind):
    run = kind(patience=0, factor=0.5)
    used = []
    for metric in (3.0, 2.0, 2.5, 1.0):
        run.plateau.step(torch.tensor(metric).as_subclass(OnGPU))
        used.append(run.used())
    halved = [lr / 2 for lr in LRS]
    assert used == [list(LRS), list(LRS), halved, halved]


@pytest.mark.gpu
@kinds
def test_a_metric_of_a_gpu_that_is_busy(kind):
    run, metric = kind(patience=0, factor=0.5), torch.full((), 3.0, device="cuda")
    for _ in range(3):
        torch.cuda._sleep(10_000_000)
        metric.sub_(1.0)  # an improvement each time
        run.plateau.step(metric)
    assert run.used() == list(LRS)


@pytest.mark.gpu
@kinds
def test_nothing_reads_from_a_gpu(kind, backend):
    if backend.name != "cuda":
        return
    run = kind("cuda", patience=0)
    metric = torch.ones((), device="cuda")
    for _ in range(3):
        with no_sync(backend):
            run.plateau.step(metric)
    assert run.used() == pytest.approx([0.5 * 1e-2, 0.125 * 1e-2])


@pytest.mark.gpu
def test_a_plateau_follows_replays_and_is_not_captured():
    """The host would see neither what replays have reduced nor, in them, what it puts there."""
    run, metric = Ours("cuda", patience=0, factor=0.5), torch.ones((), device="cuda")
    run.used()
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=r"ReduceOnPlateau.step\(\) cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        run.plateau.step(metric)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.opt.step()
    for k in range(4):
        for param in run.params:
            param.data.zero_()
        graph.replay()
        assert [param.item() for param in run.params] == [lr * 0.5 ** max(k - 1, 0) for lr in LRS]
        run.plateau.step(metric)


def test_a_tensor_of_an_optimizer_of_torch_is_written_in_place():
    tensor = torch.tensor(0.5)
    opt = torch.optim.Adam([torch.zeros(2, requires_grad=True)], lr=tensor)
    plateau = lrs_ext.ReduceOnPlateau(opt, patience=0)
    for _ in range(2):
        plateau.step(1.0)
    assert opt.param_groups[0]["lr"] is tensor
    assert tensor.item() == pytest.approx(0.05)
    tensor.fill_(0.25)  # by hand: the next reduction starts here
    plateau.step(1.0)
    assert tensor.item() == pytest.approx(0.025)


@kinds
def test_a_float_of_the_host_takes_over_and_is_reduced_next(kind):
    run = kind(patience=0, factor=0.5)
    run.plateau.step(1.0)
    run.opt.param_groups[1]["lr"] = 0.75
    assert run.used() == [0.5, 0.75]
    run.plateau.step(1.0)
    assert run.used() == [0.25, 0.375]
    run.plateau.step(1.0)
    assert run.used() == [0.125, 0.1875]


def test_handing_back_what_was_found_changes_nothing():
    run = Ours(patience=0, factor=0.5)
    for _ in range(2):
        run.plateau.step(1.0)
    found = [group["lr"] for group in run.opt.param_groups]
    for group in run.opt.param_groups:
        group["lr"] = 0.0
    assert run.used() == [0.0, 0.0]
    for group, lr in zip(run.opt.param_groups, found, strict=True):
        group["lr"] = lr
    assert run.used() == [0.25, 0.0625]
    run.plateau.step(1.0)
    assert run.used() == [0.125, 0.03125]


@pytest.mark.parametrize("num_groups", [1, 2])
def test_handing_back_leaves_a_group_alone_that_has_been_added(num_groups):
    params = [torch.zeros(2, requires_grad=True) for _ in range(num_groups + 1)]
    opt = lrs_ext.SGD([{"params": [param]} for param in params[:-1]], lr=0.5)
    plateau = lrs_ext.ReduceOnPlateau(opt)
    opt.add_param_group({"params": [params[-1]], "lr": 0.75})
    for lr in (0.0, opt.param_groups[0]["lr"]):
        opt.param_groups[0]["lr"] = lr
        opt.sync_groups()
    assert opt.current_lr() == [*[0.5] * num_groups, 0.75]
    del plateau  # which has been in charge until here


# Checkpoints.


@kinds
@pytest.mark.parametrize("order", [("opt", "plateau"), ("plateau", "opt")])
@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_resumed_run_goes_on_where_it_was(kind, order, stop):
    options = {"patience": 1, "factor": 0.5, "cooldown": 1}
    metrics = [1.0, 2.0, 2.0, 2.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]
    run = kind(**options)
    for metric in metrics[:stop]:
        run.plateau.step(torch.tensor(metric))
        run.used()
    states = dict(zip(("opt", "plateau"), run.saved(), strict=True))
    resumed = kind(**options)
    resumed.used()
    for name in order:
        getattr(resumed, name).load_state_dict(states[name])
    assert resumed.used() == run.used()
    for metric in metrics[stop:]:
        for each in (run, resumed):
            each.plateau.step(torch.tensor(metric))
        assert resumed.used() == run.used()


@kinds
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_drives_the_copied_optimizer(kind, copied):
    run = kind(patience=0, factor=0.5)
    run.plateau.step(1.0)
    twin = kind(patience=0, factor=0.5)
    vars(twin).update(copied(vars(run)))
    assert twin.plateau.optimizer is twin.opt
    before = run.used()
    assert twin.used() == before
    for _ in range(2):
        twin.plateau.step(1.0)
    assert twin.used() == [pytest.approx(lr / 4) for lr in before]
    assert run.used() == before


def test_the_optimizers_checkpoint_has_the_reduced_learning_rates():
    run = Ours(patience=0, factor=0.5)
    run.plateau._groups._show_what_is_here = lambda: None  # as if nothing had arrived yet
    for _ in range(2):
        run.plateau.step(1.0)
    assert [group["lr"] for group in run.opt.param_groups] == list(LRS)
    saved = run.opt.state_dict()["param_groups"]
    assert [group["lr"] for group in saved] == [0.25, 0.0625]
    assert [group["lr"] for group in run.opt.param_groups] == [0.25, 0.0625]


def test_groups_that_a_wrapper_has_loaded_are_reduced():
    run = Ours(patience=0, factor=0.5)
    run.plateau.step(1.0)
    run.used()
    saved = copy.deepcopy(run.opt.state_dict())
    for group, loaded in zip(run.opt.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in loaded.items() if key != "params"})
    run.plateau.step(1.0)
    reduced = [0.5 * group["lr"] for group in saved["param_groups"]]
    assert run.used() == reduced
    assert [group["lr"] for group in run.opt.param_groups] == reduced


def test_a_checkpoint_of_other_groups_is_refused():
    state = Ours().plateau.state_dict()
    other = lrs_ext.ReduceOnPlateau(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    with pytest.raises(ValueError, match="the state has 2 parameter groups, the optimizer 1"):
        other.load_state_dict(state)


# Errors.

ERRORS = [
    ({"mode": "low"}, ValueError, "mode low is unknown!"),
    ({"threshold_mode": "percent"}, ValueError, "threshold mode percent is unknown!"),
    ({"factor": 1.0}, ValueError, "Factor should be < 1.0."),
    ({"factor": -0.1}, ValueError, "factor must not be negative, got -0.1"),
    ({"factor": math.nan}, ValueError, "factor must be finite, got nan"),
    ({"patience": -1}, ValueError, "patience must not be negative, got -1"),
    ({"patience": 1.5}, TypeError, "patience must be an integer, got 1.5"),
    ({"cooldown": -1}, ValueError, "cooldown must not be negative, got -1"),
    ({"threshold": math.inf}, ValueError, "threshold must be finite, got inf"),
    ({"eps": math.nan}, ValueError, "eps must be finite, got nan"),
    ({"min_lr": [0.1]}, ValueError, "expected 2 min_lrs, got 1"),
    ({"min_lr": -0.1}, ValueError, "Invalid learning rate: -0.1 in min_lr"),
]


@kinds
@pytest.mark.parametrize(("options", "error", "message"), ERRORS)
def test_bad_arguments_are_refused(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**options)


def test_metrics_have_one_element():
    with pytest.raises(ValueError, match=r"metric must have one element, got shape \(2,\)"):
        Ours().plateau.step(torch.ones(2))
    for metric in (None, "1.0"):
        with pytest.raises(TypeError, match=f"metric must be a number, got {metric!r}"):
            Ours().plateau.step(metric)
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        lrs_ext.ReduceOnPlateau(3)


@kinds
def test_a_second_driver_is_refused(kind):
    run, model = kind(), torch.nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="the optimizer has a ReduceOnPlateau already: use that"):
        lrs_ext.ReduceOnPlateau(run.opt)
    with pytest.raises(RuntimeError, match="has a ReduceOnPlateau already"):
        lrs_ext.AutoLRS(run.opt, model, (1e-3, 1e-1), 1000)
    del run.plateau
    gc.collect()
    lrs_ext.ReduceOnPlateau(run.opt)
    opt = kind.make(model.parameters(), lr=0.1)
    auto = lrs_ext.AutoLRS(opt, model, (1e-3, 1e-1), 1000)
    with pytest.raises(RuntimeError, match="the optimizer has an AutoLRS already"):
        lrs_ext.ReduceOnPlateau(opt)
    assert not auto.done


@pytest.mark.parametrize(
    "lr", [lrs_ext.rex(0.1, 10), torch.tensor(0.1)], ids=["schedule", "tensor"]
)
def test_what_would_be_overwritten_is_refused(lr):
    opt = lrs_ext.SGD([torch.zeros(2, requires_grad=True)], lr=lr)
    with pytest.raises(ValueError, match="would be overwritten: give the optimizer a float"):
        lrs_ext.ReduceOnPlateau(opt)
    run = Ours()
    run.opt.set_schedule(lrs_ext.rex(0.1, 10), group=1)
    with pytest.raises(ValueError, match="group 1 is a schedule or a tensor, which would be over"):
        run.plateau.step(1.0)


@kinds
def test_a_group_that_comes_later_is_refused(kind):
    run = kind()
    run.opt.add_param_group({"params": [torch.zeros((), requires_grad=True)], "lr": 0.1})
    with pytest.raises(RuntimeError, match="make ReduceOnPlateau after add_param_group"):
        run.plateau.step(1.0)


@kinds
def test_nobody_is_kept_alive(kind):
    run = kind()
    optimizer, plateau = weakref.ref(run.opt), weakref.ref(run.plateau)
    run.plateau.step(1.0)
    del run.plateau
    gc.collect()
    assert plateau() is None
    assert optimizer() is not None
    assert run.used() == list(LRS)
    run.opt.state_dict()
    del run
    gc.collect()
    assert optimizer() is None
