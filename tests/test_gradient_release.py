"""step_in_backward: the same numbers as a step after the backward pass, without the gradients."""

import gc
import threading
import time
import weakref

import cases
import pytest
import torch

import lrs_ext
from lrs_ext.preparation import Preparation

STEPS = 5
rows = pytest.mark.parametrize("row", [*cases.STATE_UPDATES, *cases.UPDATES[-3:]], ids=str)


def make_model(backend):
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(*layers).to(backend.device)


def make(backend, row, **options):
    model = make_model(backend)
    groups = [
        {"params": model[0].parameters(), "lr": lrs_ext.rex(row.lr, 8, warmup_steps=2)},
        {"params": [*model[2].parameters(), *model[3].parameters()], "lr": row.lr},
    ]
    options = row.options | options
    return model, getattr(lrs_ext, row.name)(groups, backend=backend.name, **options)


def train(model, opt, steps=STEPS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(8, 4, generator=generator).to(device)).square().mean().backward()
        opt.step()


def assert_same(models, opts):
    for ours, expected in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, expected)
        for name, value in opts[1].state.get(expected, {}).items():
            assert torch.equal(opts[0].state[ours][name], value)
    assert opts[0].schedule_buffer.step.item() == opts[1].schedule_buffer.step.item()
    lrs = [[group["lr"] for group in opt.param_groups] for opt in opts]
    assert lrs[0] == lrs[1]


@rows
def test_released_gradients_give_the_same_training(backend, row):
    models, opts = zip(*(make(backend, row) for _ in range(2)), strict=True)
    opts[0].step_in_backward()
    for model, opt in zip(models, opts, strict=True):
        train(model, opt)
    assert all(param.grad is None for param in models[0].parameters())
    assert_same(models, opts)


@pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
def test_every_storage_draws_the_same_random_bits(backend, storage):
    row = next(row for row in cases.UPDATES if row.name == "AdamW")
    models, opts = zip(*(make(backend, row, **storage.options) for _ in range(2)), strict=True)
    opts[0].step_in_backward()
    for model, opt in zip(models, opts, strict=True):
        model.bfloat16()
        for _ in range(3):
            opt.zero_grad()
            inputs = torch.ones(8, 4, dtype=torch.bfloat16, device=backend.device)
            model(inputs).square().mean().backward()
            opt.step()
    assert_same(models, opts)


def test_gradients_are_freed_one_by_one(backend):
    model, opt = make(backend, cases.UPDATES[0])
    opt.step_in_backward()
    alive = []

    def count(param):
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)  # after the release
    train(model, opt, steps=1)
    assert alive == [0] * len(list(model.parameters()))


def test_a_frozen_layer_and_one_without_gradients_take_no_part(backend):
    row = cases.UPDATES[7]
    model, opt = make(backend, row)
    model[3].requires_grad_(False)
    opt.step_in_backward()
    before = [param.clone() for param in model[3].parameters()]
    train(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(before, model[3].parameters(), strict=True))
    assert opt.schedule_buffer.step.item() == STEPS
    opt.step()  # nothing has been released since
    assert opt.schedule_buffer.step.item() == STEPS


def test_what_has_a_gradient_left_is_updated_by_the_step(backend):
    models, opts = zip(*(make(backend, cases.UPDATES[7]) for _ in range(2)), strict=True)
    extra = []
    for opt in opts:
        # A view with gaps, and a gradient that no backward pass makes.
        strided = torch.zeros(4, 6, device=backend.device)[:, ::2].requires_grad_()
        dense = torch.zeros(3, device=backend.device, requires_grad=True)
        opt.add_param_group({"params": [strided, dense], "lr": 0.1})
        extra.append([strided, dense])
    opts[0].step_in_backward()
    for model, opt, (strided, dense) in zip(models, opts, extra, strict=True):
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            opt.zero_grad()
            inputs = torch.randn(8, 4, generator=generator).to(backend.device)
            (model(inputs).square().mean() + (strided - 1).square().sum()).backward()
            dense.grad = torch.ones_like(dense)
            opt.step()
    assert torch.equal(extra[0][0], extra[1][0])
    assert torch.equal(extra[0][1], extra[1][1])
    assert_same(models, opts)


def test_removing_the_handle_ends_it(backend):
    models, opts = zip(*(make(backend, cases.UPDATES[7]) for _ in range(2)), strict=True)
    handle = opts[0].step_in_backward()
    with pytest.raises(RuntimeError, match="in force already: remove"):
        opts[0].step_in_backward()
    train(models[0], opts[0], 2)
    handle.remove()
    train(models[0], opts[0], 2, seed=3)
    assert all(param.grad is not None for param in models[0].parameters())
    train(models[1], opts[1], 2)
    train(models[1], opts[1], 2, seed=3)
    assert_same(models, opts)
    opts[0].step_in_backward()


