"""Checks with torch's own engines for several ranks; see test_distributed.py."""

import copy

import cases
import pytest
import rank_jobs
import torch
import torch.distributed as dist
from rank_jobs import RANK, REX, SIZE
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import lrs_ext

# Moments of about 1 in the denominator: gradients that differ by rounding make no other steps.
OPTIONS = {
    "SGD": {"momentum": 0.9},
    "Adam": {"eps": 1.0},
    "AdamW": {"eps": 1.0, "weight_decay": 0.1},
    "Lion": {"weight_decay": 0.1},
    "LAMB": {"eps": 1.0, "weight_decay": 0.1},
}


class Block(torch.nn.Module):
    """Uneven on every number of ranks; with a parameter that is not used at first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(6)
        self.up = torch.nn.Linear(6, 10)
        self.down = torch.nn.Linear(10, 6)
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + self.one * self.down(torch.tanh(self.up(self.norm(x))))


def make_model():
    model = torch.nn.Sequential(Block(), Block(), torch.nn.Linear(6, 3))
    return model.to(rank_jobs.device)


def batch_of(step):
    return rank_jobs.random((2 * SIZE, 6), 100 + step)


def share(batch):
    return batch[2 * RANK : 2 * RANK + 2]


def loss_of(model, batch):
    return model(batch).square().mean()


def make(name, params, **options):
    return getattr(lrs_ext, name)(params, lr=REX, **OPTIONS[name], **options)


def whole(value):
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_equal_on_all_ranks(tensor):
    others = [torch.empty_like(tensor) for _ in range(SIZE)]
    dist.all_gather(others, tensor.detach().contiguous())
    assert all(torch.equal(tensor, other) for other in others)


def data_parallel_is_one_process(name):
    model, alone = make_model(), make_model()
    ddp = DistributedDataParallel(model)
    opt, alone_opt = make(name, ddp.parameters()), make(name, alone.parameters())
    for step in range(cases.STEPS):
        batch = batch_of(step)
        loss_of(ddp, share(batch)).backward()
        loss_of(alone, batch).backward()
        norm = lrs_ext.clip_grad_norm_(opt, 0.05)
        alone_norm = lrs_ext.clip_grad_norm_(alone_opt, 0.05)
        torch.testing.assert_close(norm, alone_norm, **vars(cases.TORCH))
        for o in (opt, alone_opt):
            o.step()
            o.zero_grad()
        for param, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert_equal_on_all_ranks(param.detach())
            if name != "Lion":  # whose signs turn with a rounding
                torch.testing.assert_close(param, other, **vars(cases.TORCH))
    assert opt.current_lr() == alone_opt.current_lr()


def shard(model, mesh=None, policy=None, **options):
    options |= {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for layer in model:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fully_sharded_steps_are_those_of_one_process(name, how):
    """From the gradients that the engine has made, whatever its precision."""
    policy, mesh = None, rank_jobs.mesh_of()
    if how == "mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if how == "hybrid":
        mesh = rank_jobs.mesh_of((2, -1))
    model, alone = shard(make_model(), mesh, policy), make_model()
    opt, alone_opt = make(name, model.parameters()), make(name, alone.parameters())
    tolerance = cases.TORCH if name == "LAMB" else cases.EXACT
    for step in range(cases.STEPS):
        loss_of(model, share(batch_of(step))).backward()
        for param, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert isinstance(param, DTensor)
            other.grad = whole(param.grad)
        if step >= 3:
            norms = [lrs_ext.clip_grad_norm_(o, 0.05) for o in (opt, alone_opt)]
            torch.testing.assert_close(*norms, **vars(cases.STATE))
            tolerance = cases.TORCH
        for o in (opt, alone_opt):
            o.step()
            o.zero_grad()
        for param, other in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(param), other.detach(), **vars(tolerance))
    assert opt.current_lr() == alone_opt.current_lr()
    assert int(opt.schedule_buffer.step) == cases.STEPS


def offloaded_parts_are_those_on_the_gpu(name):
    """Where ranks can exchange data on their GPUs only: norms, and whether gradients are zero."""
    models = [shard(make_model(), offload_policy=CPUOffloadPolicy()), shard(make_model())]
    opts = [make(name, model.parameters()) for model in models]
    for model, opt in zip(models, opts, strict=True):
        get_optimizer_state_dict(model, opt)
    for step in range(3):
        norms = []
        for model, opt in zip(models, opts, strict=True):
            loss_of(model, share(batch_of(step))).backward()
            norms.append(lrs_ext.clip_grad_norm_(opt, 0.05).cpu())
            opt.step()
            opt.zero_grad()
        torch.testing.assert_close(*norms, **vars(cases.STATE))
        for param, other in zip(*(model.parameters() for model in models), strict=True):
            parts = (param.to_local().cpu(), other.to_local().cpu())
            torch.testing.assert_close(*parts, **vars(cases.TORCH))
    assert [int(opt.schedule_buffer.step) for opt in opts] == [3, 3]


def gradients_that_accumulate_are_one_step():
    model, other = shard(make_model()), shard(make_model())
    opts = [make("AdamW", m.parameters()) for m in (model, other)]
    for step in range(3):
        for part in share(batch_of(step)).split(1):
            (loss_of(model, part) / 2).backward()
        loss_of(other, share(batch_of(step))).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    for param, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(param), whole(expected), **vars(cases.TORCH))


def gradients_are_released_in_the_backward_pass(name, is_offloaded):
    options = {"offload_policy": CPUOffloadPolicy()} if is_offloaded else {}
    model, other = shard(make_model(), **options), shard(make_model(), **options)
    opts = [make(name, m.parameters()) for m in (model, other)]
    opts[0].step_in_backward()
    for step in range(4):
        for m, opt in zip((model, other), opts, strict=True):
            loss_of(m, share(batch_of(step))).backward()
            if m is model:
                assert all(param.grad is None for param in m.parameters())
            opt.step()
            opt.zero_grad()
        for param, expected in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(param.to_local(), expected.to_local())
    assert int(opts[0].schedule_buffer.step) == 4


def gradients_that_are_averaged_later_are_not_released():
    for is_first in (True, False):
        model = make_model()
        opt = make("AdamW", model.parameters())
        if is_first:
            opt.step_in_backward()
        ddp = DistributedDataParallel(model)
        if not is_first:
            opt.step_in_backward()
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(RuntimeError, match="DistributedDataParallel averages gradients after"):
            loss_of(ddp, share(batch_of(0))).backward()
        assert all(map(torch.equal, model.parameters(), before))
    # Of another model, or with a group of one rank, it averages nothing that is released here.
    alone = make_model()
    opt = make("AdamW", alone.parameters())
    opt.step_in_backward()
    own_group = dist.new_group([RANK], use_local_synchronization=True)
    for module in (alone, DistributedDataParallel(alone, process_group=own_group)):
        loss_of(module, batch_of(0)).backward()
        opt.step()
    assert int(opt.schedule_buffer.step) == 2


def no_gradient_is_kept_after_a_step():
    model = shard(make_model())
    opt = make("AdamW", model.parameters())
    for step in range(2):
        loss_of(model, share(batch_of(step))).backward()
        grads = [param.grad.to_local() for param in model.parameters()]
        storages = [StorageWeakRef(grad.untyped_storage()) for grad in grads]
        lrs_ext.clip_grad_norm_(opt, 1.0)
        opt.step()
        opt.zero_grad()
        del grads
        assert all(storage.expired() for storage in storages)


def parameters_notice_that_they_have_changed():
    """Autograd refuses to go back through a graph whose parameters a step has changed."""
    mesh = rank_jobs.mesh_of()
    param = rank_jobs.spread(rank_jobs.random((8, 3), 0), mesh, [Shard(0)]).requires_grad_()
    opt = lrs_ext.SGD([param], lr=0.1)
    loss = (param * param).sum()
    param.grad = rank_jobs.spread(torch.ones_like(rank_jobs.random((8, 3), 0)), mesh, [Shard(0)])
    before = param._version
    opt.step()
    assert param._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def tensor_parallel_steps_are_those_of_one_process(name):
    """Columns, rows, a norm whose gradients are summands, and plain tensors in a group apart."""
    model, alone = make_model(), make_model()
    mesh = rank_jobs.mesh_of()
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
    }
    block, alone_block = model[0], alone[0]
    # Ten does not divide by four, as torch's plans want it.
    block.up, block.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
    block.to(rank_jobs.device)
    alone_block.up, alone_block.down = copy.deepcopy((block.up, block.down))
    for param, other in zip(block.parameters(), alone_block.parameters(), strict=True):
        dist.broadcast(param.detach(), 0)
        other.data.copy_(param)
    parallelize_module(block, mesh, plan)
    params = dict(block.named_parameters())
    others = dict(alone_block.named_parameters())
    spread = [n for n, p in params.items() if isinstance(p, DTensor)]
    plain = [n for n in params if n not in spread]
    assert plain == ["one"]
    assert len(spread) == 6
    opt = make(name, [{"params": [params[n] for n in names]} for names in (spread, plain)])
    alone_opt = make(name, [others[n] for n in (*spread, *plain)])
    for step in range(cases.STEPS):
        batch = rank_jobs.random((8, 6), step)
        block(batch.chunk(SIZE)[RANK]).square().sum().backward()
        dist.all_reduce(params["one"].grad)
        assert any(placement.is_partial() for placement in params["norm.weight"].grad.placements)
        alone_block(batch).square().sum().backward()
        for n, param in params.items():
            gradient = whole(param.grad)
            torch.testing.assert_close(gradient, others[n].grad, **vars(cases.TORCH))
            others[n].grad = gradient.clone()
        norms = [lrs_ext.clip_grad_norm_(o, 0.5) for o in (opt, alone_opt)]
        torch.testing.assert_close(*norms, rtol=cases.STATE.rtol, atol=0.0)
        opt.step()
        alone_opt.step()
        opt.zero_grad()
        alone_opt.zero_grad()
        for n, param in params.items():
            torch.testing.assert_close(whole(param), others[n].detach(), **vars(cases.TORCH))


def two_dimensions_of_sharding_are_one_process(name):
    """Tensor parallel in one dimension of the mesh, fully sharded in the other."""
    mesh = rank_jobs.mesh_of((2, -1))
    model, alone = (torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)) for _ in "ab")
    for m in (model, alone):
        m.to(rank_jobs.device)
        for k, param in enumerate(m.parameters()):
            param.data.copy_(rank_jobs.random(param.shape, k))
    parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["outer"])
    opt, alone_opt = make(name, model.parameters()), make(name, alone.parameters())
    for step in range(4):
        model(rank_jobs.random((4, 6), step)).square().mean().backward()
        for param, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert param.device_mesh.ndim == 2
            other.grad = whole(param.grad)
        norms = [lrs_ext.clip_grad_norm_(o, 0.5) for o in (opt, alone_opt)]
        torch.testing.assert_close(*norms, rtol=cases.STATE.rtol, atol=0.0)
        for o in (opt, alone_opt):
            o.step()
            o.zero_grad()
        for param, other in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(param), other.detach(), **vars(cases.TORCH))


def zero_redundancy_steps_are_those_of_one_process(name):
    model, alone = make_model(), make_model()
    ddp = DistributedDataParallel(model)
    cls = getattr(lrs_ext, name)
    opt = ZeroRedundancyOptimizer(ddp.parameters(), cls, lr=REX, **OPTIONS[name])
    alone_opt = make(name, alone.parameters())
    for step in range(cases.STEPS):
        loss_of(ddp, share(batch_of(step))).backward()
        for param, other in zip(model.parameters(), alone.parameters(), strict=True):
            other.grad = param.grad.clone()
        for o in (opt, alone_opt):
            o.step()
            o.zero_grad()
        for param, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(param, other)
        assert opt.param_groups[0]["lr"] == alone_opt.param_groups[0]["lr"]
    held = sum(p.numel() for p in opt.optim.state)
    if name != "SGD":
        assert held < sum(p.numel() for p in model.parameters())
