"""Frozen parameters: not copied, and not changed behind the back of a roll-back."""

import copy

import pytest
import torch
from autolrs_runs import OPTIMIZERS, PEAK, list_of_batches, make_model
from test_no_sync import NoReadingMethods, NoReadingOps
from test_snapshot import update
from torch import nn

import lrs_ext
from lrs_ext.autolrs.constants import Constants
from lrs_ext.autolrs.snapshot import Snapshot

both_kinds = pytest.mark.parametrize("kind", ["adamw", "torch adam"])


class WithTarget(nn.Module):
    """A network and one that follows it, as for self-supervised learning."""

    def __init__(self):
        super().__init__()
        self.online = make_model()
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, inputs):
        return self.online(inputs)


def names(copied):
    return {name for name in copied._captured if name.startswith("parameter")}


def make(kind, extra=()):
    model = WithTarget()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = OPTIMIZERS[kind](trained)
    extra_state = [model.get_submodule(path) for path in extra]
    return model, optimizer, Snapshot(model, optimizer, extra_state)


@both_kinds
def test_no_copy_is_made_of_what_is_frozen(kind):
    model = nn.Sequential(nn.Linear(4, 1000), nn.Linear(1000, 1), nn.BatchNorm1d(1))
    model[0].requires_grad_(False)
    optimizer = OPTIMIZERS[kind](param for param in model.parameters() if param.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copied = Snapshot(model, optimizer, ())
    assert copied.nbytes < 4 * (3 * trained + 50)
    for _ in range(2):
        copied.capture()
        assert names(copied) == {f"parameter {i}.{n}" for i in (1, 2) for n in ("weight", "bias")}
        mean = model[2].running_mean.clone()
        update(model, optimizer)
        assert copied.nbytes < 4 * (3 * trained + 50)
        copied.restore()
        assert torch.equal(model[2].running_mean, mean)
    # What the optimizer has is copied, whether it requires a gradient or not.
    copied = Snapshot(model, lrs_ext.SGD(model.parameters(), lr=0.1), ())
    copied.capture()
    assert len(names(copied)) == 6


CHANGES = {
    "in place": lambda old, new: old.lerp_(new, 0.1),
    "through data": lambda old, new: old.data.mul_(0.9).add_(new.data, alpha=0.1),
    "by new data": lambda old, new: setattr(old, "data", 0.9 * old.data + 0.1 * new.data),
    "one bit": lambda old, new: old.view(-1)[-1:].view(torch.int32).bitwise_xor_(1),
}


def follow(model, change):
    with torch.no_grad():
        for old, new in zip(model.target.parameters(), model.online.parameters(), strict=True):
            CHANGES[change](old, new)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["restore", "restore_where"])
@both_kinds
def test_what_changes_without_a_copy_is_an_error(kind, how, change):
    model, optimizer, copied = make(kind)
    copied.capture()
    update(model, optimizer)
    follow(model, change)
    before = [param.clone() for param in model.parameters()]
    restore = copied.restore if how == "restore" else lambda: copied.restore_where(torch.tensor(0))
    with pytest.raises(RuntimeError, match=r"parameter target\.0\.\w+ has changed.*extra_state"):
        restore()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("change", CHANGES)
@both_kinds
def test_a_module_in_extra_state_is_rolled_back_also_where_it_is_in_the_model(kind, change):
    model, optimizer, copied = make(kind, ["target"])
    copied.capture()
    before = [param.clone() for param in model.parameters()]
    update(model, optimizer)
    follow(model, change)
    copied.restore()
    assert all(map(torch.equal, before, model.parameters()))


@both_kinds
def test_a_parameter_that_is_thawed_is_in_the_next_copy(kind):
    model, optimizer, copied = make(kind)
    copied.capture()
    model.target.requires_grad_(True)
    copied.restore()  # nothing has changed
    copied.capture()
    before = [param.clone() for param in model.parameters()]
    model.target.requires_grad_(False)  # from now on, but it may have changed
    update(model, optimizer)
    follow(model, "through data")
    copied.restore()
    assert all(map(torch.equal, before, model.parameters()))
    copied.capture()
    follow(model, "through data")
    with pytest.raises(RuntimeError, match="has changed since"):
        copied.restore()


@pytest.mark.parametrize("is_model_first", [True, False])
@both_kinds
def test_a_resumed_run_loads_what_is_frozen_before_or_after(kind, is_model_first):
    model, optimizer, copied = make(kind)
    update(model, optimizer)
    copied.capture()
    update(model, optimizer)
    other, other_optimizer, other_copied = make(kind)
    other_copied.capture()
    parts = [(other, model), (other_copied, copied)]
    for new, old in parts if is_model_first else parts[::-1]:
        new.load_state_dict(old.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    copied.restore()
    other_copied.restore()
    assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_a_whole_run_with_adapters_on_a_frozen_model():
    model, optimizer, _ = make("adamw")
    auto = lrs_ext.AutoLRS(optimizer, model, (1e-4, 1.0), **PEAK)
    frozen = [param.clone() for param in model.target.parameters()]
    for inputs, targets in auto.batches(list_of_batches()):
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        with NoReadingOps(), NoReadingMethods():
            auto.step(torch.ones(()))
    assert all(map(torch.equal, frozen, model.target.parameters()))


DTYPES = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.complex128]


@pytest.mark.parametrize("layout", ["contiguous", "unaligned", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_counts(dtype, layout):
    memory = torch.zeros(16).to(dtype)
    tensor = memory[1:] if layout == "unaligned" else memory[:15]
    tensor = tensor.view(3, 5).mT if layout == "transposed" else tensor
    for index in range(15):
        constants = Constants()
        constants.note({"one": tensor, "empty": tensor[:0], "number": memory[0]})
        constants.check({"one": tensor})
        memory[index + (layout == "unaligned")] = torch.ones(()).to(dtype)
        with pytest.raises(RuntimeError, match="one has changed"):
            constants.check({"one": tensor})
