"""What other loops do to an optimizer: nanoGPT's, range tests, loggers, averages, copies."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from framework_jobs import BOUNDS, POINTS, REX, SEARCH, STEPS, make_net, mse
from framework_jobs import weights as weights_of
from test_no_sync import NoReadingMethods, NoReadingOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lrs_ext


def make(lr=REX, cls=lrs_ext.AdamW):
    torch.manual_seed(0)
    net = make_net(0.0)
    return net, cls(net.parameters(), lr=lr)


def batches():
    return list(torch.utils.data.DataLoader(POINTS, batch_size=4))


def update(net, opt, batch):
    opt.zero_grad(set_to_none=True)
    loss = mse(net, batch)
    loss.backward()
    opt.step()
    return loss.detach()


# nanoGPT.


def get_lr(step, warmup=5, decay=STEPS, peak=1e-2, low=1e-3):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    ratio = (step - warmup) / (decay - warmup)
    return low + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - low)


@pytest.mark.parametrize("start", [REX, 1e-3], ids=["over a schedule", "over a number"])
def test_a_float_assigned_before_each_update_is_used(start):
    rates = {}
    for cls in (lrs_ext.AdamW, torch.optim.AdamW):
        net, opt = make(start if cls is lrs_ext.AdamW else 1e-3, cls)
        for k, batch in enumerate(batches()):
            for group in opt.param_groups:
                group["lr"] = get_lr(k)
            update(net, opt, batch)
            rates.setdefault(cls, []).append(opt.param_groups[0]["lr"])
        rates[cls].append(weights_of(net))
    ours, theirs = rates[lrs_ext.AdamW], rates[torch.optim.AdamW]
    assert ours[:-1] == theirs[:-1] == [get_lr(k) for k in range(24)]
    torch.testing.assert_close(ours[-1], theirs[-1])


def test_nanogpt_finds_the_fused_switch():
    # Its configure_optimizers looks for `fused` and passes it, with groups and betas.
    assert "fused" in inspect.signature(lrs_ext.AdamW).parameters
    net = make_net()
    decay = [p for p in net.parameters() if p.dim() >= 2]
    rest = [p for p in net.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    opt = lrs_ext.AdamW(groups, lr=REX, betas=(0.9, 0.95), fused=True)
    update(net, opt, batches()[0])
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]


# The range test of torch-lr-finder.


@pytest.mark.parametrize("lr", [1e-5, REX], ids=["number", "schedule"])
def test_a_range_test_leaves_everything_as_it_was(lr):
    finder = pytest.importorskip("torch_lr_finder", reason="torch-lr-finder is not installed")
    net, opt = make(lr)
    for batch in batches()[:3]:
        update(net, opt, batch)
    assert "initial_lr" not in opt.param_groups[0]  # it takes that for an attached scheduler
    before, rate = weights_of(net), opt.current_lr()
    range_test = finder.LRFinder(net, opt, torch.nn.functional.mse_loss, device="cpu")
    loader = torch.utils.data.DataLoader(POINTS, batch_size=4)
    range_test.range_test(loader, start_lr=1e-5, end_lr=1.0, num_iter=20, diverge_th=1e9)
    assert range_test.history["lr"][-1] == pytest.approx(1.0)
    assert not torch.equal(weights_of(net), before)
    range_test.reset()
    assert torch.equal(weights_of(net), before)
    assert opt.current_lr() == rate
    update(net, opt, batches()[3])
    assert opt.param_groups[0]["lr"] == (REX(4) if lr is REX else lr)


# Loggers.


def numbers_of(opt, auto):
    return {f"lr/{index}": lr for index, lr in enumerate(opt.current_lr())} | auto.metrics()


def search(steps=20):
    net, opt = make(1e-3)
    auto = lrs_ext.AutoLRS(opt, net, BOUNDS, STEPS, **SEARCH)
    for _, batch in zip(range(steps), auto.batches(batches()), strict=False):
        auto.step(update(net, opt, batch))
    return opt, auto


@pytest.mark.parametrize("steps", [0, 6, 20, STEPS])
def test_loggers_see_plain_numbers_by_name(steps):
    opt, auto = search(steps)
    numbers = numbers_of(opt, auto)
    assert {type(name) for name in numbers} == {str}
    assert {type(value) for value in numbers.values()} == {float}
    assert {name for name in numbers if name.startswith("autolrs/")} == {
        f"autolrs/{name}" for name in ("best_lr", "lr", "searching", "stage", "trial", "updates")
    }
    assert numbers["autolrs/updates"] == steps
    if 0 < steps < STEPS:
        assert numbers["lr/0"] == pytest.approx(numbers["autolrs/lr"], rel=1e-6)


def test_nothing_waits_before_the_numbers_are_read():
    net, opt = make(1e-3)
    auto = lrs_ext.AutoLRS(opt, net, BOUNDS, STEPS, **SEARCH)
    stream = auto.batches(batches())
    next(stream)
    for batch in batches()[:3]:
        loss = update(net, opt, batch)
        with NoReadingOps(), NoReadingMethods():
            auto.step(loss)
    with pytest.raises(AssertionError, match="waits for the device"), NoReadingMethods():
        auto.metrics()


def test_tensorboard_takes_them(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    opt, auto = search()
    numbers = numbers_of(opt, auto)
    with SummaryWriter(tmp_path) as writer:
        for name, value in numbers.items():
            writer.add_scalar(name, value, global_step=20)
        writer.add_scalar("lr/on the device", opt.lr_tensor(0), global_step=20)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, value in numbers.items():
        (event,) = events.Scalars(name)
        assert event.value == pytest.approx(value, rel=1e-6)
    assert events.Scalars("lr/on the device")[0].value == pytest.approx(numbers["lr/0"])


# Copies, prints, averages.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_step_wrapped_by_its_instance_survives_a_copy(copied):
    # As Accelerate leaves it, with a scaler: an attribute over the method.
    net, opt = make()
    opt.step = opt.step
    update(net, opt, batches()[0])
    twin = copied(opt)
    assert twin.current_lr() == opt.current_lr()
    assert "step" not in vars(twin)  # which would be the other optimizer's
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    before = weights_of(net)
    twin.step()
    assert torch.equal(weights_of(net), before)
    assert twin.schedule_buffer.step.item() == 2


@pytest.mark.parametrize("lr", [REX, 0.1])
def test_a_print_does_not_wait(lr):
    net, opt = make(lr)
    update(net, opt, batches()[0])
    with NoReadingOps(), NoReadingMethods():
        text = repr(opt)
    assert f"lr: {opt.param_groups[0]['lr']}" in text


def test_an_average_of_the_weights_goes_along():
    net, opt = make(1e-3)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scaler = torch.amp.GradScaler("cpu")
    states = [average, scaler]
    auto = lrs_ext.AutoLRS(opt, net, BOUNDS, STEPS, extra_state=states, **SEARCH)
    starts = []
    for k, batch in enumerate(auto.batches(batches())):
        if k % 4 == 0 and k < 20:
            starts.append((weights_of(net), weights_of(average), scaler.get_scale()))
        opt.zero_grad()
        loss = mse(net, batch)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        average.update_parameters(net)
        auto.step(loss.detach())
    assert len(starts) == 5
    for weights, averages, scale in starts[1:]:  # every trial, and the training, began here
        assert torch.equal(weights, starts[0][0])
        assert torch.equal(averages, starts[0][1])
        assert scale == starts[0][2]
