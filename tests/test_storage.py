"""How states and parameters are kept: every kind against the float64 oracle."""

import cases
import pytest
import reference
import torch
from test_optimizers import assert_close, leaf, set_gradients

import lrs_ext

# Triton's interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning")
updates = pytest.mark.parametrize("row", cases.STORED_UPDATES, ids=str)
storages = pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
split = pytest.mark.parametrize("storage", cases.STORAGES[1::3], ids=str)

SHAPES = [(), (0,), (1,), (127,), (128,), (129,), (33, 65), (8191,), (8193,)]
INTERPRETED_SHAPES = [(), (0,), (7,), (300,)]


def make(row, params, backend, storage=cases.StorageRow(), **options):  # noqa: B008 - frozen
    options = {"lr": row.lr, "backend": backend.name} | row.options | storage.options | options
    return getattr(lrs_ext, row.name)(params, **options)


def make_params(backend, dtypes=cases.DTYPES[:2]):
    shapes = INTERPRETED_SHAPES if backend.interpreted else SHAPES
    return [leaf(torch.randn(shape), backend, dtype) for dtype in dtypes for shape in shapes]


def arrays_of(opt):
    """Everything that a step may write."""
    params = [param for group in opt.param_groups for param in group["params"]]
    states = [opt.state[param] for param in params if param in opt.state]
    arrays = [array for state in states for array in state.values()]
    return [*params, *arrays, *opt.step_counters.values(), opt.schedule_buffer.step]


# The matrix.


def neighbours(exact, fuzz, below):
    """The largest representable numbers up to `exact`, and the smallest from it on.

    `exact` may be wrong by `fuzz`; `below` returns the largest up to its argument.
    """
    return below(exact - fuzz), -below(-(exact + fuzz))


def bfloat16_below(number):
    nearest = number.float().bfloat16()
    lower = torch.nextafter(nearest, torch.tensor(-torch.inf, dtype=torch.bfloat16))
    return torch.where(nearest.double() <= number, nearest, lower).double()


def multiple_below(multiples):
    numbers = torch.cat([-multiples.flip(0), multiples]).unique()

    def below(number):
        index = torch.searchsorted(numbers, number, right=True) - 1
        return numbers[index.clamp(min=0)]

    return below


def assert_between(actual, bounds):
    low, high = bounds
    assert ((actual >= low) & (actual <= high)).all()


def fuzz_of(exact, tolerance):
    return tolerance.rtol * exact.abs() + tolerance.atol


class Oracle:
    """Compares each update with the oracle's, made from the numbers decoded before it."""

    def __init__(self, row, opt, storage):
        self.row, self.opt, self.storage, self.counts = row, opt, storage, {}

    def step(self, lr=None):
        params = [param for group in self.opt.param_groups for param in group["params"]]
        before = [reference.kept_numbers(p, self.opt.state.get(p, {})) for p in params]
        if self.row.name == "Lion":
            for param, (_, numbers) in zip(params, before, strict=True):
                self.clear_signs(param, numbers)
        self.opt.step()
        for param, (value, numbers) in zip(params, before, strict=True):
            if param.grad is None:
                continue
            count = self.counts[param] = self.counts.get(param, 0) + 1
            numbers = numbers if count > 1 else {}
            if "step" in numbers:
                numbers["step"] = torch.tensor(float(count - 1))
            grad, options = param.grad.cpu().double(), {"lr": lr or self.row.lr}
            options["lr"] = float(torch.tensor(options["lr"]))
            update = reference.UPDATES[self.row.name]
            self.compare(param, *update(value, grad, numbers, **options, **self.row.options))

    def clear_signs(self, param, numbers):
        """Turns gradients with which the sign that Lion takes would be a matter of rounding."""
        if param.grad is None or param not in self.counts:
            return
        grad, beta1 = param.grad.cpu().double(), self.row.options["betas"][0]
        direction = beta1 * numbers["exp_avg"] + (1 - beta1) * grad
        unclear = direction.abs() < 1e-6 * numbers["exp_avg"].abs()
        param.grad.copy_(torch.where(unclear, -grad, grad))

    def compare(self, param, exact, exact_states):
        state = self.opt.state.get(param, {})
        value, numbers = reference.kept_numbers(param, state)
        self.compare_param(param, value, exact)
        assert set(numbers) == set(exact_states)
        for name, number in exact_states.items():
            if name == "step":
                assert state[name].item() == number
            else:
                self.compare_state(state, name, numbers[name], number)

    def compare_param(self, param, value, exact):
        is_small, storage = param.dtype == torch.bfloat16, self.storage
        tolerance = cases.PARAM[torch.float32 if storage.master_weights else param.dtype]
        if is_small and storage.stochastic_rounding:
            fuzz = fuzz_of(exact, cases.PARAM[torch.float32])
            assert_between(value, neighbours(exact, fuzz, bfloat16_below))
            return
        assert_close(value, exact, tolerance)
        if is_small and storage.master_weights:
            shown = param.detach().cpu().double()
            assert_between(shown, neighbours(value, 0.0, bfloat16_below))
            assert ((shown - value).abs() <= half_ulp(shown)).all()

    def compare_state(self, state, name, number, exact):
        assert state[name].dtype == self.storage.state_dtype
        assert (f"{name}_scale" in state) == (state[name].dtype == torch.uint8)
        if state[name].dtype == torch.float32:
            assert_close(number, exact, cases.STATE)
        elif state[name].dtype == torch.bfloat16:
            fuzz = fuzz_of(exact, cases.STATE)
            assert_between(number, neighbours(exact, fuzz, bfloat16_below))
        else:
            self.compare_blocks(state[f"{name}_scale"].cpu(), name == "exp_avg_sq", number, exact)

    def compare_blocks(self, scales, is_root, number, exact):
        number, exact = (reference.flat(torch.empty_like(number).copy_(x)) for x in (number, exact))
        if is_root:
            number, exact = number.sqrt(), exact.sqrt()
        blocks = exact.abs().split(reference.BLOCK)
        largest = torch.tensor([b.max() for b in blocks if b.numel()], dtype=torch.float64)
        fuzz = fuzz_of(largest, cases.STATE)
        bounds = ((largest - fuzz).clamp(min=0.0), largest + fuzz)
        assert_between(scales, [reference.block_scale(x, is_root) for x in bounds])
        multiples = reference.ROOT_MULTIPLES if is_root else reference.SIGNED_MULTIPLES
        scale = reference.spread(scales, exact.numel())
        fuzz = fuzz_of(exact, cases.STATE) / scale
        lower, upper = neighbours(exact / scale, fuzz, multiple_below(multiples))
        # The root of a square is not the number itself with every library of mathematics.
        assert_between(number / scale, (lower - 1e-12, upper + 1e-12))


