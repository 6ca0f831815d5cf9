"""Accelerate: prepared optimizers and schedulers, accumulation, scalers, checkpoints, AutoLRS."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from framework_jobs import BOUNDS, POINTS, RATES, REX, SEARCH, STEPS, make_net, mse, same_search
from framework_jobs import weights as weights_of

import lrs_ext
from lrs_ext.integrations import OwnSchedule

accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is not installed: lrs_ext[accelerate]"
)
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.scheduler import AcceleratedScheduler  # noqa: E402


@pytest.fixture
def start():
    """Makes an Accelerator, of which a process has one at a time."""

    def start(**options):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        return accelerate.Accelerator(cpu=True, **options)

    yield start
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def make_loader():
    return torch.utils.data.DataLoader(POINTS, batch_size=4)


def endless(loader):
    while True:
        yield from loader


def train(accelerator, net, opt, batches, micro_steps, after=lambda: None):
    """Makes micro-steps; returns the learning rates that the updates have found."""
    inner = opt.optimizer
    rates = []
    for _, batch in zip(range(micro_steps), batches, strict=False):
        with accelerator.accumulate(net):
            before, rate = inner.committed_steps, inner.param_groups[0]["lr"]
            accelerator.backward(mse(net, batch))
            opt.step()
            after()
            opt.zero_grad()
            rates += [rate] * (inner.committed_steps - before)
    return rates


def make(lr=REX, cls=lrs_ext.AdamW):
    torch.manual_seed(0)
    net = make_net()
    return net, cls(net.parameters(), lr=lr)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_schedule_counts_updates(start, accumulation):
    accelerator = start(gradient_accumulation_steps=accumulation)
    net, opt, loader = accelerator.prepare(*make(), make_loader())
    assert type(opt) is AcceleratedOptimizer
    # The last batch of an epoch makes an update too, as always in Accelerate: 24 is 8 times 3.
    rates = train(accelerator, net, opt, endless(loader), STEPS * accumulation)
    assert rates == RATES
    assert opt.optimizer.schedule_buffer.step.item() == STEPS


@pytest.mark.parametrize("kind", ["ScheduleLR", "OwnSchedule"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_prepared_schedulers_step_with_the_updates_of_one_process(start, kind, accumulation):
    accelerator = start(gradient_accumulation_steps=accumulation)
    net, opt = make(REX if kind == "OwnSchedule" else REX.lr)
    scheduler = OwnSchedule(opt) if kind == "OwnSchedule" else lrs_ext.ScheduleLR(opt, REX)
    net, opt, loader, scheduler = accelerator.prepare(net, opt, make_loader(), scheduler)
    assert type(scheduler) is AcceleratedScheduler
    batches = endless(loader)
    rates = train(accelerator, net, opt, batches, STEPS * accumulation, after=scheduler.step)
    assert rates == RATES
    assert scheduler.get_last_lr() == [REX(STEPS)]


TWO_PROCESSES = """
import sys
import torch
from accelerate import Accelerator
import lrs_ext
from framework_jobs import POINTS, REX, make_net, mse

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
nets = [make_net() for _ in range(3)]
opts = [lrs_ext.AdamW(nets[0].parameters(), lr=REX)]
opts += [lrs_ext.AdamW(net.parameters(), lr=REX.lr) for net in nets[1:]]
loader = torch.utils.data.DataLoader(POINTS, batch_size=4)
nets[0], nets[1], nets[2], *opts, loader = accelerator.prepare(*nets, *opts, loader)
prepared = accelerator.prepare(lrs_ext.ScheduleLR(opts[1].optimizer, REX))
plain = lrs_ext.ScheduleLR(opts[2].optimizer, REX)
for _, batch in zip(range(5), loader):
    for net in nets:
        accelerator.backward(mse(net, batch))
    for opt in opts:
        opt.step()
    prepared.step()
    plain.step()
updates = accelerator.num_processes, [opt.param_groups[0]["lr"] for opt in opts]
if accelerator.is_main_process:
    print("RATES", *updates[1], "OF", updates[0])
