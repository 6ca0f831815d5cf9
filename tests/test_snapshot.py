"""Rolling back: every tensor in place, every generator, whatever else was asked for."""

import copy
import random

import numpy as np
import pytest
import torch
from autolrs_runs import OPTIMIZERS, make_model
from test_no_sync import NoReadingMethods, NoReadingOps
from torch import nn

import lrs_ext
from lrs_ext.autolrs import snapshot
from lrs_ext.autolrs.random_state import random_state, set_random_state
from lrs_ext.autolrs.snapshot import Snapshot


def update(model, optimizer, count=1):
    for _ in range(count):
        loss = nn.functional.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """All tensors of model and optimizer, cloned."""
    states = [
        value
        for param in model.parameters()
        for value in optimizer.state.get(param, {}).values()
        if isinstance(value, torch.Tensor)
    ]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *states)]


def all_equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("placement", snapshot.PLACEMENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_comes_after_a_restore_is_what_came_before_it(name, placement, warm):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    update(model, optimizer, warm)
    copied = Snapshot(model, optimizer, (), placement)
    copied.capture()
    before = everything(model, optimizer)
    update(model, optimizer, 4)
    first, addresses = everything(model, optimizer), [p.data_ptr() for p in model.parameters()]
    copied.restore()
    assert all_equal(everything(model, optimizer)[: len(before)], before)
    update(model, optimizer, 4)
    assert all_equal(everything(model, optimizer), first)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_memory_is_known_before_the_first_update(name):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    copied = Snapshot(model, optimizer, ())
    announced = copied.nbytes
    update(model, optimizer)
    copied.capture()
    # Step counters, a few bytes for each parameter, are not foretold by every optimizer.
    counters = 16 * len(list(model.parameters())) + 8
    assert 0 <= copied.nbytes - announced <= counters
    elements = sum(p.numel() for p in model.parameters())
    states = {"sgd": 1, "lion": 1, "torch sgd": 1, "torch rmsprop": 1}.get(name, 2)
    assert 4 * elements * (1 + states) <= announced <= 4 * elements * (1 + states) + 2 * counters


def test_states_of_an_lrs_ext_optimizer_keep_their_addresses():
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    update(model, optimizer)
    addresses = [s["exp_avg"].data_ptr() for s in optimizer.state.values()]
    copied.restore()
    update(model, optimizer)
    assert [s["exp_avg"].data_ptr() for s in optimizer.state.values()] == addresses


def test_a_momentum_buffer_without_a_gradient_is_in_no_checkpoint():
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    update(model, optimizer)
    copied.restore()
    states = optimizer.state_dict()["state"].values()
    assert [state["momentum_buffer"] for state in states] == [None] * len(states)


def test_parameters_that_the_model_does_not_have():
    model, scale = make_model(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    scale.data.fill_(7.0)
    copied.restore()
    assert scale.tolist() == [1.0, 1.0]


class Counter:
    """Something with a state of its own."""

    def __init__(self):
        self.count, self.mean = 0, torch.zeros(2)

    def state_dict(self):
        return {"count": self.count, "nested": [{"mean": self.mean}]}

    def load_state_dict(self, state):
        self.count = state["count"]
        self.mean.copy_(state["nested"][0]["mean"])


def test_extra_state_is_rolled_back():
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    counter, average = Counter(), torch.optim.swa_utils.AveragedModel(model)
    copied = Snapshot(model, optimizer, (counter, average))
    counter.count, counter.mean = 3, torch.full((2,), 3.0)
    copied.capture()
    averaged = copy.deepcopy(average.state_dict())
    for _ in range(2):
        counter.count = 5
        counter.mean.fill_(5.0)
        update(model, optimizer)
        average.update_parameters(model)
        copied.restore()
        assert counter.count == 3
        assert counter.mean.tolist() == [3.0, 3.0]
        assert all_equal(average.state_dict().values(), averaged.values())
    copied.leave(counter)
    counter.count = 9
    copied.restore()
    assert counter.count == 9


@pytest.mark.parametrize("used", [False, True])
def test_a_scaler_is_rolled_back(used):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)

    def grow():
        scaler.scale(model(torch.randn(8, 4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    if used:
        grow()
    scale = scaler.get_scale()
    copied = Snapshot(model, optimizer, (scaler,))
    copied.capture()
    for _ in range(3):
        grow()
        copied.restore()
        assert scaler.get_scale() == scale
    grow()
    assert scaler.get_scale() == 2 * scale


def test_every_generator_is_rolled_back():
    model = make_model()
    copied = Snapshot(model, OPTIMIZERS["adamw"](model.parameters()), ())

    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()  # noqa: NPY002

    draw()
    copied.capture()
    first = [draw() for _ in range(3)]
    copied.restore()
    assert [draw() for _ in range(3)] == first
    state = random_state()
    second = draw()
    set_random_state(state)
    assert draw() == second


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw", "torch adam"])
def test_a_restore_may_be_decided_on_the_device(name, bad):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    update(model, optimizer, 2)
    copied = Snapshot(model, optimizer, (average,))
    copied.capture()
    before = everything(model, optimizer)
    averaged = copy.deepcopy(average.state_dict())
    update(model, optimizer)
    average.update_parameters(model)
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    after = everything(model, optimizer)
    with NoReadingOps(), NoReadingMethods():
        copied.restore_where(torch.tensor(bad))
    now = everything(model, optimizer)
    wanted = before if bad else after
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(now, wanted))  # noqa: B905
    if bad:
        assert all_equal(average.state_dict().values(), averaged.values())
    if name != "torch adam":
        assert optimizer.schedule_buffer.step.item() == 3


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_nothing_is_read(name):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with NoReadingOps(), NoReadingMethods():
        copied = Snapshot(model, optimizer, (scaler, torch.optim.swa_utils.AveragedModel(model)))
        copied.capture()
        copied.restore()


def test_a_state_survives_saving(tmp_path):
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    update(model, optimizer, 2)
    copied = Snapshot(model, optimizer, (Counter(),))
    copied.capture()
    torch.save(copied.state_dict(), tmp_path / "snapshot.pt")
    before = everything(model, optimizer)
    update(model, optimizer, 3)
    other = Snapshot(model, optimizer, (Counter(),))
    other.load_state_dict(torch.load(tmp_path / "snapshot.pt", weights_only=True))
    other.restore()
    assert all_equal(everything(model, optimizer), before)


@pytest.mark.parametrize(
    ("placement", "remedy"), [("device", 'snapshot="pinned"'), ("pinned", "more host memory")]
)
def test_a_copy_that_does_not_fit_is_refused(monkeypatch, placement, remedy):
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    needed = Snapshot(model, optimizer, (), placement).nbytes
    before = everything(model, optimizer)
    monkeypatch.setattr(snapshot, "available_host_memory", lambda: needed - 1)
    with pytest.raises(RuntimeError, match=f"takes {needed:,} bytes, which do not fit.*{remedy}"):
        Snapshot(model, optimizer, (), placement)
    assert all_equal(everything(model, optimizer), before)


# Buffers that come, go and change


class Lazy(nn.Module):
    """Makes or enlarges a cache in its forward, like rotary embeddings."""

    def __init__(self, persistent=False):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("cache", None, persistent=persistent)

    def forward(self, x):
        if self.cache is None or len(self.cache) < len(x):
            self.cache = torch.arange(float(len(x)))
        return self.linear(x) + self.cache[: len(x), None]


@pytest.mark.parametrize("name", ["adamw", "torch adam"])
def test_a_younger_buffer_and_the_weights_of_another_name_are_never_zeroed(name):
    model = Lazy()
    optimizer = OPTIMIZERS[name](model.parameters())
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    weight = model.linear.weight.detach().clone()
    update(model, optimizer)
    copied.restore()
    assert torch.equal(model.cache, torch.arange(8.0))
    assert torch.equal(model.linear.weight, weight)
    copied.restore_where(torch.tensor(True))
    assert torch.equal(model.cache, torch.arange(8.0))


@pytest.mark.parametrize("change", ["longer", "another dtype", "gone"])
@pytest.mark.parametrize("name", ["adamw", "torch adam"])
def test_a_buffer_that_has_changed_is_put_back_bit_for_bit(name, change):
    model = Lazy()
    optimizer = OPTIMIZERS[name](model.parameters())
    update(model, optimizer)
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    before = everything(model, optimizer)
    model.cache = {
        "longer": torch.zeros(20), "another dtype": torch.zeros(8).double(), "gone": None
    }[change]  # fmt: skip
    copied.restore_where(torch.tensor(True))
    update(model, optimizer)
    copied.restore()
    assert model.cache.dtype == torch.float32
    assert torch.equal(model.cache, torch.arange(8.0))
    assert all_equal(everything(model, optimizer), before)
    model.cache.zero_()
    copied.restore()
    assert torch.equal(model.cache, torch.arange(8.0))


def test_a_parameter_that_is_new_or_reshaped_is_refused_before_anything_changes():
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    update(model, optimizer)
    now = everything(model, optimizer)
    model.scale = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"1 only here \(parameter scale\).*middle of a trial"):
        copied.restore()
    del model.scale
    assert all_equal(everything(model, optimizer), now)


def test_an_expanded_buffer_is_refused():
    model = make_model()
    model.register_buffer("mask", torch.ones(1).expand(3))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(ValueError, match=r"buffer mask of shape \(3,\).* expanded.*\.clone\(\)"):
        Snapshot(model, optimizer, ())
    model.mask = model.mask.clone()
    Snapshot(model, optimizer, ())


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
    for name, tensor in there._memory.items():
        assert tensor.is_meta != name.endswith(" step"), name
    assert there._extra[0]["nested"][0]["mean"].is_meta


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
    assert copied._memory["buffer 1.running_mean"].is_meta


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
    monkeypatch.setattr(snapshot, "available_host_memory", lambda: announced - 1)
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
