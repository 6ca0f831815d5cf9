"""Rolling back: copies of other models and machines, and what is in no tensor."""

import pytest
import torch
from autolrs_runs import OPTIMIZERS, make_model
from test_snapshot import Counter, all_equal, everything, update
from torch import nn

import lrs_ext
from lrs_ext.autolrs import copy_memory, snapshot
from lrs_ext.autolrs.random_state import random_state, set_random_state
from lrs_ext.autolrs.snapshot import Snapshot

# States of other models and machines


@pytest.mark.parametrize("wrapped", ["saved", "live"])
def test_a_state_under_other_names_is_refused_before_anything_changes(wrapped):
    def make(is_wrapped):
        model = make_model()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        update(model, optimizer)
        model = nn.ModuleDict({"module": model}) if is_wrapped else model
        copied = Snapshot(model, optimizer, ())
        copied.capture()
        return model, optimizer, copied

    saved = make(wrapped == "saved")[2].state_dict()
    model, optimizer, copied = make(wrapped == "live")
    before = everything(model, optimizer)
    side = "in the copy" if wrapped == "saved" else "here"
    with pytest.raises(ValueError, match=rf"only {side} \([^)]*module\.[01]\..*'module\.'"):
        copied.load_state_dict(saved)
    copied.restore()
    assert all_equal(everything(model, optimizer), before)


def test_a_state_of_other_shapes_or_without_an_average_is_refused():
    def make(width, has_average):
        model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width, affine=False))
        average = (torch.optim.swa_utils.AveragedModel(model),) if has_average else ()
        copied = Snapshot(model, OPTIMIZERS["adamw"](model.parameters()), average)
        copied.capture()
        return copied

    saved = make(3, False).state_dict()
    with pytest.raises(ValueError, match=r"of another shape \(buffer 1\.running_mean, "):
        make(4, False).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"only here \(parameter extra_state\[0\]\.module\.0\."):
        make(3, True).load_state_dict(saved)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_loaded_copy_lies_where_training_has_its_tensors(optimizer):
    """The meta device stands for a GPU."""

    def make(device):
        model, counter = make_model().to(device), Counter()
        counter.mean = counter.mean.to(device)
        options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {"amsgrad": True}
        made = optimizer(model.parameters(), **options)
        average = torch.optim.swa_utils.AveragedModel(model).to(device)
        return Snapshot(model, made, (counter, average)), model, made

    copied, model, made = make("cpu")
    update(model, made)
    copied.capture()
    state = copied.state_dict()
    state["tensors"]["state 0 unheard_of"] = torch.zeros(3)
    state["captured"] += ("state 0 unheard_of",)
    there, *_ = make("meta")
    there.load_state_dict(state)
    for name, tensor in there._memory.tensors.items():
        assert tensor.is_meta != name.endswith(" step"), name
    assert there._memory.extra[0]["nested"][0]["mean"].is_meta


def test_a_loaded_scaler_gets_its_scale_on_its_device():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler, other = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("meta")
    scaler.scale(torch.ones(()))
    copied, there = (Snapshot(model, optimizer, (extra,)) for extra in (scaler, other))
    copied.capture()
    there.load_state_dict(copied.state_dict())
    there.restore()
    assert other._scale.is_meta


def test_a_copy_follows_a_tensor_to_another_device():
    model = make_model()
    copied = Snapshot(model, torch.optim.SGD(model.parameters(), lr=0.1), ())
    model[1].running_mean = torch.zeros(8, device="meta")
    copied.capture()
    assert copied._memory.tensors["buffer 1.running_mean"].is_meta


class Elsewhere:
    """A generator's state that torch.load has mapped to a device."""

    def __init__(self, state):
        self.cpu = lambda: state


def test_random_states_may_have_been_mapped_to_a_device(monkeypatch):
    state = random_state()
    wanted = torch.rand(3)
    first, second = torch.zeros(1), torch.ones(1)
    devices = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, index: devices.append((s, index)))
    mapped = {"torch": Elsewhere(state["torch"]), "cuda": [Elsewhere(first), Elsewhere(second)]}
    set_random_state({**state, **mapped})
    assert torch.equal(torch.rand(3), wanted)
    assert devices == [(first, 0)]
    model = make_model()
    copied = Snapshot(model, OPTIMIZERS["adamw"](model.parameters()), ())
    copied.capture()
    saved = copied.state_dict()
    saved["of_this_rank"]["random"] = {**state, **mapped}
    copied.load_state_dict(saved)
    assert copied._random["torch"] is state["torch"]  # no roll-back waits for it
    copied.restore()
    assert torch.equal(torch.rand(3), wanted)


