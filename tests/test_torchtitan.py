"""torchtitan: containers of the shape of its own, and its own where it can be imported."""

import importlib.util

import pytest
import torch
from torch import nn

import lrs_ext
from lrs_ext.integrations import OwnSchedule

REX = lrs_ext.rex(1e-2, total_steps=20, warmup_steps=2)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def update(model, optimizers, steps=1):
    for _ in range(steps):
        optimizers.zero_grad()
        model(torch.ones(2, 3)).square().mean().backward()
        optimizers.step()


# What torchtitan 0.3 does to an optimizer, call by call (its sources, components/optimizer): names
# in the groups, `fused` and `foreach` always passed, a step with zero gradients and a zero learning
# rate to make states, a flat checkpoint by names that is rebuilt from the groups that are alive.


def init_state(opt):
    if opt.state:
        return
    for group in opt.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    saved = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
    opt.step(closure=None)
    for group, lr in zip(opt.param_groups, saved, strict=True):
        group["lr"] = lr
    opt.zero_grad(set_to_none=True)


def flat_state(opt):
    state_dict, flat = opt.state_dict(), {}
    for group in state_dict["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                flat[f"state.{name}.{key}"] = value
            for key, value in group.items():
                if key not in ("params", "param_names"):
                    flat[f"param_groups.{name}.{key}"] = value
    return flat


def load_flat_state(opt, flat):
    state, groups, index = {}, [], 0
    for group in opt.param_groups:
        indices = []
        for name, param in zip(group["param_names"], group["params"], strict=True):
            keys = opt.state.get(param, {})
            state[index] = {key: flat[f"state.{name}.{key}"] for key in keys}
            indices.append(index)
            index += 1
        first = group["param_names"][0]
        keys = [key for key in group if key not in ("params", "param_names")]
        groups.append(
            {"params": indices, **{key: flat[f"param_groups.{first}.{key}"] for key in keys}}
        )
    opt.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})


def make_optimizer(model, cls, implementation):
    group = {
        "params": list(model.parameters()),
        "param_names": [name for name, _ in model.named_parameters()],
        "fused": implementation == "fused",
        "foreach": implementation == "foreach",
        "lr": REX,
        "weight_decay": 0.1,
    }
    return cls([group])


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "LAMB", "Lion", "SGD"])
def test_a_flat_checkpoint_by_names_resumes_to_the_bit(name, implementation):
    cls = getattr(lrs_ext, name)
    model = make_model()
    opt = make_optimizer(model, cls, implementation)
    init_state(opt)
    assert opt.schedule_buffer.step.item() == 0
    assert opt.current_lr() == [pytest.approx(REX(0))]
    update(model, opt, 5)
    flat = {key: copied(value) for key, value in flat_state(opt).items()}
    weights = {name: param.detach().clone() for name, param in model.state_dict().items()}
    update(model, opt, 5)

    other = make_model()
    resumed = make_optimizer(other, cls, implementation)
    scheduler = OwnSchedule(resumed)
    init_state(resumed)
    other.load_state_dict(weights)
    load_flat_state(resumed, flat)
    # Its container of schedulers restores this much, from `get_lr`, in any order.
    scheduler.last_epoch, scheduler._step_count = 5, 6
    scheduler._last_lr = scheduler.get_lr()
    assert resumed.schedule_buffer.step.item() == 5
    assert scheduler.get_last_lr() == [REX(5)]
    update(other, resumed, 5)
    for mine, its in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, its)


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_its_scheduler_container_may_hold_schedules_for_torchs_optimizers():
    model = make_model()
    opt = torch.optim.AdamW(model.parameters(), lr=REX.lr)
    scheduler = lrs_ext.ScheduleLR(opt, REX)
    scheduler.last_epoch, scheduler._step_count = 7, 8
    scheduler._last_lr = scheduler.get_lr()
    assert scheduler.get_last_lr() == [REX(7)]


# Its own classes. They need packages that come with torchtitan only.


def torchtitan():
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("torchtitan is not installed: its call shapes are imitated above")
    return pytest.importorskip(
        "torchtitan.components.optimizer", reason="torchtitan cannot be imported here"
    )


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_its_own_containers(name):
    titan = torchtitan()

    class Optimizers(titan.OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name):
            return getattr(lrs_ext, name)

    class Schedulers(titan.LRSchedulersContainer):
        def __init__(self, optimizers):
            self.schedulers = [OwnSchedule(optimizer) for optimizer in optimizers]

    def start():
        model = make_model()
        groups = [titan.ParamGroupConfig(pattern=r".*", optimizer_name=name,
                                         optimizer_kwargs={"lr": REX})]  # fmt: skip
        config = titan.OptimizersContainer.Config(param_groups=groups, implementation="fused")
        optimizers = Optimizers(config, model_parts=[model])
        return model, optimizers, Schedulers(optimizers)

    def train(run, steps):
        rates = []
        for _ in range(steps):
            rates.append(run[2].get_metrics()[f"lr/{name}"])
            update(run[0], run[1])
            run[2].step()
        return rates

    whole = start()
    assert train(whole, 5) == [REX(k) for k in range(5)]
    states = [{k: copied(v) for k, v in part.state_dict().items()} for part in whole]
    resumed = start()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    assert train(resumed, 6) == train(whole, 6) == [REX(k) for k in range(5, 11)]
    for mine, its in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(mine, its)
