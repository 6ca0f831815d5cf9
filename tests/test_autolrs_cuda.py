"""AutoLRS on a GPU: no sync, one captured graph for trials and training, pinned snapshots."""

import io

import pytest
import torch
from autolrs_runs import BOUNDS, PRESETS
from torch import nn

import lrs_ext
from lrs_ext.autolrs.copy_memory import PLACEMENTS
from lrs_ext.autolrs.snapshot import Snapshot

pytestmark = pytest.mark.gpu

WARM = 3  # eager updates before a capture


class Job:
    """A model on the GPU with data of its own; `replayed` makes every update by one graph."""

    def __init__(self, preset, snapshot, replayed):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).cuda()
        self.opt = lrs_ext.AdamW(self.model.parameters(), lr=1e-3)
        self.data = torch.randn(16, 8, 4, device="cuda")
        self.inputs, self.graph = self.data[0].clone(), None
        options = {**PRESETS[preset], "snapshot": snapshot}
        self.auto = lrs_ext.AutoLRS(self.opt, self.model, BOUNDS, **options)
        if not replayed:
            return
        # What comes before the first replay must not count.
        copied = Snapshot(self.model, self.opt, ())
        copied.capture()
        for _ in range(WARM):
            self.forward_and_step()
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.loss = self.forward_and_step()
        copied.restore()

    def forward_and_step(self):
        loss = (self.model(self.inputs) - self.inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        self.opt.step()
        self.opt.zero_grad(set_to_none=False)
        return loss.detach()

    def run(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in self.auto.batches(range(len(self.data))):
                self.inputs.copy_(self.data[index])
                if self.graph is None:
                    self.auto.step(self.forward_and_step())
                else:
                    self.graph.replay()
                    self.auto.step(self.loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return self


@pytest.mark.parametrize("snapshot", PLACEMENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_whole_run_never_waits(preset, snapshot):
    job = Job(preset, snapshot, replayed=False).run()
    assert job.auto.done
    assert job.auto.history.learning_rates[-1] < 0.05 * job.auto.history.stages[-1].best_lr


@pytest.mark.parametrize("preset", PRESETS)
def test_one_graph_serves_trials_and_training(preset):
    job = Job(preset, "device", replayed=True).run()
    history = job.auto.history
    for stage in history.stages:
        first, *others = stage.trials
        assert all(trial.losses[0] == first.losses[0] for trial in others)
        assert stage.losses[0] == first.losses[0]
    assert job.opt.current_lr()[0] < 0.05 * history.stages[-1].best_lr
    assert history.losses[-5:].mean() < history.losses[:5].mean()


def test_pinned_and_device_snapshots_give_the_same_run():
    first, second = (Job("peak", placement, replayed=False).run() for placement in PLACEMENTS)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_cpu_checkpoint_of_a_search_goes_on_here():
    job = Job("peak", "device", replayed=False)
    file = io.BytesIO()
    torch.save(job.auto.state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location="cpu", weights_only=True)
    assert not state["measured"]["losses"].is_cuda
    job.auto.load_state_dict(state)
    assert job.run().auto.done


def test_a_search_is_not_captured():
    """Its replays would not count."""
    job = Job("peak", "device", replayed=False)
    job.auto.step(job.forward_and_step())
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=r"auto.step\(\) cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        job.auto.step(torch.ones((), device="cuda"))


def test_a_loss_in_page_locked_memory_is_that_of_the_call():
    job = Job("peak", "device", replayed=False)
    loss = torch.tensor(2.0).pin_memory()
    job.forward_and_step()
    torch.cuda._sleep(100_000_000)
    job.auto.step(loss)
    loss.fill_(100.0)
    assert job.auto.history.losses[0] == 2.0
