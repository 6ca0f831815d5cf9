"""What the tests of AutoLRS on fully sharded models do on every rank."""

import math
from pathlib import Path

import autolrs_rank_jobs as jobs
import rank_jobs
import torch
import torch.distributed.checkpoint as dcp
from autolrs_rank_jobs import Batches, on_device, place
from autolrs_runs import BOUNDS, PRESETS
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import lrs_ext

STORAGES = {
    "float32": {},
    "bfloat16": {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    "blocks": {"state_dtype": torch.uint8},
    "split": {"master_weights": True},
}
OPTIONS = {"SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}}


class WholeBatches(Batches):
    """The global batch on every rank: the mean over two equal gradients is exact."""

    def __iter__(self):
        for index in range(len(self.inputs)):
            at = (index + self.epoch) % len(self.inputs)
            yield self.inputs[at], self.targets[at]


class Run(jobs.Run):
    """A small job on all ranks, with parts that are uneven on each number of them, and empty ones.

    Args:
        name: of an optimizer of `lrs_ext`.
        wrapper: "fsdp" or "ddp"; one process alone needs neither.
        policy: "mixed" computes in bfloat16.
        is_whole: whether every rank has the global batch.
        clips: whether gradients are clipped.
        releases: whether parameters are updated in the backward pass.
    """

    def __init__(
        self,
        name="AdamW",
        storage="float32",
        preset="peak",
        wrapper="fsdp",
        policy=None,
        is_whole=False,
        clips=False,
        releases=False,
    ):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 1))
        self.dtype = torch.bfloat16 if storage == "split" else torch.float32
        self.model.to(rank_jobs.device, self.dtype)
        if place()[1] > 1:
            self._spread(wrapper, policy)
        options = OPTIONS.get(name, {}) | STORAGES[storage]
        layers = [[*layer.parameters()] for layer in self.model.modules() if hasattr(layer, "bias")]
        groups = [{"params": layers[0]}, {"params": layers[1], "lr": 5e-4}]
        self.optimizer = getattr(lrs_ext, name)(groups, lr=1e-3, **options)
        if releases:
            self.optimizer.step_in_backward()
        self.clips = clips
        self.auto = lrs_ext.AutoLRS(self.optimizer, self.model, BOUNDS, **PRESETS[preset])
        self.make_loader = WholeBatches if is_whole else Batches
        self.rates, self.losses, self.batches = [], [], []
        self.stream = self.auto.batches(self.make_loader())

    def _spread(self, wrapper, policy):
        if wrapper == "ddp":
            self.model = DistributedDataParallel(self.model)
            return
        bfloat16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        policy = MixedPrecisionPolicy(**(bfloat16 if policy == "mixed" else {}))
        fully_shard(self.model[0], mp_policy=policy)
        fully_shard(self.model, mp_policy=policy)

    def loss(self):
        inputs, targets = on_device(next(self.stream))
        return nn.functional.mse_loss(self.model(inputs.to(self.dtype)).float(), targets)

    def update(self):
        loss = self.loss()
        loss.backward()
        self.rates.append(self.optimizer.current_lr()[0])
        if self.clips:
            lrs_ext.clip_grad_norm_(self.optimizer, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.auto.step(loss.detach())
        self.losses.append(loss.item())

    def result(self):
        history = self.auto.history
        return {
            "rates": history.learning_rates.tolist(),
            "used": self.rates,
            "losses": history.losses.tolist(),
            "own losses": self.losses,
            "tried": [[t.lr for t in stage.trials] for stage in history.stages],
            "objectives": [[t.objective for t in stage.trials] for stage in history.stages],
            "first losses": [[t.losses[0] for t in stage.trials] for stage in history.stages],
            "best": [stage.best_lr for stage in history.stages],
            "weights": self.weights().tolist(),
            "states": [part.tolist() for part in self.states()],
        }

    def states(self):
        """The float32 states of all parameters as wholes, in their order."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                for name, value in sorted(self.optimizer.state[param].items()):
                    if value.is_floating_point() and not name.endswith("_scale"):
                        yield value.full_tensor() if isinstance(value, DTensor) else value

    def bits(self):
        """Where this rank's part of everything is, and a copy of its bits."""
        tensors = {"schedule step": self.optimizer.schedule_buffer.step}
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, param in enumerate(params):
            tensors[f"parameter {index}"] = param.detach()
            for name, value in self.optimizer.state[param].items():
                tensors[f"state {index} {name}"] = value
            if param in self.optimizer.step_counters:
                tensors[f"counter {index}"] = self.optimizer.step_counters[param]
        parts = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
        return {n: (p.data_ptr(), p.flatten().view(torch.uint8).clone()) for n, p in parts.items()}


def whole(options):
    return Run(**options).run().result()


def trials_are_undone(options):
    """Every bit of this rank's part is back after a trial, where it was in memory.

    Returns how many trials there were, and how often something had moved in them.
    """
    run = Run(**options)
    kept, trials, moves = {}, 0, 0
    while not run.auto.done:
        segment = run.auto._segment
        if segment.kind == "trial" and segment.trial == 0 and segment.start == len(run.losses):
            kept = run.bits()
        run.update()
        if segment.kind != "trial":
            continue
        now = run.bits()
        if len(run.losses) < segment.end:
            moves += any(not torch.equal(now[name][1], bits) for name, (_, bits) in kept.items())
            continue
        trials += 1
        for name, (address, bits) in now.items():
            if name in kept:
                assert address == kept[name][0], name
                assert torch.equal(bits, kept[name][1]), name
            else:  # it came with the first update
                assert segment.stage == 0
                assert not bits.any(), name
    for param in run.model.parameters():
        assert isinstance(param, DTensor)
        for value in run.optimizer.state[param].values():
            assert not isinstance(value, DTensor) or value.placements == param.placements
    return trials, moves


def collectives_of_the_controller(options):
    """Names of what ranks exchange because of AutoLRS."""
    run, found = Run(**options), set()
    while not run.auto.done:
        loss = run.loss()
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        with CommDebugMode() as exchanged:
            run.auto.step(loss.detach())
        found |= {str(name) for name in exchanged.get_comm_counts()}
    return found


def without_reading(options):
    """A whole run in which any read from a tensor fails."""
    run = Run(**options)
    while not run.auto.done:
        loss = run.loss()
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        with jobs.NoReadingOps(), jobs.NoReadingMethods():
            run.auto.step(loss.detach())
    return run.auto.history.stages[0].best_lr


def diverging_training(options, rank):
    """Weights that are not finite in one rank's part, behind the backs of the others."""
    run = Run(**options)
    while run.auto.phase == "search":
        run.update()
    run.update()
    if place()[0] == rank:
        part = next(run.model.parameters()).detach().to_local()
        assert part.numel() > 0
        part.fill_(math.nan)
    return run.run().result()


def resumed(options, stop, folder, how):
    """Runs to `stop`, saves, and goes on in a run that has loaded it.

    Args:
        how: "each" rank its own file, or "dcp".
    """
    run, folder = Run(**options).run(stop), Path(folder)
    if how == "dcp":
        dcp.save(run.dcp_state(), checkpoint_id=folder / "dcp")
        other = Run(**options).dcp_load(folder / "dcp")
    else:
        path = folder / f"{place()[0]}.pt"
        torch.save(run.state_dict(), path)
        other = Run(**options).load_state_dict(torch.load(path, weights_only=True))
    return other.run().result()


def save_dcp(options, stop, folder):
    run = Run(**options).run(stop)
    dcp.save(run.dcp_state(), checkpoint_id=folder)
    return run.run().result()


def load_dcp(options, folder):
    return Run(**options).dcp_load(folder).run().result()


def first_of_all(options, stop, folder):
    """Loads the first rank's file on every rank; returns what that says."""
    run = Run(**options).run(stop)
    if place()[0] == 0:
        torch.save(run.auto.state_dict(), Path(folder, "first.pt"))
    torch.distributed.barrier()
    state = torch.load(Path(folder, "first.pt"), weights_only=True)
    try:
        Run(**options).auto.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return None


def loss_that_is_spread(options):
    """Returns what is said of a loss whose summands the ranks have."""
    loss = torch.ones((), device=rank_jobs.device)
    loss = DTensor.from_local(loss, rank_jobs.mesh_of(), [Partial()])
    try:
        Run(**options).auto.step(loss)
    except TypeError as error:
        return str(error)
    return None
