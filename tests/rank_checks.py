"""Checks of steps and norms that run on every rank; see test_distributed.py."""

import contextlib
import functools
from unittest import mock

import cases
import pytest
import rank_jobs
import torch
import torch.distributed as dist
from rank_jobs import RANK, SIZE, Twins
from test_no_sync import no_sync
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import lrs_ext

ADAMW = cases.STORED_UPDATES[3]


@contextlib.contextmanager
def counted_all_reduces():
    """Counts the all-reduces, and the elements of each."""
    sizes = []

    def count(values, *args, **kwargs):
        sizes.append(values.numel())
        return all_reduce(values, *args, **kwargs)

    all_reduce = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", count):
        yield sizes


def never_waiting():
    return no_sync(cases.Backend(rank_jobs.device, rank_jobs.device))


def steps_are_those_of_one_process(how, backend):
    """Bit by bit, but for LAMB's norms, whose sums are taken in another order."""
    if backend == "native":
        backend = rank_jobs.device
    for update in cases.STATE_UPDATES:
        twins = Twins(update, how, backend=backend)
        exact = update.name != "LAMB" or how == "replicate"
        for step in range(cases.STEPS):
            twins.give_gradients(step, skip=(1,) if step < 2 else ())
            twins.step()
            twins.check(cases.EXACT if exact else cases.TORCH)


def states_have_the_shape_of_the_part():
    """As a part of the parameter, and as a whole, they are laid out as their parameter."""
    for update in cases.STATE_UPDATES[2:]:
        twins = Twins(update, "shard")
        twins.give_gradients(0)
        twins.opt.step()
        for param in twins.params:
            for name, value in twins.opt.state[param].items():
                if name == "step":
                    assert not isinstance(value, DTensor)
                    continue
                assert isinstance(value, DTensor)
                assert (value.shape, value.placements) == (param.shape, param.placements)
                assert value.to_local().shape == param.detach().to_local().shape


def steps_neither_wait_nor_talk():
    """But LAMB, whose sums are one all-reduce of two numbers a tensor."""
    for update in cases.STATE_UPDATES:
        twins = Twins(update, "shard")
        twins.give_gradients(0)
        twins.opt.step()
        for step in range(1, 4):
            twins.give_gradients(step)
            with counted_all_reduces() as sizes, never_waiting():
                twins.opt.step()
                twins.opt.zero_grad()
            assert sizes == ([2 * len(twins.params)] if update.name == "LAMB" else [])


def norms_are_of_all_parts(how):
    for update, max_norm in zip(cases.STATE_UPDATES, (0.1, 1e6, 0.5, 1.0, 0.5, 0.1), strict=True):
        twins = Twins(update, how)
        for step in range(3):
            twins.give_gradients(step, skip=(step,))
            with counted_all_reduces() as sizes:
                norm = lrs_ext.clip_grad_norm_(twins.opt, max_norm)
            dims = {"replicate": 0, "blocks": 2}.get(how, 1)
            dims -= how in ("hybrid", "blocks") and SIZE == 2  # a dimension of one rank
            if how == "columns":
                assert len(sizes) == 1  # beside parameters that every rank has
            elif how != "blocks":
                assert sizes == [1] * dims
            expected = lrs_ext.clip_grad_norm_(twins.whole_opt, max_norm)
            assert norm.shape == ()
            torch.testing.assert_close(norm, expected, rtol=cases.STATE.rtol, atol=0.0)
            norms = [torch.zeros_like(norm) for _ in range(SIZE)]
            dist.all_gather(norms, norm)
            assert all(torch.equal(norm, other) for other in norms)
            twins.step()
            twins.check(cases.TORCH)


def norms_do_not_wait():
    twins = Twins(ADAMW, "shard")
    twins.give_gradients(0)
    twins.opt.step()
    twins.give_gradients(1)
    max_norm = torch.tensor(0.5, device=rank_jobs.device)  # for which a GPU waits
    with never_waiting():
        lrs_ext.clip_grad_norm_(twins.opt, max_norm)
        twins.opt.step()


def plain_groups_count_once():
    """Beside DTensors: they are equal on all ranks."""
    mesh = rank_jobs.mesh_of()
    wholes = [rank_jobs.random((6, 3), 0), rank_jobs.random((5,), 1), rank_jobs.random((4,), 2)]
    plain, whole = ([w.clone().requires_grad_() for w in wholes] for _ in range(2))
    sharded = [rank_jobs.spread(w, mesh, [Shard(0)]).requires_grad_() for w in wholes[:1]]
    copied = [rank_jobs.spread(w, mesh, [Replicate()]).requires_grad_() for w in wholes[1:2]]
    groups = [{"params": sharded}, {"params": copied}, {"params": plain[2:]}]
    opt = lrs_ext.AdamW(groups, lr=rank_jobs.REX)
    whole_opt = lrs_ext.AdamW(whole, lr=rank_jobs.REX)
    for step in range(4):
        for k, param in enumerate([*sharded, *copied, *plain[2:]]):
            whole[k].grad = rank_jobs.random(whole[k].shape, 10 * step + k)
            param.grad = whole[k].grad
            if isinstance(param, DTensor):
                param.grad = rank_jobs.spread(whole[k].grad, mesh, param.placements)
        norms = [lrs_ext.clip_grad_norm_(o, 0.7) for o in (opt, whole_opt)]
        torch.testing.assert_close(*norms, rtol=cases.STATE.rtol, atol=0.0)
        opt.step()
        whole_opt.step()
    assert int(opt.schedule_buffer.step) == 4
    for param, expected in zip([*sharded, *copied, *plain[2:]], whole, strict=True):
        value = param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()
        torch.testing.assert_close(value, expected.detach(), **vars(cases.TORCH))


