"""Mistakes: torch.optim's wording where it has the check, and nothing changed by a refused step."""

import re

import cases
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import lrs_ext

optimizers = pytest.mark.parametrize("name", cases.OPTIMIZERS)
WITH_EPS = ["Adam", "AdamW", "LAMB"]
WITH_BETAS = [*WITH_EPS, "Lion"]


def leaf(shape=(7,), device="cpu", dtype=torch.float32):
    return torch.ones(shape, device=device, dtype=dtype).requires_grad_()


# Mistakes that torch.optim refuses in the constructor: (optimizers, arguments for parameters a, b).

WITH_TORCH = {
    "a tensor": (cases.OPTIMIZERS, lambda a, b: (a, {})),
    "nothing": (cases.OPTIMIZERS, lambda a, b: ([], {})),
    "a set": (cases.OPTIMIZERS, lambda a, b: ([{"params": {a, b}}], {})),
    "a number": (cases.OPTIMIZERS, lambda a, b: ([a, 1.0], {})),
    "a non-leaf": (cases.OPTIMIZERS, lambda a, b: ([a * 2], {})),
    "two groups": (cases.OPTIMIZERS, lambda a, b: ([{"params": [a]}, {"params": [a, b]}], {})),
    "half named": (cases.OPTIMIZERS, lambda a, b: ([("a", a), b], {})),
    "negative lr": (cases.OPTIMIZERS, lambda a, b: ([a], {"lr": -0.1})),
    "negative tensor lr": (cases.OPTIMIZERS, lambda a, b: ([a], {"lr": torch.tensor(-0.1)})),
    "lr of two elements": (cases.OPTIMIZERS, lambda a, b: ([a], {"lr": torch.ones(2)})),
    "negative decay": (cases.OPTIMIZERS, lambda a, b: ([a], {"weight_decay": -0.1})),
    "fused and foreach": (cases.OPTIMIZERS, lambda a, b: ([a], {"fused": True, "foreach": True})),
    "negative momentum": (["SGD"], lambda a, b: ([a], {"momentum": -0.5})),
    "nesterov alone": (["SGD"], lambda a, b: ([a], {"nesterov": True})),
    "nesterov and dampening": (
        ["SGD"],
        lambda a, b: ([a], {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ),
    "nan lr": (WITH_BETAS, lambda a, b: ([a], {"lr": float("nan")})),
    "nan decay": (WITH_BETAS, lambda a, b: ([a], {"weight_decay": float("nan")})),
    "negative eps": (WITH_EPS, lambda a, b: ([a], {"eps": -1e-8})),
    "nan eps": (WITH_EPS, lambda a, b: ([a], {"eps": float("nan")})),
    "beta1 of one": (WITH_BETAS, lambda a, b: ([a], {"betas": (1.0, 0.9)})),
    "beta2 of one": (WITH_BETAS, lambda a, b: ([a], {"betas": (0.9, 1.0)})),
    "negative beta1": (WITH_BETAS, lambda a, b: ([a], {"betas": (-0.1, 0.9)})),
    "nan beta2": (WITH_BETAS, lambda a, b: ([a], {"betas": (0.9, float("nan"))})),
    "one tensor beta": (WITH_BETAS, lambda a, b: ([a], {"betas": (0.9, torch.tensor(0.99))})),
    "tensor lr and foreach": (
        WITH_BETAS,
        lambda a, b: ([a], {"lr": torch.tensor(0.1), "foreach": True}),
    ),
    "differentiable and fused": (
        cases.OPTIMIZERS,
        lambda a, b: ([a], {"fused": True, "differentiable": True}),
    ),
}
MISTAKES = [(name, mistake) for mistake, (names, _) in WITH_TORCH.items() for name in names]


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_constructors_refuse_what_torch_refuses_in_its_words(name, mistake):
    arguments = WITH_TORCH[mistake][1]
    params, options = arguments(leaf(), leaf())
    with pytest.raises((TypeError, ValueError, RuntimeError)) as theirs:
        getattr(torch.optim, name, torch.optim.AdamW)(params, **options)
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        getattr(lrs_ext, name)(params, **options)


@optimizers
@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -float("inf"), -1e-9])
def test_learning_rates_must_be_finite_and_not_negative(name, lr):
    for value in (lr, torch.tensor(lr)):
        with pytest.raises(ValueError, match="Invalid learning rate: "):
            getattr(lrs_ext, name)([leaf()], lr=value)


