"""What the tests of AutoLRS on several ranks do on each of them."""

import math
import random
from pathlib import Path

import numpy as np
import rank_jobs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from autolrs_runs import BOUNDS, PRESETS, Augmented
from test_no_sync import NoReadingMethods, NoReadingOps
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lrs_ext

GLOBAL_BATCH = 16


def place():
    """Returns (rank, ranks), also where there are no others."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def on_device(batch):
    return [part.to(rank_jobs.device) for part in batch]


class Batches:
    """This rank's parts of fixed global batches, epoch by epoch in another order."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(7, GLOBAL_BATCH, 4, generator=generator)
        noise = 0.1 * torch.randn(7, GLOBAL_BATCH, 1, generator=generator)
        self.targets = self.inputs.sum(-1, keepdim=True) + noise
        self.sampler, self.epoch = self, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        (rank, size), count = place(), len(self.inputs)
        for index in range(count):
            at = (index + self.epoch) % count
            yield self.inputs[at, rank::size], self.targets[at, rank::size]


def random_batches():
    """Batches moved at random, by generators that each rank has in another state."""
    rank, size = place()
    data = Augmented()
    sampler = torch.utils.data.DistributedSampler(data, size, rank) if size > 1 else None
    return torch.utils.data.DataLoader(data, batch_size=8, sampler=sampler)


OPTIMIZERS = {
    "sgd": lambda params: lrs_ext.SGD(params, lr=1e-3, momentum=0.9),
    "adamw": lambda params: lrs_ext.AdamW(params, lr=1e-3),
    "torch adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
}


class Run:
    """A small job on all ranks.

    Args:
        wrapper: "ddp" or "fsdp"; one process alone needs neither.
        is_random: whether batches and dropout draw from generators that differ from rank to rank.
        judge: whether a validation loss judges the trials.
    """

    def __init__(
        self, optimizer="adamw", preset="peak", wrapper="ddp", is_random=False, judge=False, **more
    ):
        rank, size = place()
        torch.manual_seed(0)
        dropout = 0.2 if is_random else 0.0
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 1))
        self.model.to(rank_jobs.device)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(rank)
        if wrapper == "fsdp" and size > 1:
            fully_shard(self.model[0])
            fully_shard(self.model)
        elif wrapper == "ddp" and size > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        options = PRESETS[preset] | more
        if judge:
            options["val_loss"] = self.validation_loss
        self.auto = lrs_ext.AutoLRS(self.optimizer, self.model, BOUNDS, **options)
        self.make_loader = random_batches if is_random else Batches
        self.rates, self.losses, self.batches = [], [], []
        self.stream = self.auto.batches(self.make_loader())

    def validation_loss(self):
        inputs, targets = on_device(next(iter(Batches())))
        return nn.functional.mse_loss(self.model(inputs), targets)

    def update(self, poison=False):
        inputs, targets = on_device(next(self.stream))
        loss = nn.functional.mse_loss(self.model(inputs), targets)
        loss.backward()
        self.rates.append(self.lr())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.auto.step(loss.detach() * (math.nan if poison else 1.0))
        self.losses.append(loss.item())
        self.batches.append(inputs)

    def lr(self):
        if isinstance(self.optimizer, lrs_ext.AdamW | lrs_ext.SGD):
            return self.optimizer.current_lr()[0]
        return float(self.optimizer.param_groups[0]["lr"])

    def run(self, updates=math.inf):
        while not self.auto.done and updates > 0:
            self.update()
            updates -= 1
        return self

    def weights(self):
        parts = [p.detach() for p in self.model.parameters()]
        parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parts]
        return torch.cat([p.flatten() for p in parts])

    def state_dict(self):
        parts = ("model", "optimizer", "auto")
        return {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state):
        for name in ("model", "optimizer", "auto"):
            getattr(self, name).load_state_dict(state[name])
        self.stream = self.auto.batches(self.make_loader())
        return self

    def dcp_state(self):
        """What torch.distributed.checkpoint writes, and reads into."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "auto": self.auto.state_dict(),
        }

    def dcp_load(self, folder):
        state = self.dcp_state()
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.auto.load_state_dict(state["auto"])
        self.stream = self.auto.batches(self.make_loader())
        return self

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
            "starts": [[t.start for t in stage.trials] for stage in history.stages],
            "best": [stage.best_lr for stage in history.stages],
            "weights": self.weights().tolist(),
        }


def whole(options):
    return Run(**options).run().result()


def without_reading(options):
    """A whole run in which any read from a tensor fails; optimizers of torch read their steps."""
    run = Run(**options)
    inputs, targets = on_device(next(run.stream))
    while not run.auto.done:
        loss = nn.functional.mse_loss(run.model(inputs), targets)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        with NoReadingOps(), NoReadingMethods():
            run.auto.step(loss.detach())
    return run.auto.history.stages[0].best_lr


def diverging_trial(options, rank, update):
    """A loss that is not finite on one rank."""
    run = Run(**options)
    while not run.auto.done:
        run.update(poison=place()[0] == rank and len(run.losses) == update)
    return run.result()


def diverging_training(options, rank):
    """Weights that are not finite on one rank, behind the backs of the others."""
    run = Run(**options)
    while run.auto.phase == "search":
        run.update()
    run.update()
    if place()[0] == rank:
        with torch.no_grad():
            next(run.model.parameters()).fill_(math.nan)
    return run.run().result()


def resumed(options, stop, folder, how):
    """Runs to `stop`, saves, and goes on in a run that has loaded it.

    Args:
        how: "each" rank its own file, "first": all load that of the first rank, or "dcp".
    """
    rank, _ = place()
    folder = Path(folder)
    run = Run(**options).run(stop)
    if how == "dcp":
        dcp.save(run.dcp_state(), checkpoint_id=folder / "dcp")
        del run
        other = Run(**options).dcp_load(folder / "dcp")
    else:
        torch.save(run.state_dict(), folder / f"{rank}.pt")
        dist.barrier()
        source = rank if how == "each" else 0
        gpus = {f"cuda:{source}": f"cuda:{rank}"}
        state = torch.load(folder / f"{source}.pt", map_location=gpus, weights_only=True)
        other = Run(**options).load_state_dict(state)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(99 + rank) if how != "each" else None
    return other.run().result()


def save_dcp(options, stop, folder):
    run = Run(**options).run(stop)
    dcp.save(run.dcp_state(), checkpoint_id=folder)
    return run.run().result()


def load_dcp(options, folder):
    return Run(**options).dcp_load(folder).run().result()


def states(options, stops):
    """What `state_dict` returns at some updates, but for what is this rank's."""
    run, found = Run(**options), []
    for stop in stops:
        run.run(stop - len(run.losses))
        state = run.auto.state_dict()
        del state["of_this_rank"]
        found.append(plain(state))
    return found


def plain(state):
    """A nested state as plain values, in which NaN equals itself."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), repr(state.tolist())
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return repr(state)


def averaging(options):
    """Whether gradients are averaged, and whether weights are equal on all ranks, by update."""
    run, found = Run(**options), []
    while not run.auto.done:
        sync = run.model.require_backward_grad_sync
        run.update()
        weights = run.weights()
        others = [torch.empty_like(weights) for _ in range(place()[1])]
        dist.all_gather(others, weights)
        found.append((sync, all(torch.equal(other, weights) for other in others)))
    return found, [batch.tolist() for batch in run.batches]


def made(options):
    """The error with which a controller is refused, or None."""
    try:
        Run(**options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def made_with_own_budget(options):
    return made({**options, "total_steps": 150 + 10 * place()[0]})