def test_a_checkpoint_goes_on(backend, tmp_path):
    models, opts = zip(*(make(backend, cases.UPDATES[7]) for _ in range(2)), strict=True)
    for opt in opts:
        opt.step_in_backward()
    train(models[0], opts[0])
    torch.save((models[0].state_dict(), opts[0].state_dict()), tmp_path / "checkpoint")
    train(models[1], opts[1], 1, seed=4)  # something to overwrite
    state = torch.load(tmp_path / "checkpoint", weights_only=True)
    models[1].load_state_dict(state[0])
    opts[1].load_state_dict(state[1])
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, seed=5)
    assert_same(models, opts)


def test_an_update_at_a_learning_rate_of_0_counts():
    param = torch.nn.Parameter(torch.ones(3))
    opt = lrs_ext.SGD([param], lr=0.0, weight_decay=lrs_ext.linear(1.0, total_steps=4))
    opt.step_in_backward()
    param.sum().backward()
    opt.step()
    assert opt.schedule_buffer.step.item() == 1
    assert opt.param_groups[0]["weight_decay"] == 0.75


def test_gradients_cannot_be_accumulated():
    param = torch.ones(3, requires_grad=True)
    opt = lrs_ext.SGD([param], lr=0.5)
    opt.step_in_backward()
    param.sum().backward()
    with pytest.raises(RuntimeError, match="call step\\(\\) after every backward"):
        param.sum().backward()


def test_released_gradients_can_be_neither_clipped_nor_unscaled():
    param = torch.ones(3, requires_grad=True)
    opt = lrs_ext.SGD([param], lr=0.5)
    handle = opt.step_in_backward()
    with pytest.raises(RuntimeError, match="cannot be clipped together"):
        lrs_ext.clip_grad_norm_(opt, 1.0)
    param.sum().backward()
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="no longer be unscaled or clipped"):
        opt.step()
    handle.remove()


def test_hooks_do_not_keep_the_optimizer_alive():
    param = torch.ones(3, requires_grad=True)
    opt = lrs_ext.SGD([param], lr=0.5)
    opt.step_in_backward()
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    param.sum().backward()
    assert torch.equal(param, torch.ones(3))
    assert torch.equal(param.grad, torch.ones(3))


def test_the_threads_of_a_backward_pass_wait_for_each_other(monkeypatch):
    """There is one for each device."""
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    opt = lrs_ext.SGD(params, lr=0.5)
    opt.step_in_backward()
    single, inside, most = Preparation.single, [], []

    def watched(self, param, *args):
        inside.append(param)
        most.append(len(inside))
        time.sleep(0.02)
        table = single(self, param, *args)
        inside.pop()
        return table

    monkeypatch.setattr(Preparation, "single", watched)
    threads = [threading.Thread(target=param.sum().backward) for param in params]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]
    assert all(torch.equal(param, torch.full((3,), 0.5)) for param in params)


@pytest.mark.gpu
def test_new_numbers_of_a_group_reach_parameters_on_all_streams_of_the_forward_pass():
    params = [torch.nn.Parameter(torch.ones(8, device="cuda")) for _ in range(2)]
    opt = lrs_ext.SGD(params, lr=0.0)
    opt.step_in_backward()
    main, sides = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in params]
    for lr in (0.0, 1.0):
        opt.param_groups[0].update(lr=lr, weight_decay=lr)
        losses = []
        for side, param in zip(sides, params, strict=True):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                product = param * 2.0
                # What comes first in the backward pass, and writes the numbers, comes late.
                product.register_hook(lambda grad: torch.cuda._sleep(10_000_000))
                losses.append(product.sum())
        for side in sides:
            main.wait_stream(side)
        sum(losses).backward()
        opt.step()
    for param in params:
        assert torch.equal(param, torch.full_like(param, -2.0))


@pytest.mark.two_gpus
def test_new_numbers_of_a_group_do_not_reach_a_pending_step_on_another_gpu():
    """The thread of one GPU has the default stream of the other."""
    params = [torch.nn.Parameter(torch.ones(8, device=f"cuda:{index}")) for index in range(2)]
    opt = lrs_ext.SGD(params, lr=1.0)
    opt.step_in_backward()
    streams = [torch.cuda.Stream(param.device) for param in params]
    for index in range(2):
        torch.cuda.synchronize(index)
    with torch.cuda.stream(streams[1]), torch.cuda.stream(streams[0]):
        for lr in (1.0, 2.0, 4.0):
            opt.param_groups[0]["lr"] = lr
            first = params[0] * 2.0
            first.register_hook(lambda grad: torch.cuda._sleep(100_000_000))
            (first.sum().to("cuda:1") + (params[1] * 2.0).sum()).backward()
            opt.step()
    for index, param in enumerate(params):
        torch.cuda.synchronize(index)
        assert param.tolist() == [-13.0] * 8
