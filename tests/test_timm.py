"""timm: its schedulers write floats, its layer decay gives groups an `lr_scale`."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch
from test_docs import blocks
from torch import nn

import lrs_ext

REX = lrs_ext.rex(0.1, total_steps=20)


@pytest.fixture(autouse=True)
def timm():
    """Makes parts of timm importable; without torchvision, past what imports its models.

    torchvision comes for one build of torch: the one on the package index does not fit a torch for
    CPUs.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed: lrs_ext[timm]")
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    (folder,) = spec.submodule_search_locations
    for name, path in {"timm": folder, "timm.optim": f"{folder}/optim", "timm.models": ""}.items():
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [path] if path else []
    sys.modules["timm.models"].group_parameters = None  # for models of timm only
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]


def create_scheduler(*args, **options):
    module = importlib.import_module("timm.scheduler.scheduler_factory")
    return module.create_scheduler_v2(*args, **options)


class Layers(nn.Module):
    """What layer decay needs: a head with a name, and layers before it."""

    pretrained_cfg = {"classifier": "head"}  # noqa: RUF012 - as timm's models have it

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


def layer_groups(model):
    groups = importlib.import_module("timm.optim._param_groups")
    # Two tensors a layer: stem, block and head are layers 0, 1 and 2.
    original = groups.auto_group_layers
    try:
        groups.auto_group_layers = lambda m: original(m, layers_per_group=2)
        return groups.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    finally:
        groups.auto_group_layers = original


def update(model, opt, steps=1):
    for _ in range(steps):
        opt.zero_grad()
        model(torch.ones(2, 3)).square().mean().backward()
        opt.step()


SCALES = {0.25, 0.5, 1.0}


def test_layer_decay_scales_the_schedule():
    model = Layers()
    opt = lrs_ext.AdamW(layer_groups(model), lr=REX)
    scales = [group["lr_scale"] for group in opt.param_groups]
    assert set(scales) == SCALES
    for k in range(5):
        assert opt.current_lr() == pytest.approx([scale * REX(k) for scale in scales])
        update(model, opt)


@pytest.mark.parametrize("sched", ["cosine", "step", "tanh", "poly", "multistep"])
@pytest.mark.parametrize("updates", [False, True])
def test_its_schedulers_drive_groups_with_layer_decay(sched, updates):
    model, twin = Layers(), Layers()
    twin.load_state_dict(model.state_dict())
    ours, theirs = (cls(layer_groups(m), lr=0.1) for cls, m in
                    ((lrs_ext.SGD, model), (torch.optim.SGD, twin)))  # fmt: skip
    options = {
        "sched": sched,
        "num_epochs": 6,
        "warmup_epochs": 2,
        "warmup_lr": 1e-3,
        "decay_epochs": 2,
        "decay_milestones": [3, 5],
        "step_on_epochs": not updates,
        "updates_per_epoch": 3,
    }
    (scheduler, epochs), (other, _) = (create_scheduler(o, **options) for o in (ours, theirs))
    count, rates = 0, []
    for epoch in range(int(epochs)):
        for _ in range(3):
            update(model, ours)
            update(twin, theirs)
            count += 1
            scheduler.step_update(count)
            other.step_update(count)
            expected = [group["lr"] for group in theirs.param_groups]
            assert ours.current_lr() == pytest.approx(expected, rel=1e-6)
            rates.append(expected)
        scheduler.step(epoch + 1)
        other.step(epoch + 1)
    assert len({tuple(rate) for rate in rates}) > 2
    for rate in filter(max, rates):  # layer decay is in all but the last, which may be 0
        assert {round(lr / max(rate), 6) for lr in rate} == SCALES
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_its_plateau_scheduler_drives_too():
    model = Layers()
    opt = lrs_ext.SGD(layer_groups(model), lr=0.1)
    scheduler, _ = create_scheduler(opt, sched="plateau", patience_epochs=0, warmup_epochs=0)
    scales = [group["lr_scale"] for group in opt.param_groups]
    before = opt.current_lr()
    assert before == pytest.approx([0.1 * scale for scale in scales])
    for epoch in range(1, 4):
        update(model, opt)
        scheduler.step(epoch, metric=1.0)
    assert all(now < then for now, then in zip(opt.current_lr(), before, strict=True))


def test_state_of_its_scheduler_and_ours_resume_together():
    options = {"sched": "cosine", "num_epochs": 10, "step_on_epochs": False, "updates_per_epoch": 1}

    def start():
        torch.manual_seed(0)
        model = Layers()
        opt = lrs_ext.AdamW(layer_groups(model), lr=0.1)
        return model, opt, create_scheduler(opt, **options)[0]

    def train(run, first, last):
        model, opt, scheduler = run
        for k in range(first, last):
            update(model, opt)
            scheduler.step_update(k + 1)

    whole = start()
    train(whole, 0, 4)
    states = [part.state_dict() for part in whole]
    resumed = start()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    assert resumed[1].current_lr() == whole[1].current_lr()
    for run in (whole, resumed):
        train(run, 4, 9)
    for mine, its in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(mine, its)


def test_the_loop_of_the_page_in_docs_runs():
    names = {}
    for block in blocks("timm"):
        exec(compile(block, "docs/timm.md", "exec"), names)
    names["loop"](create_scheduler)