@optimizers
def test_learning_rates_must_be_numbers(name):
    with pytest.raises(TypeError):
        getattr(lrs_ext, name)([leaf()], lr="0.1")


@optimizers
def test_a_function_is_no_learning_rate_but_can_become_a_schedule(name):
    with pytest.raises(TypeError, match=r"or a Schedule, got <function .*from_function\(f, "):
        getattr(lrs_ext, name)([leaf()], lr=lambda step: 0.1)


@optimizers
def test_a_constructor_of_schedules_is_to_be_called(name):
    message = r"got <function rex .*: call a constructor, as lrs_ext.rex\(lr, total_steps\)"
    with pytest.raises(TypeError, match=message):
        getattr(lrs_ext, name)([leaf()], lr=lrs_ext.rex)
    param = leaf()
    opt = getattr(lrs_ext, name)([param], lr=0.5)
    opt.param_groups[0]["lr"] = lrs_ext.rex
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match=message):
        opt.step()
    assert (param == 1).all()


NO_NUMBERS = {
    "weight_decay": ("0.1", None, lrs_ext.rex),
    "eps": ("1e-8", None),
    "momentum": ("0.9", (0.85, 0.95), lrs_ext.one_cycle),
    "betas": (0.9, (0.9,), (0.9, 0.99, 0.999), "0.9,0.99", None, ("0.9", 0.99), (0.9, None)),
}


@optimizers
def test_what_is_no_number_is_refused_by_name(name):
    for option, values in NO_NUMBERS.items():
        for value in values:
            opt = getattr(lrs_ext, name)([leaf()], lr=0.1)
            if option not in opt.defaults:
                continue
            with pytest.raises(TypeError, match=f"{option} must be a (number|pair)"):
                getattr(lrs_ext, name)([leaf()], lr=0.1, **{option: value})
            with pytest.raises(TypeError, match=f"{option} must be a (number|pair)"):
                opt.add_param_group({"params": [leaf()], option: value})
            assert len(opt.param_groups) == 1


def test_betas_that_are_no_pair_change_nothing_at_a_step():
    param = leaf()
    opt = lrs_ext.AdamW([param], lr=0.5)
    opt.param_groups[0]["betas"] = 0.9
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match=r"betas must be a pair \(beta1, beta2\), got 0.9"):
        opt.step()
    assert (param == 1).all()
    assert int(opt.schedule_buffer.step) == 0


@pytest.mark.parametrize("option", ["momentum", "weight_decay"])
def test_options_of_sgd_that_are_nan_are_refused(option):
    with pytest.raises(ValueError, match=f"Invalid {option} value: nan"):
        lrs_ext.SGD([leaf()], **{option: float("nan")})


@optimizers
def test_differentiable_steps_are_refused(name):
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        getattr(lrs_ext, name)([leaf()], differentiable=True)


@optimizers
@pytest.mark.parametrize("dtype", cases.REFUSED_DTYPES, ids=str)
def test_parameters_of_other_dtypes_are_refused(backend, name, dtype):
    optimizer, bad = getattr(lrs_ext, name), torch.ones(7, dtype=dtype, device=backend.device)
    message = (
        r"requires all the params to be floating point Tensors of .*float32.*bfloat16.*float16"
    )
    with pytest.raises(RuntimeError, match=message) as error:
        optimizer([leaf(device=backend.device), bad], backend=backend.name)
    assert str(dtype) in str(error.value)
    good = leaf(device=backend.device)
    opt = optimizer([good], lr=0.5, backend=backend.name)
    with pytest.raises(RuntimeError, match=message):
        opt.add_param_group({"params": [bad]})
    assert [group["params"] for group in opt.param_groups] == [[good]]
    good.grad = torch.ones_like(good)
    opt.step()
    assert (good < 1).all()


OVERLAPPING = {
    "overlaps": lambda x: x.expand(3, 7),
    "windows": lambda x: x.as_strided((3, 4), (1, 1)),
}


