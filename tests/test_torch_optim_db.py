"""What torch tests its own optimizers for, run on ours: torch's table of inputs and more."""

import copy
import inspect
import warnings

import cases
import pytest
import torch
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import lrs_ext

DB = {
    info.optim_cls.__name__: info
    for info in optim_db
    if info.optim_cls.__name__ in cases.OPTIMIZERS
}
optimizers = pytest.mark.parametrize("name", cases.OPTIMIZERS)
torch_optimizers = pytest.mark.parametrize("name", cases.TORCH_OPTIMIZERS)
OWN_KEYWORDS = {
    "backend": None,
    "state_dtype": torch.float32,
    "master_weights": False,
    "stochastic_rounding": False,
}


def optimizer_inputs():
    """Every input of torch's table; those for CUDA are no less valid on a CPU."""
    for name, info in DB.items():
        seen = []
        for device in ("cpu", "cuda"):
            for entry in info.optim_inputs_func(device=device):
                if str(entry.kwargs) not in seen:  # most are those for CPUs once more
                    seen.append(str(entry.kwargs))
                    yield pytest.param(name, entry.kwargs, id=f"{name}-{device}-{entry.desc}")


def error_inputs():
    for name, info in DB.items():
        for entry in info.optim_error_inputs_func("cpu", torch.float32):
            yield pytest.param(name, entry, id=f"{name}-{entry.optimizer_error_input.desc}")


