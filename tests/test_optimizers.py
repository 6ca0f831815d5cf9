"""Every update on every backend, storage type and memory layout against the float64 oracle."""

import copy
import inspect

import cases
import pytest
import reference
import torch
from plain_optimizers import plain_optimizer

import lrs_ext
from lrs_ext import _C

# Triton's interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
updates = pytest.mark.parametrize("row", cases.UPDATES, ids=str)
state_updates = pytest.mark.parametrize("row", cases.STATE_UPDATES, ids=str)
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
optimizers = pytest.mark.parametrize("name", cases.OPTIMIZERS)


def leaf(tensor, backend, dtype=torch.float32):
    """A leaf with the tensor's strides, whatever they are."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=backend.device)
    return empty.copy_(tensor).requires_grad_()


def randn_params(shapes, backend, dtype=torch.float32):
    return [leaf(torch.randn(shape), backend, dtype) for shape in shapes]


def make(row, params, backend, lr=None, **options):
    options = {"lr": lr or row.lr, "backend": backend.name} | row.options | options
    return getattr(lrs_ext, row.name)(params, **options)


def assert_close(actual, expected, tolerance):
    actual, expected = actual.detach(), expected.detach().to(actual.dtype)
    close = {"rtol": tolerance.rtol, "atol": tolerance.atol, "equal_nan": True}
    torch.testing.assert_close(actual.cpu().double(), expected.cpu().double(), **close)


class Oracle:
    """Compares each update with the oracle's, made from the numbers found before it.

    Equal starts keep the tolerances one rounding wide. The oracle counts updates itself.
    """

    def __init__(self, name, opt, state_tolerance=cases.STATE):
        self.update, self.opt, self.counts = reference.UPDATES[name], opt, {}
        self.state_tolerance = state_tolerance

    def step(self, lrs, options):
        """Steps once; `lrs` and `options` are lists, one entry a group."""
        groups = [group["params"] for group in self.opt.param_groups]
        before = [[self.snapshot(param) for param in params] for params in groups]
        self.opt.step()
        for params, snapshots, lr, own in zip(groups, before, lrs, options, strict=True):
            for param, snapshot in zip(params, snapshots, strict=True):
                self.compare(param, *snapshot, {"lr": float(torch.tensor(lr)), **own})

    def snapshot(self, param):
        grad = None if param.grad is None else param.grad.detach().clone()
        state = {n: t.detach().cpu().double() for n, t in self.opt.state.get(param, {}).items()}
        if param not in self.counts:
            state = {}
        elif "step" in state:
            state["step"] = torch.tensor(float(self.counts[param]))
        return param.detach().clone(), grad, state

    def compare(self, param, before, grad, state, options):
        actual = self.opt.state.get(param, {})
        if grad is None:
            assert torch.equal(param, before)
            assert set(actual) == set(state)
            return
        assert torch.equal(param.grad, grad)
        self.counts[param] = self.counts.get(param, 0) + 1
        before, grad = before.cpu().double(), grad.cpu().double()
        expected, expected_state = self.update(before, grad, state, **options)
        assert_close(param, expected, cases.PARAM[param.dtype])
        assert set(actual) == set(expected_state)
        for name, tensor in actual.items():
            assert tensor.dtype == torch.float32
            assert tensor.device == param.device
            tolerance = cases.EXACT if name == "step" else self.state_tolerance
            assert_close(tensor, expected_state[name], tolerance)


def set_gradients(params, skip=()):
    for i, param in enumerate(params):
        param.grad = None if i in skip else torch.randn_like(param)


class Torch:
    """The same parameters in an optimizer of plain torch, stepped with the same gradients."""

    def __init__(self, row, params):
        self.params = params
        self.twins = [param.detach().clone() for param in params]
        options = {"lr": row.lr, "foreach": False} | row.options
        self.opt = plain_optimizer(row.name)(self.twins, **options)

    def step(self, opt, states=True):
        for param, twin in zip(self.params, self.twins, strict=True):
            twin.grad = None if param.grad is None else param.grad.clone()
        opt.step()
        self.opt.step()
        for param, twin in zip(self.params, self.twins, strict=True):
            assert_close(param, twin, cases.TORCH)
            ours, theirs = opt.state.get(param, {}), self.opt.state.get(twin, {})
            assert set(ours) == set(theirs)
            for name, tensor in ours.items() if states else ():
                assert_close(tensor, theirs[name], cases.TORCH)


# The matrix.


def test_every_public_and_every_native_update_has_rows_and_an_oracle():
    public = [getattr(lrs_ext, name) for name in lrs_ext.__all__]
    classes = [c for c in public if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
    names = {optimizer.__name__ for optimizer in classes}
    rows = {row.name for row in cases.UPDATES}
    assert names == rows == set(reference.UPDATES) == set(cases.OPTIMIZERS)
    assert {optimizer.algorithm for optimizer in classes} == set(_C.algorithms)


@updates
def test_the_oracle_agrees_with_torch_in_float64(row):
    params = [torch.randn(shape, dtype=torch.float64) for shape in cases.SHAPES]
    oracles = [(param.clone(), {}) for param in params]
    opt = plain_optimizer(row.name)(params, lr=row.lr, foreach=False, **row.options)
    for _ in range(cases.STEPS):
        set_gradients(params)
        opt.step()
        for i, param in enumerate(params):
            update = reference.UPDATES[row.name]
            oracles[i] = update(oracles[i][0], param.grad, oracles[i][1], lr=row.lr, **row.options)
            torch.testing.assert_close(param, oracles[i][0], rtol=1e-14, atol=1e-14)


@updates
@dtypes
def test_every_update_matches_the_oracle(backend, row, dtype):
    shapes = cases.INTERPRETED_SHAPES if backend.interpreted else cases.SHAPES
    params = randn_params(shapes, backend, dtype)
    rex = {"total_steps": cases.STEPS, "warmup_steps": 2, "min_lr": 0.001}
    opt = make(row, params, backend, lrs_ext.rex(row.lr, **rex))
    oracle = Oracle(row.name, opt)
    for k in range(cases.STEPS + 1):
        set_gradients(params, skip=[(k + 2) % len(params), 4] if k < 3 else [])
        oracle.step([reference.schedule("rex", k, lr=row.lr, **rex)], [row.options])


@updates
def test_trajectories_match_torch(backend, row):
    params = randn_params(cases.INTERPRETED_SHAPES, backend)
    opt, theirs = make(row, params, backend), Torch(row, params)
    for k in range(cases.STEPS):
        set_gradients(params, skip=[k % len(params), 4] if k < 3 else [])
        theirs.step(opt)


@pytest.mark.parametrize("magnitude", [1e-12, 1e-4, 1e4, 1e12])
@state_updates
def test_gradients_of_any_magnitude(backend, row, magnitude):
    params = randn_params([(33,)], backend)
    lr = 0.01 / magnitude if row.name == "SGD" else 0.01
    own = row.options | {"weight_decay": 0.0}
    opt = make(row, params, backend, lr, **own)
    oracle = Oracle(row.name, opt, cases.Tolerance(cases.STATE.rtol, atol=0.0))
    for _ in range(3):
        params[0].grad = (torch.rand_like(params[0]) + 0.5) * magnitude
        oracle.step([lr], [own])


@updates
def test_gradients_that_are_not_finite_spread_as_in_torch(backend, row):
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1e-30, 1e30]
    params = randn_params([(8,)], backend)
    opt, theirs = make(row, params, backend), Torch(row, params)
    for values in (special, [1.0] * 8, special[::-1]):
        params[0].grad = torch.tensor(values, device=backend.device)
        theirs.step(opt, states=False)


# Storage.


def assert_same_bits(actual, expected, backend):
    """Triton's interpreter truncates to bfloat16 and garbles its subnormals; on a GPU it rounds."""
    bits, expected_bits = (x.detach().cpu().view(torch.int16).int() for x in (actual, expected))
    difference = (bits - expected_bits).abs()
    if backend.interpreted and expected.dtype == torch.bfloat16:
        assert (
            difference[expected.abs() >= torch.finfo(expected.dtype).smallest_normal] <= 1
        ).all()
    else:
        assert not difference.any()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "LAMB"])