@optimizers
@pytest.mark.parametrize("view", OVERLAPPING)
def test_parameters_with_overlaps_are_refused(backend, name, view):
    param = OVERLAPPING[view](torch.ones(7, device=backend.device)).requires_grad_()
    param.grad = torch.ones(param.shape, device=backend.device)
    with pytest.raises(RuntimeError, match=r"\.contiguous\(\)"):
        getattr(lrs_ext, name)([param], backend=backend.name).step()
    assert (param == 1).all()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch._mkldnn], ids=str)
def test_parameters_that_are_not_strided_are_refused(layout):
    dense = torch.eye(3)
    data = dense.to_mkldnn() if layout == torch._mkldnn else dense.to_sparse(layout=layout)
    with pytest.raises(RuntimeError, match=rf"of layout {layout}, only .*\.to_dense\(\)"):
        lrs_ext.AdamW([leaf(), torch.nn.Parameter(data)])


def test_a_lazy_module_needs_a_batch_first():
    model = torch.nn.LazyLinear(2)
    with pytest.raises(RuntimeError, match=r"no shape yet: pass a batch .* before AdamW is made"):
        lrs_ext.AdamW(model.parameters())
    model(torch.ones(1, 3))
    lrs_ext.AdamW(model.parameters())


def test_a_gradient_that_wraps_others_is_refused(backend):
    param = leaf(device=backend.device)
    opt = lrs_ext.AdamW([param], backend=backend.name)
    parts = torch.ones_like(param), torch.ones_like(param)
    param.grad = TwoTensor(*parts)
    with pytest.raises(RuntimeError, match="AdamW does not support TwoTensor gradients yet"):
        opt.step()
    assert (param == 1).all()
    param.grad = parts[0]
    opt.step()
    assert (param < 1).all()


@optimizers
@pytest.mark.parametrize("apart", [False, True], ids=["one group", "two groups"])
def test_every_device_needs_a_backend(name, apart):
    params = [leaf(), leaf(device="meta")]
    groups = [{"params": [p]} for p in params] if apart else params
    with pytest.raises(RuntimeError, match=r"on meta have no memory, .* after it"):
        getattr(lrs_ext, name)(groups)