def half_ulp(number):
    """Half the distance of a bfloat16 to the next larger one."""
    number = number.abs().to(torch.bfloat16)
    above = torch.nextafter(number, torch.tensor(torch.inf, dtype=torch.bfloat16))
    return (above.double() - number.double()) / 2


@updates
@storages
def test_every_storage_matches_the_oracle(backend, row, storage):
    params = make_params(backend)
    opt = make(row, params, backend, storage)
    oracle = Oracle(row, opt, storage)
    for k in range(3):
        set_gradients(params, skip=[(k + 2) % len(params), 4] if k < 2 else [])
        oracle.step()


def bits_of_a_run(row, storage, backend, dtypes, shapes, steps=3):
    generator = torch.Generator().manual_seed(0)
    params = [
        leaf(torch.randn(shape, generator=generator), backend, dtype)
        for dtype in dtypes
        for shape in shapes
    ]
    opt = make(row, params, backend, storage)
    for _ in range(steps):
        for param in params:
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.device, param.dtype)
        opt.step()
    return [array.detach().cpu() for array in arrays_of(opt)]


@updates
@storages
def test_backends_agree_to_the_bit(backend, row, storage):
    """Plain torch takes other roots and quotients; Triton's interpreter truncates to bfloat16."""
    if backend.name == "reference" and row.name != "SGD":
        pytest.skip("rounds differently in between")
    is_rounded = not (storage.master_weights or storage.stochastic_rounding)
    dtypes = cases.DTYPES[: 1 if backend.interpreted and is_rounded else 2]
    shapes = INTERPRETED_SHAPES if backend.interpreted else SHAPES
    found = bits_of_a_run(row, storage, backend, dtypes, shapes)
    expected = bits_of_a_run(row, storage, cases.BACKENDS[0], dtypes, shapes)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("row", [cases.STORED_UPDATES[i] for i in (1, 4)], ids=str)
def test_backends_agree_on_the_codes_beside_a_nan(backend, row):
    """The scale of its block is nan; its own code may be any."""
    codes = []
    for each in (backend, cases.BACKENDS[0]):
        values = torch.randn(300, generator=torch.Generator().manual_seed(0))
        params = [leaf(values, each)]
        opt = make(row, params, each, cases.StorageRow(torch.uint8))
        values[5] = torch.nan
        params[0].grad = values.to(each.device)
        opt.step()
        [state] = opt.state.values()
        [(name, scale)] = [item for item in state.items() if item[0].endswith("_scale")]
        assert scale.isnan().tolist() == [True, False, False]
        kept = state[name.removesuffix("_scale")].cpu()
        codes.append(torch.cat([kept[:5], kept[6:]]))
    assert torch.equal(*codes)