def test_an_eps_below_the_normal_floats_moves_nothing_without_a_gradient(backend, name):
    """Its reciprocal is no float32, and infinity times 0 would be nan."""
    param = leaf(torch.ones(300), backend)
    opt = getattr(lrs_ext, name)([param], eps=1e-40, weight_decay=0.0, backend=backend.name)
    param.grad = torch.zeros_like(param)
    opt.step()
    assert param.eq(1.0).all()


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_storing_rounds_to_nearest_even_to_the_bit(backend, dtype):
    scales = 2.0 ** torch.randint(-4, 4, (2, 3000))
    param, grad = (torch.randn(2, 3000) * scales).to(dtype)
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    param[:100], grad[:100] = tiny * torch.rand(100), tiny * torch.rand(100)
    param[100:104] = torch.tensor([huge, -huge, huge, 0.0])
    grad[100:104] = torch.tensor([-huge / 4096, huge / 4096, -huge / 2, -huge])
    params = [leaf(param, backend, dtype)]
    params[0].grad = grad.to(backend.device)
    lrs_ext.SGD(params, lr=1.0, backend=backend.name).step()
    assert_same_bits(params[0], (param.float() - grad.float()).to(dtype), backend)


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_every_number_survives_a_zero_gradient(backend, dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = patterns[~patterns.isnan()]
    params = [leaf(numbers, backend, dtype)]
    params[0].grad = torch.zeros_like(params[0])
    lrs_ext.SGD(params, lr=0.5, backend=backend.name).step()
    assert_same_bits(params[0], numbers, backend)


# Memory layouts.

LAYOUTS = {
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 2, 5).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(6, 19).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "columns with gaps": lambda: torch.randn(6, 8)[:, ::2],
    "rows with gaps": lambda: torch.randn(6, 300)[:, :257],
    "transposed with gaps": lambda: torch.randn(5, 4, 6)[1:, :, 2].t(),
    "odd strides of size-1 dims": lambda: torch.randn(5).as_strided((1, 5, 1), (77, 1, 13)),
}
GRADIENTS = {
    "contiguous": lambda g: g.contiguous(),
    "as the parameter": lambda g: g,
    "reversed": lambda g: g.mT.contiguous().mT,
    "with gaps": lambda g: torch.stack([g, torch.full_like(g, 99.0)], dim=-1)[..., 0],
    "expanded": lambda g: g.flatten()[:1].reshape([1] * g.dim()).expand(g.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", cases.STATE_UPDATES[1::2], ids=str)
def test_dense_layouts_with_gradients_of_any_layout(backend, row, layout, gradient):
    params = [leaf(LAYOUTS[layout](), backend), *randn_params([(3,)], backend)]
    opt = make(row, params, backend)
    oracle = Oracle(row.name, opt)
    for _ in range(3):
        set_gradients(params)
        params[0].grad = GRADIENTS[gradient](params[0].grad)
        oracle.step([row.lr], [row.options])


@dtypes
@pytest.mark.parametrize("row", [*cases.STATE_UPDATES, cases.UPDATES[-1]], ids=str)
def test_gaps_between_elements_keep_their_contents(backend, row, dtype):
    base = torch.randn(9, 11).to(backend.device, dtype)
    before, inside = base.clone(), torch.zeros(9, 11, dtype=torch.bool)
    view = (slice(1, 8, 2), slice(2, 9, 3))
    inside[view] = True
    params = [base[view].detach().requires_grad_(), base[0].detach().requires_grad_()]
    inside[0] = True
    opt = make(row, params, backend)
    oracle = Oracle(row.name, opt)
    for skip in ([], [0], [1]):  # also a step of one kind alone
        set_gradients(params, skip)
        oracle.step([row.lr], [row.options])
    assert torch.equal(base[~inside], before[~inside])
    assert not torch.equal(base[inside], before[inside])


def test_gaps_in_steps_in_and_outside_of_inference_mode():
    param = torch.zeros(3, 2)[:, 0].requires_grad_()
    opt = lrs_ext.SGD([param], lr=0.25)
    for is_inference in (True, False, True):
        param.grad = torch.ones(3)
        with torch.inference_mode(is_inference):
            opt.step()
    assert param.tolist() == [-0.75] * 3


@dtypes
@state_updates
def test_slices_of_one_buffer_touch_nothing_outside(backend, row, dtype):
    flat = torch.randn(1300).to(backend.device, dtype)
    bounds = [(40 * n + n % 9, 41 * n + n % 9) for n in range(1, 31)]
    params = [flat[start:stop].detach().requires_grad_() for start, stop in bounds]
    before, outside = flat.clone(), torch.ones(1300, dtype=torch.bool)
    for start, stop in bounds:
        outside[start:stop] = False
    opt = make(row, params, backend)
    oracle = Oracle(row.name, opt)
    for k in range(2):
        grads = torch.randn(1300 + k).to(backend.device, dtype)
        for param, (start, stop) in zip(params, bounds, strict=True):
            param.grad = grads[start + k : stop + k]
        oracle.step([row.lr], [row.options])
    assert torch.equal(flat[outside], before[outside])


@pytest.mark.usefixtures("several_threads")
@dtypes
@pytest.mark.parametrize("row", cases.ELEMENTWISE_UPDATES, ids=str)
def test_an_element_gets_the_same_bits_in_every_run_and_wherever_it_lies(backend, row, dtype):
    numel = 5_000 if backend.interpreted else 200_003
    whole = leaf(torch.randn(numel), backend, dtype)
    sizes = [1, 2, 3, 5, 61, 1024, 1025, numel - 2121]
    cuts = [[numel], sizes, [numel]]
    runs = [[x.detach().clone().requires_grad_() for x in whole.split(cut)] for cut in cuts]
    opts = [make(row, params, backend) for params in runs]
    for _ in range(2):
        gradient = torch.randn_like(whole)
        for cut, params, opt in zip(cuts, runs, opts, strict=True):
            for param, grad in zip(params, gradient.split(cut), strict=True):
                param.grad = grad.clone()
            opt.step()
        first, *others = [torch.cat(params) for params in runs]
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.usefixtures("several_threads")
@state_updates
def test_large_tensors_and_many_tensors(backend, row):
    shapes = [(40_000,), *[(n % 37 + 1,) for n in range(20 if backend.interpreted else 299)]]
    params = randn_params(shapes, backend)
    opt = make(row, params, backend)
    oracle = Oracle(row.name, opt)
    for _ in range(1 if backend.interpreted else 2):
        set_gradients(params)
        oracle.step([row.lr], [row.options])


# Parameter groups.

GROUPS = {
    "SGD": [
        {},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.25, "maximize": True},
        {"weight_decay": 0.1},
    ],
    "Adam": [
        {},
        {"amsgrad": True, "betas": (0.5, 0.6)},
        {"maximize": True, "eps": 1e-2},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": False, "amsgrad": True},
    ],
    "AdamW": [{}, {"weight_decay": 0.3}, {"amsgrad": True, "maximize": True}],
    "Lion": [{}, {"weight_decay": 0.3}, {"betas": (0.5, 0.6), "maximize": True}],
    "LAMB": [
        {},
        {"weight_decay": 0.3, "bias_correction": False},
        {"weight_decay": 0.0, "betas": (0.5, 0.6), "maximize": True},
        {"weight_decay": 0.0, "always_adapt": False, "eps": 1e-2},
    ],
}


@optimizers
def test_groups_differ_in_options_dtypes_and_learning_rates(backend, name):
    options = GROUPS[name]
    groups = [
        {"params": [leaf(torch.randn(7 + i), backend, d) for d in cases.DTYPES], **own}
        for i, own in enumerate(options)
    ]
    for i, group in enumerate(groups):
        group["lr"] = 0.01 * (i + 1) if i % 2 else lrs_ext.linear(0.01 * (i + 1), 5)
    late = {"params": [leaf(torch.randn(9), backend)], "lr": lrs_ext.linear(0.1, 5), **options[-1]}
    opt = getattr(lrs_ext, name)(groups, backend=backend.name)
    oracle = Oracle(name, opt)
    for k in range(5):
        if k == 2:
            opt.add_param_group(late)
            options = [*options, options[-1]]
        set_gradients([p for group in opt.param_groups for p in group["params"]], skip=[k, 4])
        lrs = [0.01 * (i + 1) * (1.0 if i % 2 else 1 - k / 5) for i in range(len(GROUPS[name]))]
        lrs += [0.1 * (1 - k / 5)] * (len(options) - len(lrs))
        oracle.step(lrs, options)


CHANGES = {
    "SGD": [
        {"weight_decay": 0.3},
        {"momentum": 0.9, "dampening": 0.5},
        {"maximize": True},
        {"dampening": 0, "nesterov": True},
        {"momentum": 0},
    ],
    "Adam": [{"weight_decay": 0.3}, {"betas": (0.5, 0.6)}, {"maximize": True}, {"eps": 0.1}],
    "AdamW": [{"weight_decay": 0.3}, {"betas": (0.5, 0.6)}, {"maximize": True}, {"eps": 0.1}],
    "Lion": [{"weight_decay": 0.3}, {"betas": (0.5, 0.6)}, {"maximize": True}],
    "LAMB": [
        {"weight_decay": 0.3},
        {"betas": (0.5, 0.6), "eps": 0.1},
        {"bias_correction": False},
        {"always_adapt": False},
        {"weight_decay": 0.0},
    ],
}


@optimizers
def test_options_changed_between_steps_count_from_the_next(backend, name):
    row, params = cases.UpdateRow(name), randn_params([(7,), (4, 5)], backend)
    opt, theirs = make(row, params, backend), Torch(row, params)
    for change in [{}, *CHANGES[name], {}]:
        opt.param_groups[0].update(change)
        theirs.opt.param_groups[0].update(change)
        set_gradients(params)
        theirs.step(opt)


TRANSPOSED = {
    "its data": lambda p: setattr(p, "data", p.data.t()),
    "in place": lambda p: p.t_(),
}


@pytest.mark.parametrize("how", TRANSPOSED)
@pytest.mark.parametrize("row", cases.STATE_UPDATES[1::2], ids=str)
def test_a_parameter_transposed_where_it_lies_keeps_its_gradient(backend, row, how):
    params = randn_params([(4, 4), (3,)], backend)
    opt = make(row, params, backend)
    oracle = Oracle(row.name, opt)
    set_gradients(params)
    for k in range(4):
        if k == 2:
            address = params[0].data_ptr()
            with torch.no_grad():
                TRANSPOSED[how](params[0])
            assert params[0].data_ptr() == address
            assert not params[0].is_contiguous()
        oracle.step([row.lr], [row.options])


# What a user or a framework may do to parameters and states between steps.

INTERVENTIONS = {
    "other memory": lambda opt, p: setattr(p, "data", p.data.clone()),
    "another dtype": lambda opt, p: setattr(p, "data", p.data.bfloat16()),
    "other strides": lambda opt, p: setattr(p, "data", p.data.mT.contiguous().mT),
    "other states": lambda opt, p: opt.state.update({p: copy.deepcopy(opt.state[p])}),
    "a state forgotten": lambda opt, p: opt.state.pop(p, None),
    "a parameter dropped": lambda opt, p: opt.param_groups[0]["params"].pop(0),
}


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize("row", cases.STATE_UPDATES[1::2], ids=str)
def test_interventions_between_steps_are_followed(backend, row, intervention, when):
    params = randn_params([(2, 3, 4, 5), (7,), (300,)], backend)
    opt = make(row, params, backend)
    oracle = Oracle(row.name, opt)
    for k in range(4):
        if k == when:
            params[0].grad = None
            INTERVENTIONS[intervention](opt, params[0])
            oracle.counts = {p: n for p, n in oracle.counts.items() if opt.state.get(p)}
        set_gradients(params)
        oracle.step([row.lr], [row.options])
