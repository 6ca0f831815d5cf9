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
from lrs_ext.autolrs import copy_memory
from lrs_ext.autolrs.copy_memory import CopyMemory
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
@pytest.mark.parametrize("placement", copy_memory.PLACEMENTS)
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


def test_what_is_saved_has_come_from_each_device(monkeypatch):
    """Copies in host memory are waited for, whichever the current device is."""
    model = make_model()
    optimizer = next(iter(OPTIMIZERS.values()))(model.parameters())
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    homes = [torch.device("cuda", index) for index in (1, 3)]
    copied._memory.homes = {name: homes[i % 2] for i, name in enumerate(copied._memory.homes)}
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    copied.state_dict()
    assert waited == []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    copied.state_dict()
    assert sorted(waited, key=str) == homes


def test_nothing_is_loaded_while_copies_are_on_their_way(monkeypatch):
    model = make_model()
    copied = Snapshot(model, next(iter(OPTIMIZERS.values()))(model.parameters()), ())
    copied.capture()
    saved = copied.state_dict()
    weight = next(iter(model.parameters())).detach().clone()
    with torch.no_grad():
        next(iter(model.parameters())).zero_()
    monkeypatch.setattr(CopyMemory, "wait", lambda memory: copied.capture())  # the last one ends
    copied.load_state_dict(saved)
    copied.restore()
    assert torch.equal(next(iter(model.parameters())), weight)


@pytest.mark.gpu
def test_what_is_loaded_into_host_memory_is_not_mixed_with_pending_copies():
    model = nn.Linear(64, 64).cuda()
    optimizer = lrs_ext.SGD(model.parameters(), lr=0.1)
    copied = Snapshot(model, optimizer, (), placement="pinned")
    weight, first = model.weight.detach(), model.weight.detach().clone()
    copied.capture()
    saved = copied.state_dict()
    weight.fill_(2.0)
    torch.cuda._sleep(100_000_000)
    copied.capture()
    copied.load_state_dict(saved)  # which that must not overwrite
    copied.restore()
    assert torch.equal(weight, first)
    weight.fill_(2.0)
    copied.capture()
    weight.fill_(3.0)
    torch.cuda._sleep(100_000_000)
    copied.restore()
    copied.load_state_dict(saved)  # which that must not read
    assert torch.equal(weight, torch.full_like(weight, 2.0))


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


class CopyingCounter(Counter):
    """Something that gives copies of its state, and takes copies."""

    def state_dict(self):
        return copy.deepcopy(super().state_dict())


class Loader:
    """Something that goes on in its next epoch where the state that is loaded has been."""

    def __init__(self):
        self.generator, self.start = torch.Generator(), 0

    def state_dict(self):
        return {"start": 7, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.start = state["start"]


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


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("kind", [Counter, CopyingCounter])
def test_extra_state_may_be_rolled_back_on_the_device(kind, bad):
    model, counter = make_model(), kind()
    copied = Snapshot(model, OPTIMIZERS["adamw"](model.parameters()), (counter,))
    copied.capture()
    counter.count = 5
    counter.mean.fill_(torch.nan)
    with NoReadingOps(), NoReadingMethods():
        copied.restore_where(torch.tensor(bad))
    assert counter.count == 5
    assert counter.mean.isnan().tolist() == 2 * [not bad]


def test_a_loader_is_left_alone_where_the_device_decides():
    model, loader = make_model(), Loader()
    copied = Snapshot(model, OPTIMIZERS["adamw"](model.parameters()), (loader,))
    copied.capture()
    copied.restore_where(torch.tensor(True))
    assert loader.start == 0


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
    monkeypatch.setattr(copy_memory, "available_host_memory", lambda: needed - 1)
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
        return self.linear(x) + self.cache[: len(x), None].to(x.dtype)


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


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_buffer_is_refused_unless_it_is_an_attribute(layout):
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    graph = torch.eye(3).to_sparse(layout=layout)
    model.register_buffer("graph", graph)
    with pytest.raises(ValueError, match=rf"buffer graph has layout {layout}.*plain attribute"):
        Snapshot(model, optimizer, ())
    del model.graph
    model.graph = graph
    Snapshot(model, optimizer, ())


def test_a_sparse_state_of_the_optimizer_is_refused_as_soon_as_it_is_there():
    model = nn.Embedding(3, 2, sparse=True)
    optimizer = OPTIMIZERS["torch sgd"](model.parameters())
    copied = Snapshot(model, optimizer, ())
    copied.capture()
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"state 0 momentum_buffer has layout .*sparse=False"):
        copied.restore()
