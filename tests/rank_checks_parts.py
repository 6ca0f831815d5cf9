"""Checks of what a step keeps of DTensors from one step to the next; see test_distributed.py."""

import cases
import pytest
import rank_jobs
import torch
from rank_jobs import Twins
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

ADAMW = cases.UPDATES[3]


def copied(gradient):
    """The same in other memory."""
    part = gradient.to_local().clone()
    return DTensor.from_local(
        part,
        gradient.device_mesh,
        gradient.placements,
        run_check=False,
        shape=gradient.shape,
        stride=gradient.stride(),
    )


def no_gradient_is_stale():
    """However engines change it: object, part, memory, numbers, in any order."""
    for update in cases.STATE_UPDATES:
        twins = Twins(update, "shard")
        kept = None
        for step in range(12):
            before = [param.grad for param in twins.params]
            twins.give_gradients(step, skip=(1, 4) if step in (0, 1, 5) else ())
            for param, old in zip(twins.params, before, strict=True):
                if param.grad is None:
                    continue
                if step % 4 == 1 and old is not None:  # the same object and memory
                    old.to_local().copy_(param.grad.to_local())
                    param.grad = old
                elif step % 4 == 2 and old is not None:  # the same object, another part
                    old._local_tensor = param.grad._local_tensor
                    param.grad = old
                elif step % 4 == 3:  # another object; the memory of the first is free again
                    param.grad = copied(param.grad)
            kept = before if step % 2 else kept  # now and then none of it is freed
            del before
            twins.step()
            twins.check(cases.EXACT if update.name != "LAMB" else cases.TORCH)


def no_state_is_stale():
    """States that are put in, taken out or changed by hand."""
    for update in cases.STATE_UPDATES[1:]:
        twins = Twins(update, "shard")
        for step in range(8):
            twins.give_gradients(step, skip=(5,) if step < 3 else ())
            for params, opt in ((twins.params, twins.opt), (twins.wholes, twins.whole_opt)):
                if step == 2:  # one entry of a state, in the same dict
                    state = opt.state[params[0]]
                    for name in [name for name in state if name != "step"]:
                        state[name] = state[name] * 0.5
                if step == 4:  # a whole state
                    state = opt.state[params[1]]
                    opt.state[params[1]] = {
                        name: value.clone() for name, value in reversed(state.items())
                    }
                if step == 5:  # from the beginning
                    del opt.state[params[2]]
                if step == 6:  # the same in another order
                    states = dict(opt.state)
                    opt.state.clear()
                    opt.state.update(reversed(states.items()))
            twins.step()
            twins.check(cases.EXACT if update.name != "LAMB" else cases.TORCH)


def a_gradient_on_another_mesh_is_refused():
    """Also if it comes when the step has long been going."""
    twins = Twins(ADAMW, "hybrid" if rank_jobs.SIZE > 2 else "shard")
    for step in range(2):
        twins.give_gradients(step)
        twins.step()
    twins.give_gradients(2)
    mesh = init_device_mesh(rank_jobs.device, twins.mesh.shape, mesh_dim_names=None)
    if mesh == twins.mesh:  # as torch sees it, unless dimensions have other names
        names = tuple(f"other {dim}" for dim in range(mesh.ndim))
        mesh = init_device_mesh(rank_jobs.device, twins.mesh.shape, mesh_dim_names=names)
    assert mesh != twins.mesh
    param = twins.params[0]
    param.grad = DTensor.from_local(
        param.grad.to_local(),
        mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    before = param.detach().to_local().clone()
    with pytest.raises(RuntimeError, match=r"a gradient is on .* they must be equal"):
        twins.opt.step()
    assert torch.equal(param.detach().to_local(), before)