def make_model(backend, contiguous=True):
    """Torch's own test model: layers that include a gradient of None and an empty parameter."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    ).to(backend.device)
    model.register_parameter("empty", torch.nn.Parameter(torch.empty(0, device=backend.device)))
    if not contiguous:
        for param in model.parameters():
            if param.dim() == 2:
                param.data = param.data.t().contiguous().t()
    return model


def to_device(kwargs, device):
    def move(value):
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {key: move(copy.deepcopy(value)) for key, value in kwargs.items()}


def train(model, opt, steps):
    inputs = torch.ones((1, 1), device=next(model.parameters()).device)
    for k in range(steps):
        opt.zero_grad()
        model(inputs).sum().backward()
        model.empty.grad = torch.empty_like(model.empty)
        if k == 3:
            opt.zero_grad()
        elif k == 5:
            model[0].weight.grad = None
        opt.step()


def assert_equal_training(models, opts):
    close = {"rtol": cases.TORCH.rtol, "atol": cases.TORCH.atol}
    for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(param, other, **close)
        state, expected = opts[0].state.get(param, {}), opts[1].state.get(other, {})
        assert set(state) == set(expected)
        for key, tensor in state.items():
            torch.testing.assert_close(tensor.cpu(), expected[key].cpu(), **close)


@pytest.mark.parametrize(("name", "kwargs"), list(optimizer_inputs()))
@pytest.mark.parametrize("impl", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_every_input_matches_the_loop_of_torch(backend, name, kwargs, impl):
    contiguous = "foreach" in impl
    models = [make_model(backend, contiguous) for _ in range(2)]
    ours, theirs = (to_device(kwargs, device) for device in (backend.device, "cpu"))
    theirs.pop("capturable", None)  # for CUDA only, and without a meaning for the numbers
    opts = [
        getattr(lrs_ext, name)(models[0].parameters(), backend=backend.name, **ours | impl),
        getattr(torch.optim, name)(models[1].parameters(), foreach=False, **theirs),
    ]
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 7)
    assert_equal_training(models, opts)


@pytest.mark.parametrize(("name", "entry"), list(error_inputs()))
def test_every_error_input_is_refused_as_in_torch(name, entry):
    params, kwargs = entry.optimizer_error_input.params, entry.optimizer_error_input.kwargs
    if params is None:
        params = [torch.nn.Parameter(torch.randn(1))]
    assert entry.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if "duplicate parameters" in entry.error_regex:
        # torch warns that this will be an error; one launch for all tensors cannot serve them.
        warned = pytest.warns(UserWarning, match=entry.error_regex)
        with warned, pytest.raises(ValueError, match=entry.error_regex):
            getattr(lrs_ext, name)(params, **kwargs)
        return
    with pytest.raises(entry.error_type, match=entry.error_regex):
        getattr(lrs_ext, name)(params, **kwargs)


def scheduler_lists():
    for name, info in DB.items():
        for i, schedulers in enumerate(info.scheduler_inputs):
            yield pytest.param(name, schedulers, id=f"{name}-{i}")


@pytest.mark.parametrize(("name", "schedulers"), list(scheduler_lists()))
def test_every_list_of_schedulers_matches_torch(backend, name, schedulers):
    models, opts = [make_model(backend) for _ in range(2)], []
    for model, module, own in zip(
        models, (lrs_ext, torch.optim), ({"backend": backend.name}, {"foreach": False}), strict=True
    ):
        groups = [
            {"params": [p for n, p in model.named_parameters() if "weight" in n]},
            {"params": [p for n, p in model.named_parameters() if "weight" not in n], "lr": 0.01},
        ]
        opts.append(getattr(module, name)(groups, lr=0.1, **own))
        attached = [scheduler(opts[-1]) for scheduler in schedulers]
        for _ in range(12):
            train(model, opts[-1], 1)
            for scheduler in attached:
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if plateau else []))
    assert [g["lr"] for g in opts[0].param_groups] == [g["lr"] for g in opts[1].param_groups]
    assert_equal_training(models, opts)


@torch_optimizers
def test_the_signature_is_that_of_torch_and_four_keywords(name):
    ours = dict(inspect.signature(getattr(lrs_ext, name)).parameters)
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    for keyword, default in OWN_KEYWORDS.items():
        parameter = ours.pop(keyword)
        assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, default)
    described = [{n: (p.kind, p.default) for n, p in s.items()} for s in (ours, theirs)]
    assert described[0] == described[1]
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


@torch_optimizers
def test_groups_defaults_and_state_dict_have_the_keys_and_values_of_torch(name):
    def make(module):
        return getattr(module, name)([torch.ones(3).requires_grad_()], lr=0.25)

    ours, theirs = make(lrs_ext), make(torch.optim)
    for group, expected in (
        (ours.param_groups[0], theirs.param_groups[0]),
        (ours.state_dict()["param_groups"][0], theirs.state_dict()["param_groups"][0]),
        (ours.defaults, theirs.defaults),
    ):
        assert {key: group[key] for key in expected if key != "params"} == {
            key: expected[key] for key in expected if key != "params"
        }
    assert ours.state_dict()["state"] == {}


@optimizers
def test_named_parameters_keep_their_names(name):
    params = [("a", torch.ones(3).requires_grad_()), ("b", torch.ones(2).requires_grad_())]
    opt = getattr(lrs_ext, name)(params, lr=lrs_ext.rex(0.1, 5))
    assert opt.param_groups[0]["param_names"] == ["a", "b"]
    unnamed = getattr(lrs_ext, name)([torch.ones(3), torch.ones(2)], lr=0.1)
    opt.load_state_dict(unnamed.state_dict())
    assert opt.param_groups[0]["param_names"] == ["a", "b"]
    unnamed.load_state_dict(opt.state_dict())
    assert unnamed.param_groups[0]["param_names"] == ["a", "b"]


@optimizers
def test_a_step_without_gradients_is_nothing(backend, name):
    model = make_model(backend)
    opt = getattr(lrs_ext, name)(model.parameters(), lr=lrs_ext.rex(0.1, 5), backend=backend.name)
    for _ in range(2):
        before = copy.deepcopy(model.state_dict())
        step, state = opt.schedule_buffer.step.item(), copy.deepcopy(opt.state_dict())
        lr = opt.param_groups[0]["lr"]
        assert opt.step() is None
        assert opt.step(lambda: 3.0) == 3.0
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert opt.schedule_buffer.step.item() == step
        assert opt.param_groups[0]["lr"] == lr
        assert str(opt.state_dict()) == str(state)
        train(model, opt, 3)
        opt.zero_grad()


@optimizers
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_gradients_and_frozen_parameters_stay_put(backend, name, set_to_none):
    params = [torch.ones(3, device=backend.device, requires_grad=flag) for flag in (True, False)]
    opt = getattr(lrs_ext, name)(params, lr=0.1, weight_decay=0.0, backend=backend.name)
    params[0].grad = torch.ones_like(params[0])
    opt.zero_grad(set_to_none=set_to_none)
    opt.step()
    assert all((param == 1).all() for param in params)
    assert opt.schedule_buffer.step.item() == (not set_to_none)
    assert params[1] not in opt.state
    params[1].requires_grad_().grad = torch.ones_like(params[1])
    opt.step()
    assert (params[1] < 1).all()


@optimizers
def test_a_closure_runs_with_gradients_and_its_loss_is_returned(backend, name):
    param = torch.ones(3, device=backend.device, requires_grad=True)
    opt = getattr(lrs_ext, name)([param], lr=0.1, backend=backend.name)

    def closure():
        opt.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [opt.step(closure).item() for _ in range(3)]
    assert losses[0] == 3.0
    assert losses == sorted(losses, reverse=True)


@optimizers
def test_hooks_run_around_steps_and_state_dicts(name):
    param = torch.ones((), requires_grad=True)
    opt, calls = getattr(lrs_ext, name)([param], lr=lrs_ext.rex(0.5, 9), weight_decay=0.0), []
    opt.register_step_pre_hook(lambda o, args, kwargs: calls.append((o, param.item() == 1)))
    opt.register_step_post_hook(lambda o, args, kwargs: calls.append((o, param.item() == 1)))
    opt.register_state_dict_pre_hook(lambda o: calls.append("save"))
    opt.register_state_dict_post_hook(lambda o, d: calls.append(sorted(d)[:1]))
    opt.register_load_state_dict_pre_hook(lambda o, d: calls.append("load"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    param.grad = torch.ones(())
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert calls[:2] == [(opt, True), (opt, False)]
    assert calls[2:] == ["save", ["param_groups"], "load", "loaded"]


@optimizers
def test_capturable_steps_do_not_warn_and_optimizers_can_be_printed(name):
    param = torch.ones(3, requires_grad=True)
    options = {} if name == "SGD" else {"capturable": True}
    opt = getattr(lrs_ext, name)([param], lr=lrs_ext.rex(0.5, 9), **options)
    param.grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert f"{name} (" in repr(opt)
    assert f"lr: {opt.param_groups[0]['lr']}" in repr(opt)


@optimizers
def test_autograd_notices_that_a_step_changed_the_parameters(backend, name):
    param = torch.ones(3, device=backend.device, requires_grad=True)
    opt = getattr(lrs_ext, name)([param], lr=0.5, backend=backend.name)
    for _ in range(2):
        loss = (param**2).sum()
        param.grad = torch.ones_like(param)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