# Split parameters.


@updates
@split
def test_master_weights_are_those_of_a_float32_run(backend, row, storage):
    shapes = [(300,)] if backend.interpreted else [(300,), (8193,)]
    params = [leaf(torch.randn(shape), backend, torch.bfloat16) for shape in shapes]
    twins = [param.detach().float().requires_grad_() for param in params]
    opt = make(row, params, backend, storage)
    twin = make(row, twins, backend, cases.StorageRow(storage.state_dtype))
    for _ in range(5 if backend.interpreted else 50):
        set_gradients(params)
        for param, other in zip(params, twins, strict=True):
            other.grad = param.grad.float()
        opt.step()
        twin.step()
    for param, other in zip(params, twins, strict=True):
        master, _ = reference.kept_numbers(param, opt.state[param])
        assert torch.equal(master, other.detach().cpu().double())


@split
def test_a_master_follows_values_that_are_put_into_its_parameter(backend, storage):
    row = cases.STORED_UPDATES[1]
    params = [leaf(torch.randn(300), backend, torch.bfloat16)]
    opt = make(row, params, backend, storage, weight_decay=0.0)
    for _ in range(3):
        set_gradients(params)
        opt.step()
    values = torch.randn(300).bfloat16()
    with torch.no_grad():
        params[0].copy_(values)
    master, _ = reference.kept_numbers(params[0], opt.state[params[0]])
    assert ((master - values.double()).abs() <= half_ulp(values.double())).all()
    oracle = Oracle(cases.UpdateRow("SGD", row.options | {"weight_decay": 0.0}, 0.02), opt, storage)
    oracle.counts[params[0]] = 3
    set_gradients(params)
    oracle.step()


# Memory and layouts.

LAYOUTS = {
    "channels_last": lambda: torch.randn(2, 3, 12, 5).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(5, 30, 4).permute(2, 0, 1),
    "transposed": lambda: torch.randn(60, 19).t(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@storages
@pytest.mark.parametrize("row", cases.STORED_UPDATES[1::2], ids=str)
def test_dense_layouts_are_kept_in_the_order_of_memory(backend, row, storage, layout):
    values = LAYOUTS[layout]()
    params = [leaf(values, backend, dtype) for dtype in cases.DTYPES[:2]]
    opt = make(row, params, backend, storage)
    oracle = Oracle(row, opt, storage)
    for _ in range(2):
        set_gradients(params)
        params[1].grad = params[1].grad.contiguous()
        oracle.step()
    for param in params:
        for name, array in opt.state[param].items():
            if name not in ("step",) and not name.endswith("_scale"):
                assert array.stride() == param.stride()


@storages
@pytest.mark.parametrize("row", cases.STORED_UPDATES[1::2], ids=str)
def test_unaligned_views_touch_nothing_outside(backend, row, storage):
    flats = [torch.randn(2000).to(backend.device, dtype) for dtype in cases.DTYPES[:2]]
    before = [flat.clone() for flat in flats]
    bounds = [(1, 2), (3, 132), (135, 135), (139, 700), (701, 1999)]
    params = [f[a:b].detach().requires_grad_() for f in flats for a, b in bounds]
    opt = make(row, params, backend, storage)
    oracle = Oracle(row, opt, storage)
    for k in range(2):
        grads = [torch.randn_like(flat) for flat in flats]
        for param, (f, (a, b)) in zip(
            params, [(f, bound) for f in grads for bound in bounds], strict=True
        ):
            param.grad = f[a - k : b - k]
        oracle.step()
    for flat, old in zip(flats, before, strict=True):
        outside = torch.ones(2000, dtype=torch.bool)
        for a, b in bounds:
            outside[a:b] = False
        assert torch.equal(flat[outside], old[outside])


@storages
@pytest.mark.parametrize("row", cases.STORED_UPDATES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=str)
def test_states_take_the_memory_that_they_promise(backend, row, storage, dtype):
    param = leaf(torch.randn(1280), backend, dtype)
    opt = make(row, [param], backend, storage)
    param.grad = torch.randn_like(param)
    opt.step()
    states = {"SGD": 1 if "momentum" in row.options else 0, "Lion": 1}.get(row.name, 2)
    promised = states * cases.STATE_BYTES[storage.state_dtype]
    if storage.master_weights and dtype == torch.bfloat16:
        promised += 2
    arrays = {n: t for n, t in opt.state.get(param, {}).items() if n != "step"}
    assert sum(t.numel() * t.element_size() for t in arrays.values()) == promised * 1280
    [to_come] = opt.state_to_come()
    described = {n: (t.shape, t.dtype, t.stride()) for n, t in to_come.items()}
    assert described == {n: (t.shape, t.dtype, t.stride()) for n, t in arrays.items()}