# Extra state


def test_the_memory_of_extra_state_is_announced(monkeypatch):
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    without = Snapshot(model, optimizer, ()).nbytes
    average = torch.optim.swa_utils.AveragedModel(model)
    extras = (average, Counter())
    copied = Snapshot(model, optimizer, extras)
    tensors = (*average.state_dict().values(), torch.zeros(2))
    assert copied.nbytes == without + sum(t.numel() * t.element_size() for t in tensors)
    announced = copied.nbytes
    for _ in range(2):
        copied.capture()
        assert copied.nbytes == announced
    monkeypatch.setattr(copy_memory, "available_host_memory", lambda: announced - 1)
    with pytest.raises(RuntimeError, match=f"takes {announced:,} bytes, which do not fit"):
        Snapshot(model, optimizer, extras)


def test_an_average_is_restored_in_place_without_a_further_copy(monkeypatch):
    model = make_model()
    average = torch.optim.swa_utils.AveragedModel(model)
    copied = Snapshot(model, OPTIMIZERS["adamw"](model.parameters()), (average,))
    copied.capture()
    monkeypatch.setattr(snapshot, "copied", None)
    wanted = average.module[0].weight.detach().clone()
    average.module[0].weight.detach().zero_()
    copied.restore()
    assert torch.equal(average.module[0].weight, wanted)


class Scaled(nn.Linear):
    """A module with a state that is in no tensor."""

    def __init__(self):
        super().__init__(4, 1)
        self.seen, self.highest = 0, torch.zeros(())

    def get_extra_state(self):
        return {"seen": self.seen, "highest": self.highest}

    def set_extra_state(self, state):
        self.seen, self.highest = state["seen"], state["highest"]

    def forward(self, x):
        self.seen += 1
        self.highest += 1.0
        return super().forward(x)


def test_what_a_module_has_beside_tensors_is_rolled_back():
    model = nn.Sequential(Scaled())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    copied = Snapshot(model, optimizer, (average,))
    update(model, optimizer)
    copied.capture()
    for _ in range(2):
        update(model, optimizer, 3)
        average.module[0].seen = 9
        copied.restore()
        assert model[0].seen == 1
        assert model[0].highest.item() == 1.0
        assert average.module[0].seen == 0
    update(model, optimizer)
    copied.restore_where(torch.tensor(True))
    assert model[0].highest.item() == 1.0
    update(model, optimizer, 2)
    loaded = Snapshot(model, optimizer, (average,))
    loaded.load_state_dict(copied.state_dict())
    loaded.restore()
    assert model[0].seen == 1


def test_a_younger_state_that_starts_at_one_does_not_become_zero():
    model = make_model()
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-3)
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    update(model, optimizer)
    copied.restore_where(torch.tensor(True))
    for state in optimizer.state.values():
        assert state["mu_product"].item() > 0.0
        assert state["step"].item() == 0.0
        assert not state["exp_avg"].any()
    update(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


def test_tensors_are_copied_in_groups_of_one_kind(monkeypatch):
    """torch is slow for a list in which dtypes or devices differ."""
    calls, copy_list = [], torch._foreach_copy_

    def spy(targets, sources, **options):
        calls.append([(t.dtype, s.dtype) for t, s in zip(targets, sources, strict=True)])
        copy_list(targets, sources, **options)

    model = make_model()
    model[0].bfloat16()
    copied = Snapshot(model, torch.optim.SGD(model.parameters(), lr=0.1), ())
    monkeypatch.setattr(torch, "_foreach_copy_", spy)
    copied.capture()
    copied.restore()
    assert all(len(set(kinds)) == 1 for kinds in calls)
    assert len(calls) == 6  # bfloat16, float32 and the batches that int64 counts, twice


def test_a_state_that_has_gone_comes_back():
    model = make_model()
    optimizer = lrs_ext.AdamW(model.parameters(), lr=1e-3)
    update(model, optimizer, 2)
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    wanted = optimizer.state[model[0].weight].pop("exp_avg").clone()
    copied.restore()
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], wanted)


def test_an_optimizer_that_cannot_be_foretold_says_so():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["params"][0].sum().item() == 0.0:
                raise ValueError
            return super().step(closure)

    model = make_model()
    with pytest.warns(UserWarning, match="what Odd will keep .* cannot be foretold"):
        Snapshot(model, Odd(model.parameters(), lr=0.1), ())