def overflows_on_one_rank_skip_the_step_on_all():
    for update in cases.STATE_UPDATES:
        twins = Twins(update, "shard", shapes=[(8, 3), (8,)])
        scalers = [torch.amp.GradScaler(rank_jobs.device, init_scale=4.0) for _ in range(2)]
        for step, is_bad in enumerate([False, True, False]):
            twins.give_gradients(step, scale=4.0 if step == 0 else scalers[0].get_scale())
            if is_bad:
                twins.wholes[0].grad[-1, 0] = torch.inf
                if RANK == SIZE - 1:
                    twins.params[0].grad._local_tensor[-1, 0] = torch.inf
            for scaler, opt in zip(scalers, (twins.opt, twins.whole_opt), strict=True):
                scaler.scale(torch.ones((), device=rank_jobs.device))
                scaler.step(opt)
                scaler.update()
            assert scalers[0].get_scale() == scalers[1].get_scale()
            twins.check(cases.EXACT if update.name != "LAMB" else cases.TORCH)
        assert int(twins.opt.schedule_buffer.step) == 2


def gradients_that_are_not_summed_yet_are():
    """A replicated parameter's gradient may be a summand on each rank, as after a norm layer."""
    mesh = rank_jobs.mesh_of()
    for update in cases.STATE_UPDATES:
        twins = Twins(update, "replicate")
        for step in range(3):
            twins.give_gradients(step)
            for param, whole in zip(twins.params, twins.wholes, strict=True):
                summand = whole.grad if RANK == 0 else torch.zeros_like(whole)
                param.grad = DTensor.from_local(summand, mesh, [Partial()])
            twins.step()
            twins.check()


def random_bits_are_those_of_the_elements(state_dtype):
    """Copies of an element are rounded alike, other elements by other bits."""
    dtype = getattr(torch, state_dtype)
    options = {"stochastic_rounding": True, "state_dtype": dtype, "dtype": torch.bfloat16}
    twins = Twins(ADAMW, "hybrid" if SIZE > 2 else "shard", shapes=[(8, 64)], **options)
    rows = rank_jobs.random((1, 64), 0, torch.bfloat16).repeat(8, 1)
    (param,) = twins.params
    param.data._local_tensor.fill_(1.0)
    for _ in range(3):
        param.grad = rank_jobs.spread(rows, twins.mesh, twins.placements)
        twins.opt.step()
    part = param.detach().to_local().contiguous().view(torch.uint8)
    state = twins.opt.state[param]["exp_avg"].to_local().contiguous().view(torch.uint8)
    for bits in (part, state):
        parts = [torch.empty_like(bits) for _ in range(SIZE)]
        dist.all_gather(parts, bits)
        if SIZE == 2:
            assert not torch.equal(*parts)
        else:
            assert torch.equal(parts[0], parts[2])
            assert torch.equal(parts[1], parts[3])
            assert not torch.equal(parts[0], parts[1])


def storages_keep_the_parts_as_one_process_would(options):
    """The first part is rounded by the bits of a whole of its size."""
    is_random = options["stochastic_rounding"] or options["state_dtype"] != torch.float32
    for update in cases.STORED_UPDATES:
        twins = Twins(update, "shard", torch.bfloat16, shapes=[(8, 40), (5,), (1,)], **options)
        alone = [p.detach().to_local().clone().requires_grad_() for p in twins.params]
        opt = getattr(lrs_ext, update.name)(alone, lr=rank_jobs.REX, **update.options, **options)
        for step in range(4):
            twins.give_gradients(step)
            for part, param in zip(alone, twins.params, strict=True):
                part.grad = param.grad.to_local().clone()
            twins.opt.step()
            opt.step()
        for part, param in zip(alone, twins.params, strict=True):
            states, own = twins.opt.state.get(param, {}), opt.state.get(part, {})
            assert {n: _local(v).shape for n, v in states.items()} == {
                n: v.shape for n, v in own.items()
            }
            if RANK == 0 or not is_random:
                assert torch.equal(param.detach().to_local(), part.detach())
                assert all(torch.equal(_local(states[name]), own[name]) for name in own)


def _local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def errors_say_the_way_out():
    mesh = rank_jobs.mesh_of()
    whole = rank_jobs.random((8, 3), 0)
    sharded = rank_jobs.spread(whole, mesh, [Shard(0)]).requires_grad_()
    refused = functools.partial(pytest.raises, RuntimeError)
    with refused(match=r"has 1 DTensors and 1 plain tensors.*a group of their own"):
        lrs_ext.AdamW([sharded, whole.clone().requires_grad_()])
    partial = DTensor.from_local(whole, mesh, [Partial()]).requires_grad_()
    with refused(match=r"SGD does not support parameters with placements.*Partial.*redistribute"):
        lrs_ext.SGD([partial])
    double = rank_jobs.spread(whole.double(), mesh, [Shard(0)]).requires_grad_()
    with refused(match=r"got torch\.float64: use torch\.optim"):
        lrs_ext.Lion([double])
    part = torch.zeros(4, 6, device=rank_jobs.device)[:, ::2]
    gaps = DTensor.from_local(part, mesh, [Shard(0)]).requires_grad_()
    with refused(match=r"gaps between its elements: make it with \.contiguous\(\)"):
        lrs_ext.AdamW([gaps])
    opt = lrs_ext.LAMB([sharded])
    with refused(match=r"norms that LAMB takes.*use step"):
        opt.step_in_backward()
    opt = lrs_ext.AdamW([sharded])
    opt.state[sharded]["exp_avg"] = torch.zeros(3, device=rank_jobs.device)
    sharded.grad = rank_jobs.spread(whole, mesh, [Shard(0)])
    with refused(match=r"exp_avg has shape \(3,\), its parameter \(8, 3\): delete"):
        opt.step()
