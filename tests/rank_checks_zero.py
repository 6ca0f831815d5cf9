"""Checks of consolidated checkpoints of ZeroRedundancyOptimizer; see test_zero.py."""

from pathlib import Path

import cases
import pytest
import rank_jobs
import torch
import torch.distributed as dist
from rank_checks_torch import OPTIONS, loss_of, make_model
from rank_jobs import RANK, REX
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import lrs_ext

STORAGES = {"float32": {}, "blocks": {"state_dtype": torch.uint8}}
BATCH = 8  # whole on every rank, so that any number of ranks has the same gradients


class Run:
    """A model and its optimizer, with other numbers in each group.

    Args:
        lr: of the first group; the second one's is a tenth of it.
        cls: of the optimizer on each rank's share of the parameters.
    """

    def __init__(self, name, storage="float32", lr=REX, cls=None):
        self.name, self.model = name, make_model()
        options = OPTIONS[name] | STORAGES[storage]
        params = list(self.model.parameters())
        if isinstance(lr, lrs_ext.Schedule):
            groups = [{"params": params[:5]}, {"params": params[5:], "lr": lr.scaled(0.1)}]
        else:
            groups = [{"params": params[:5]}, {"params": params[5:], "lr": lr / 10}]
        if "weight_decay" in options:
            groups[1]["weight_decay"] = lrs_ext.linear(0.3, 8)
        cls = cls or getattr(lrs_ext, name)
        if cls is torch.optim.AdamW:
            groups[1].pop("weight_decay")
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.forward = DistributedDataParallel(self.model)
            self.opt = ZeroRedundancyOptimizer(groups, cls, lr=lr, **options)
            self.inner = self.opt.optim
        else:
            self.forward = self.model
            self.opt = self.inner = cls(groups, lr=lr, **options)

    def update(self, steps):
        """Makes updates number `steps`, with the gradients of one process to the bit."""
        for step in steps:
            loss_of(self.model, rank_jobs.random((BATCH, 6), step)).backward()
            self.opt.step()
            self.opt.zero_grad()
        return self

    def numbers(self):
        return {
            "lr": self.inner.current_lr(),
            "step": int(self.inner.schedule_buffer.step),
            "shown": [g["lr"] for g in self.inner.param_groups],
            "decay": [g.get("weight_decay") for g in self.inner.param_groups],
        }

    def params(self):
        return [param.detach().clone() for param in self.model.parameters()]

    def save(self, folder):
        """Writes what one rank has gathered from all."""
        self.opt.consolidate_state_dict(to=0)
        if RANK == 0:
            state = {"model": self.model.state_dict(), "optimizer": self.opt.state_dict()}
            torch.save(state, Path(folder, "checkpoint.pt"))
        dist.barrier()
        return self

    def load(self, folder):
        path = Path(folder, "checkpoint.pt")
        state = torch.load(path, map_location=rank_jobs.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        return self


def assert_same(run, other):
    assert run.numbers() == other.numbers(), (run.numbers(), other.numbers())
    exact = run.name != "LAMB"
    for param, expected in zip(run.params(), other.params(), strict=True):
        torch.testing.assert_close(param, expected, **vars(cases.EXACT if exact else cases.TORCH))


def goes_on(name, storage, folder):
    """In a new process, in a run that has gone elsewhere, and in the very same one."""
    run = Run(name, storage).update(range(5)).save(folder)
    before = run.numbers()
    assert before["step"] == 5
    assert before["shown"] == [REX(5), REX.scaled(0.1)(5)]
    new = Run(name, storage, lr=0.7).load(folder)
    assert new.numbers() == before
    elsewhere = Run(name, storage, lr=0.7).update(range(20, 22)).load(folder)
    unasked = Run(name, storage).load(folder)  # its next step is the first to look
    for other in (run, new, elsewhere, unasked):
        other.update(range(5, 7))
    for other in (new, elsewhere, unasked):
        assert_same(other, run)
    rewound = run.load(folder)
    assert rewound.numbers() == before
    assert_same(rewound.update(range(5, 7)), new)
    assert_same(rewound.load(folder).update(range(5, 7)), new)


def saved_and_gone_on(name, storage, folder):
    run = Run(name, storage).update(range(5)).save(folder)
    run.update(range(5, 7))
    return run.numbers(), [param.tolist() for param in run.params()]


def loaded_and_gone_on(name, storage, folder):
    """On another number of ranks, also on one without ZeroRedundancyOptimizer."""
    run = Run(name, storage, lr=0.7).load(folder).update(range(5, 7))
    return run.numbers(), [param.tolist() for param in run.params()]


def a_saved_state_stays_as_it_is():
    run = Run("AdamW").update(range(3))
    run.opt.consolidate_state_dict(to=0)
    saved = run.opt.state_dict()["param_groups"][0]["schedule"] if RANK == 0 else {}
    copied = dict(saved)
    run.update(range(3, 5))
    run.opt.consolidate_state_dict(to=0)
    if RANK == 0:
        assert saved == copied != run.opt.state_dict()["param_groups"][0]["schedule"]


def updates_that_only_the_device_knows_of_count(folder):
    """As of a replayed CUDA graph: the host learns of them when it saves."""
    run = Run("AdamW").update(range(2))
    run.inner.schedule_buffer.step.add_(2)
    assert run.opt.param_groups[0]["lr"] == REX(2)
    run.save(folder)
    new = Run("AdamW", lr=0.7).load(folder)
    for other in (run, new):
        assert other.numbers()["step"] == 4
        assert other.numbers()["shown"] == [REX(4), REX.scaled(0.1)(4)]
        other.update(range(2, 4))
        assert other.numbers()["shown"] == [REX(6), REX.scaled(0.1)(6)]
        assert other.numbers()["decay"][1] == lrs_ext.linear(0.3, 8)(6)
    assert_same(new, run)


def a_position_that_is_out_of_date_is_not_believed(folder):
    """Optimizers of torch carry it along while they train on."""
    Run("AdamW", lr=0.01).update(range(3)).save(folder)
    torchs = Run("AdamW", lr=0.01, cls=torch.optim.AdamW).load(folder)
    torchs.update(range(3, 5)).save(folder)
    run = Run("AdamW").load(folder)
    assert run.numbers()["step"] == 5
    assert run.numbers()["shown"] == [REX(5), REX.scaled(0.1)(5)]


def a_rank_without_parameters_keeps_up():
    """There are fewer of them than ranks; any rank may be the one that saves."""
    param = torch.nn.Parameter(torch.ones(3, device=rank_jobs.device))
    opt = ZeroRedundancyOptimizer([param], lrs_ext.AdamW, lr=REX)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        opt.step()
    assert opt.param_groups[0]["lr"] == REX(3)
    for rank in range(dist.get_world_size()):
        opt.consolidate_state_dict(to=rank)
        if rank == RANK:
            alone = lrs_ext.AdamW([torch.nn.Parameter(param.detach().clone())], lr=0.7)
            alone.load_state_dict(opt.state_dict())
            assert int(alone.schedule_buffer.step) == 3
            assert alone.param_groups[0]["lr"] == REX(3)
            assert alone.state_dict()["state"][0]["step"] == 3.0


def a_rank_without_gradients_keeps_up():
    """All parameters of a rank may be frozen for a while; without any gradient nothing happens."""
    wholes = [rank_jobs.random((size,), size) for size in (4, 3)]
    params, alone = ([torch.nn.Parameter(w.clone()) for w in wholes] for _ in range(2))
    opt = ZeroRedundancyOptimizer(params, lrs_ext.AdamW, lr=REX)
    alone_opt = lrs_ext.AdamW(alone, lr=REX)
    for step, trained in enumerate([(0, 1), (0,), (), (1,), (0,), (0, 1)]):
        for k, pair in enumerate(zip(params, alone, strict=True)):
            for param in pair:
                param.grad = rank_jobs.random(param.shape, 10 * step + k) if k in trained else None
        opt.step()
        alone_opt.step()
        assert opt.param_groups[0]["lr"] == alone_opt.param_groups[0]["lr"]
        assert torch.equal(opt.optim.schedule_buffer.step, alone_opt.schedule_buffer.step)
        assert all(map(torch.equal, params, alone))
    assert alone_opt.param_groups[0]["lr"] == REX(5)


def a_plateau_reduces_the_rates_of_every_rank():
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (4, 3)]
    opt = ZeroRedundancyOptimizer(params, lrs_ext.SGD, lr=1.0)
    plateau = lrs_ext.ReduceOnPlateau(opt, factor=0.5, patience=0)
    for metric in (3.0, 2.0, 4.0, 5.0):
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        plateau.step(metric)
    assert all(param.eq(-(1.0 + 1.0 + 1.0 + 0.5)).all() for param in params)