accelerator.end_training()
"""


def test_with_two_processes_only_a_prepared_scheduler_steps_twice(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{TWO_PROCESSES}"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("RATES"))
    *rates, _, processes = line.removeprefix("RATES ").split()
    assert processes == "2"
    # The optimizer's own schedule and a scheduler that was not prepared count updates.
    assert list(map(float, rates)) == [REX(5), REX(10), REX(5)]


def test_prepare_in_the_middle_of_a_run_changes_nothing(start):
    accelerator = start()
    (net, opt), (other, prepared) = make(), make()
    for pair in ((net, opt), (other, prepared)):
        for batch in list(make_loader())[:5]:
            mse(pair[0].eval(), batch).backward()
            pair[1].step()
            pair[1].zero_grad()
    prepared = accelerator.prepare(prepared)
    assert prepared.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == REX(5)
    assert prepared.optimizer.current_lr() == opt.current_lr()
    state, expected = prepared.state_dict()["state"], opt.state_dict()["state"]
    for index, values in expected.items():
        for name, value in values.items():
            assert torch.equal(state[index][name], value)


# Loss scales. Accelerate makes a scaler on GPUs only, so here the optimizer gets one by hand.


def test_an_overflow_waits_on_the_device_and_accelerate_does_not_notice(start):
    start()
    net, opt = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = AcceleratedOptimizer(opt, scaler=scaler)
    scheduler = OwnSchedule(opt)
    prepared = AcceleratedScheduler(scheduler, wrapped)
    batches = list(make_loader())
    for k in range(6):
        before = weights_of(net)
        loss = scaler.scale(mse(net, batches[k]))
        (loss * torch.inf if k == 2 else loss).backward()
        wrapped.step()
        assert not wrapped.step_was_skipped  # the step ran, and the device left it out
        assert torch.equal(weights_of(net), before) == (k == 2)
        prepared.step()
        wrapped.zero_grad()
    assert opt.schedule_buffer.step.item() == 5
    assert prepared.get_last_lr() == [REX(5)]
    assert opt.current_lr() == [pytest.approx(REX(5))]


# Checkpoints.


class Run:
    """A prepared run, with AutoLRS if the learning rate is a number."""

    def __init__(self, accelerator, lr):
        self.accelerator = accelerator
        net, opt = make(lr)
        self.auto = None
        if isinstance(lr, float):
            self.auto = lrs_ext.AutoLRS(opt, net, BOUNDS, STEPS, **SEARCH)
            accelerator.register_for_checkpointing(self.auto)
        # A loader that is prepared keeps its place too; here the batches are plain.
        self.net, self.opt = accelerator.prepare(net, opt)
        self.loader = list(make_loader())
        self.count = 0
        self.stream = None

    def train(self, steps):
        for _ in range(steps):
            if self.auto is None:
                batch = self.loader[self.count % len(self.loader)]
            else:
                self.stream = self.stream or self.auto.batches(self.loader)
                batch = next(self.stream)
            loss = mse(self.net, batch)
            self.accelerator.backward(loss)
            self.opt.step()
            self.opt.zero_grad()
            if self.auto is not None:
                self.auto.step(loss.detach())
            self.count += 1
        return self


@pytest.mark.parametrize(("lr", "step"), [(REX, 7), (1e-3, 6), (1e-3, 30)])
def test_a_saved_run_resumes_to_the_bit(start, tmp_path, lr, step):
    whole = Run(start(), lr).train(step)
    whole.accelerator.save_state(tmp_path)
    whole.train(STEPS - step)
    resumed = Run(start(), lr)
    resumed.accelerator.load_state(tmp_path)
    resumed.count = step
    resumed.train(STEPS - step)
    assert torch.equal(weights_of(resumed.net), weights_of(whole.net))
    assert resumed.opt.optimizer.current_lr() == whole.opt.optimizer.current_lr()
    if whole.auto is not None:
        assert same_search(whole.auto, resumed.auto)
    for file in [*tmp_path.glob("optimizer*"), *tmp_path.glob("custom_checkpoint*")]:
        torch.load(file, weights_only=True)
    assert len(list(tmp_path.glob("custom_checkpoint*"))) == (whole.auto is not None)


def test_a_prepared_optimizer_is_searched_clipped_and_reduced(start):
    accelerator = start()
    net, opt = accelerator.prepare(*make(1e-3))
    auto = lrs_ext.AutoLRS(opt, net, BOUNDS, STEPS, **SEARCH)
    for batch in auto.batches(list(make_loader())):
        loss = mse(net, batch)
        accelerator.backward(loss)
        norm = lrs_ext.clip_grad_norm_(opt, 1.0)
        opt.step()
        opt.zero_grad()
        auto.step(loss.detach())
    assert auto.done
    assert norm.item() > 0.0
    json.dumps(auto.metrics())