def test_a_frozen_parameter_of_another_dtype_is_to_be_left_out():
    # As of a model with quantised weights, of which adapters are trained.
    quantised = torch.nn.Parameter(torch.ones(7, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"uint8: leave it out.*that require a gradient"):
        lrs_ext.AdamW([leaf(), quantised])
    with pytest.raises(RuntimeError, match=r"float64: use torch\.optim"):
        lrs_ext.AdamW([leaf(dtype=torch.float64)])


# Backends.


@pytest.mark.parametrize("place", ["keyword", "environment"])
def test_unknown_backends_are_refused_with_the_list(monkeypatch, place):
    options = {"backend": "tpu"} if place == "keyword" else {}
    if place == "environment":
        monkeypatch.setenv("LRS_EXT_BACKEND", "tpu")
    with pytest.raises(ValueError, match="tpu") as error:
        lrs_ext.SGD([leaf()], **options)
    for backend in {backend.name for backend in cases.BACKENDS}:
        assert backend in str(error.value)


@pytest.mark.parametrize("place", ["keyword", "environment"])
def test_a_backend_for_another_device_is_refused(monkeypatch, place):
    options = {"backend": "cuda"} if place == "keyword" else {}
    if place == "environment":
        monkeypatch.setenv("LRS_EXT_BACKEND", "cuda")
    with pytest.raises((RuntimeError, ValueError), match=r"cuda.*cpu"):
        lrs_ext.SGD([leaf()], **options)


@pytest.mark.gpu
def test_the_cpu_backend_refuses_parameters_on_a_gpu():
    with pytest.raises((RuntimeError, ValueError), match=r"cpu.*cuda"):
        lrs_ext.SGD([leaf(device="cuda")], backend="cpu")


def test_the_environment_picks_the_backend_at_run_time(monkeypatch, backend):
    assert lrs_ext.SGD([leaf()]).backend == "cpu"
    monkeypatch.setenv("LRS_EXT_BACKEND", backend.name)
    assert lrs_ext.SGD([leaf(device=backend.device)]).backend == backend.name
    assert lrs_ext.SGD([leaf(device=backend.device)], backend=backend.name).backend == backend.name


# Mistakes found by a step or a load: parameters, states and counts stay, and a correct step goes on
# as if nothing had happened. `bad` is the first parameter of the second group.


def set_lr(value):
    return lambda opt, bad: opt.param_groups[1].update(lr=value)


def set_grad(make):
    return lambda opt, bad: setattr(bad, "grad", make(bad.grad))


def set_grad_of_another_dtype(opt, bad):
    bad.grad_dtype = None
    bad.grad = bad.grad.half()


def set_data(make):
    """Gradients go along, as with `Module.to`."""

    def change(opt, bad):
        grad, bad.grad = bad.grad, None
        bad.data = make(bad.data)
        bad.grad = make(grad)

    return change


def set_state(make):
    def change(opt, bad):
        name = next(name for name in opt.state[bad] if name != "step")
        opt.state[bad][name] = make(opt.state[bad][name])

    return change


LR, FLOATING = "Invalid learning rate: ", "floating point Tensors of"
STEP_MISTAKES = {
    "nan lr": (ValueError, LR, set_lr(float("nan"))),
    "infinite lr": (ValueError, LR, set_lr(float("inf"))),
    "negative lr": (ValueError, LR, set_lr(-0.1)),
    "lr of two elements": (ValueError, "Tensor lr must be 1-element", set_lr(torch.ones(2))),
    "text lr": (TypeError, r"learning rate|lr", set_lr("0.1")),
    "sparse gradient": (
        RuntimeError,
        "does not support sparse gradients",
        set_grad(lambda g: g.to_sparse()),
    ),
    "double parameter": (RuntimeError, FLOATING, set_data(lambda p: p.double())),
    "half gradient": (RuntimeError, "float16.*float32", set_grad_of_another_dtype),
    "parameter with overlaps": (
        RuntimeError,
        r"\.contiguous\(\)",
        set_data(lambda p: p[:1].clone().expand(p.shape)),
    ),
    "larger parameter": (RuntimeError, r"shape|size", set_data(lambda p: torch.cat([p] * 99))),
    "gradient of a smaller parameter": (
        RuntimeError,
        r"shape|size",
        lambda opt, bad: setattr(bad, "data", torch.cat([bad.data] * 99)),
    ),
    "smaller state": (RuntimeError, r"shape|size", set_state(lambda s: s[:3])),
}


class Run:
    """An optimizer of two groups after two updates."""

    def __init__(self, name, backend):
        torch.manual_seed(0)
        self.params = [leaf((n,), backend.device) for n in (5, 300, 7, 4)]
        options = {"SGD": {"momentum": 0.9}, "AdamW": {"amsgrad": True}}.get(name, {})
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.02}]
        rex = lrs_ext.rex(0.1, 10)
        self.opt = getattr(lrs_ext, name)(groups, lr=rex, backend=backend.name, **options)
        self.update()
        self.update()

    def update(self):
        for param in self.params:
            param.grad = torch.randn_like(param)
        self.opt.step()

    def tensors(self):
        states = [t for p in self.params for t in self.opt.state[p].values()]
        return [*(param.detach() for param in self.params), *states, self.opt.schedule_buffer.step]


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion", "LAMB"])
@pytest.mark.parametrize("mistake", STEP_MISTAKES)
def test_a_refused_step_changes_nothing(backend, name, mistake):
    error, message, make_mistake = STEP_MISTAKES[mistake]
    spared, run = Run(name, backend), Run(name, backend)
    bad, group = run.params[2], run.opt.param_groups[1]
    data, grad, lr, state = bad.data, bad.grad, group["lr"], dict(run.opt.state[bad])
    make_mistake(run.opt, bad)
    for _ in range(2):
        with pytest.raises(error, match=message):
            run.opt.step()
    bad.grad, bad.data, group["lr"] = None, data, lr
    bad.grad = grad
    run.opt.state[bad].update(state)
    assert equal(run.tensors(), spared.tensors())
    for _ in range(2):
        for a, b in zip(run.params, spared.params, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        run.opt.step()
        spared.opt.step()
        assert equal(run.tensors(), spared.tensors())
        assert run.opt.param_groups[0]["lr"] == spared.opt.param_groups[0]["lr"]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion", "LAMB"])
def test_a_refused_load_changes_nothing(backend, name):
    spared, run = Run(name, backend), Run(name, backend)
    fewer_groups, fewer_params = run.opt.state_dict(), run.opt.state_dict()
    fewer_groups["param_groups"] = fewer_groups["param_groups"][:1]
    fewer_params["param_groups"][1]["params"] = fewer_params["param_groups"][1]["params"][:1]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        run.opt.load_state_dict(fewer_groups)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        run.opt.load_state_dict(fewer_params)
    assert equal(run.tensors(), spared.tensors())
    torch.manual_seed(1)
    run.update()
    torch.manual_seed(1)
    spared.update()
    assert equal(run.tensors(), spared.tensors())


def test_a_closure_that_fails_changes_nothing(backend):
    def closure():
        raise KeyError("data")

    spared, run = Run("AdamW", backend), Run("AdamW", backend)
    with pytest.raises(KeyError, match="data"):
        run.opt.step(closure)
    assert equal(run.tensors(), spared.tensors())


# How states and parameters are kept.

STORAGE_MISTAKES = {
    "state_dtype must be torch.float32, torch.bfloat16 or torch.uint8 (8-bit blocks), got "
    "torch.float16": {"state_dtype": torch.float16},
    "got torch.int8": {"state_dtype": torch.int8},
    "nothing for stochastic_rounding to do: choose one": {
        "master_weights": True,
        "stochastic_rounding": True,
    },
}


@pytest.mark.parametrize("name", cases.STORING_OPTIMIZERS)
@pytest.mark.parametrize("message", STORAGE_MISTAKES)
def test_storages_that_do_not_exist_are_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(lrs_ext, name)([leaf()], **STORAGE_MISTAKES[message])


FLOAT16 = "float16 parameters are rounded to nearest and have float32 states: leave state_dtype"


@pytest.mark.parametrize("name", cases.STORING_OPTIMIZERS)
@pytest.mark.parametrize("row", cases.STORAGES[1:], ids=str)
def test_float16_parameters_have_one_storage(name, row):
    half = leaf(dtype=torch.float16)
    with pytest.raises(ValueError, match=FLOAT16):
        getattr(lrs_ext, name)([leaf(), half], **row.options)
    opt = getattr(lrs_ext, name)([leaf()], **row.options)
    with pytest.raises(ValueError, match=FLOAT16):
        opt.add_param_group({"params": [half]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("row", cases.STORAGES[3:], ids=str)
def test_amsgrad_needs_float32_states(name, row):
    message = "max_exp_avg_sq needs float32 states: use state_dtype=torch.float32 or no amsgrad"
    with pytest.raises(ValueError, match=message):
        getattr(lrs_ext, name)([leaf()], amsgrad=True, **row.options)
    opt = getattr(lrs_ext, name)([leaf()], **row.options)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [leaf()], "amsgrad": True})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("change", ["amsgrad", "float16"])
def test_a_storage_that_no_longer_fits_is_refused_by_the_step(change):
    param = leaf()
    opt = lrs_ext.AdamW([param], lr=0.1, state_dtype=torch.uint8)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        opt.step()
    if change == "amsgrad":
        opt.param_groups[0]["amsgrad"] = True
    else:
        param.grad = None
        param.data = param.data.half()
        param.grad = torch.ones_like(param)
    before, state = param.detach().clone(), {n: t.clone() for n, t in opt.state[param].items()}
    with pytest.raises(ValueError, match="float32 states"):
        opt.step()
    assert torch.equal(param, before)
    assert state.keys() == opt.state[param].keys()
    assert all(torch.equal(t, opt.state[param][n]) for n, t in state.items())
    assert opt.schedule_buffer.step.item() == 2


@optimizers
def test_the_place_of_the_position_is_taken(name):
    make = getattr(lrs_ext, name)
    with pytest.raises(ValueError, match=r"under 'schedule', got 'cosine' there: pass a schedule"):
        make([{"params": [leaf()], "schedule": "cosine"}], lr=0.1)
    opt = make([leaf()], lr=0.1)
    with pytest.raises(ValueError, match="got 7 there"):
        opt.add_param_group({"params": [leaf()], "schedule": 7})
    assert len(opt.param_groups) == 1
    make(opt.param_groups, lr=0.1)  # with the notes that are there
    [param] = opt.param_groups[0]["params"]
    opt.param_groups[0]["schedule"] = "cosine"  # nobody's position
    param.grad = torch.ones_like(param)
    opt.step()
    assert opt.param_groups[0]["lr"] == 0.1