def errors_say_the_way_out():
    run = Run("AdamW")
    with pytest.raises(RuntimeError, match=r"its own share.*torch\.nn\.utils\.clip_grad_norm_"):
        lrs_ext.clip_grad_norm_(run.inner, 1.0)
    for opt in (run.opt, run.inner):
        with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer.*fully_shard"):
            lrs_ext.AutoLRS(opt, run.model, (1e-4, 1e-1), 100)
    with pytest.raises(TypeError, match="pass the ZeroRedundancyOptimizer itself"):
        lrs_ext.ReduceOnPlateau(run.inner)


def what_the_host_changes_after_loading_counts(folder):
    """A learning rate that is put into the groups, and a schedule, before the next step."""
    run = Run("AdamW").update(range(3)).save(folder)
    changed = Run("AdamW").load(folder)
    for group in changed.opt.param_groups:
        group["lr"] = 1e-4
    changed.update(range(3, 5))
    assert changed.numbers()["step"] == 5
    assert changed.numbers()["shown"] == [1e-4, 1e-4]
    longer = REX.with_total_steps(2 * REX.total_steps)
    rescheduled = run.load(folder)
    rescheduled.inner.set_schedule(longer, group=0)
    for own, outer in zip(
        rescheduled.inner.param_groups, rescheduled.opt.param_groups, strict=True
    ):
        outer["lr"], outer["schedule"] = own["lr"], own["schedule"]
    rescheduled.update(range(3, 5))
    assert rescheduled.numbers()["shown"] == [longer(5), REX.scaled(0.1)(5)]


def a_group_that_is_added_leaves_the_schedules_in_charge():
    lr = lrs_ext.linear(0.5, 8)
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    opt = ZeroRedundancyOptimizer(params[:2], lrs_ext.SGD, lr=lr, weight_decay=lr)
    for step in range(4):
        if step == 2:
            opt.add_param_group({"params": params[2:], "lr": 0.25})
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        group = opt.param_groups[0]
        assert [group["lr"], group["weight_decay"]] == [lr(step + 1)] * 2
    assert [group["lr"] for group in opt.optim.param_groups] == [lr(4), 0.25]
