"""Under torch.compile: optimizers stay outside of graphs, the operator is inside of one."""

import re
import weakref

import cases
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import lrs_ext
from lrs_ext import _C, functional, ops

STEPS = 30


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def train(name, wrap, how="plain"):
    """Trains over a whole schedule and beyond its end; returns the losses and the parameters."""
    model = make_model()
    schedule = lrs_ext.rex(0.05, total_steps=STEPS - 5, warmup_steps=3)
    opt = getattr(lrs_ext, name)(model.parameters(), lr=schedule, weight_decay=0.1)
    if how == "released":
        opt.step_in_backward()

    def step(inputs):
        loss = model(inputs).square().mean()
        loss.backward()
        if how == "clipped":
            lrs_ext.clip_grad_norm_(opt, max_norm=0.1)
        opt.step()
        opt.zero_grad()
        return loss.detach()

    step = wrap(step)
    losses = [step(torch.randn(8, 4)) for _ in range(STEPS)]
    return torch.stack(losses), [param.detach() for param in model.parameters()]


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "plain") for name in cases.OPTIMIZERS), ("AdamW", "clipped"), ("AdamW", "released")],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_training_step_compiles_once_over_a_whole_schedule(name, how):
    torch._dynamo.reset()
    counter = CompileCounter()
    losses, params = train(name, lambda step: torch.compile(step, backend=counter), how)
    expected_losses, expected = train(name, lambda step: step, how)
    # The forward pass, and what follows the step; backward(), norm and step run as they are.
    assert counter.frame_count == 2
    assert torch.equal(losses, expected_losses)
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


ADAM = {"weight_decay": 0.1, "betas": (0.9, 0.95)}
OPERATOR_CASES = [
    ("sgd", 0, [0.1, 0.0, 0.0, 0.0, 0.0], "SGD", {"weight_decay": 0.1}),
    ("sgd", 1, [0.0, 0.0, 0.9, 0.0, 1.0], "SGD", {"momentum": 0.9, "nesterov": True}),
    (
        "adam",
        2,
        [0.1, 0.0, 0.9, 0.95, 1e-8, 1.0],
        "AdamW",
        {"weight_decay": 0.1, "betas": (0.9, 0.95)},
    ),
    (
        "adam",
        3,
        [0.1, 1.0, 0.9, 0.95, 1e-8, 0.0],
        "Adam",
        {"weight_decay": 0.1, "betas": (0.9, 0.95), "amsgrad": True, "maximize": True},
    ),
    ("lion", 1, [0.1, 0.0, 0.9, 0.99], "Lion", {"weight_decay": 0.1}),
    ("lamb", 2, [0.1, 0.0, 0.9, 0.95, 1e-6, 1.0, 1.0], "LAMB", ADAM),
]
operator_cases = pytest.mark.parametrize(
    ("algorithm", "num_states", "hyper", "name", "options"), OPERATOR_CASES
)


def tensors(num_states, dtype=torch.float32):
    params = [torch.randn(5, 3).to(dtype), torch.randn(()).to(dtype), torch.randn(300).to(dtype)]
    states = [torch.zeros_like(p, dtype=torch.float32) for p in params for _ in range(num_states)]
    return params, states, [torch.zeros(()) for _ in params], torch.tensor(0)


def learning_rates(schedule, device="cpu"):
    buffer = lrs_ext.ScheduleBuffer(1, schedule.total_steps + 1, device=device)
    return buffer.fill_(0, schedule).rows[0]


@operator_cases
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_operator_passes_the_checks_of_torch(
    algorithm, num_states, hyper, name, options, dtype
):
    params, states, counters, position = tensors(num_states, dtype)
    grads = [torch.randn_like(param) for param in params]
    lr = learning_rates(lrs_ext.rex(0.05, total_steps=STEPS))
    args = (algorithm, params, grads, states, counters, lr, position, hyper)
    torch.library.opcheck(torch.ops.lrs_ext.step.default, args)


@operator_cases
def test_one_graph_serves_a_whole_schedule(algorithm, num_states, hyper, name, options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    params, states, counters, position = tensors(num_states)
    twins = [param.clone().requires_grad_() for param in params]
    schedule = lrs_ext.rex(0.05, total_steps=STEPS - 5, warmup_steps=3)
    lr, opt = learning_rates(schedule), getattr(lrs_ext, name)(twins, lr=schedule, **options)

    @torch.compile(backend=counter, fullgraph=True)
    def step(grads):
        grads = [2.0 * grad for grad in grads]
        functional.step(algorithm, params, grads, states, counters, lr, position, hyper)

    for _ in range(STEPS):
        grads = [torch.randn_like(param) for param in params]
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = 2.0 * grad
        step(grads)
        opt.step()
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    assert position.item() == STEPS


@pytest.fixture
def made(monkeypatch):
    """The tables that have been made."""
    tables = []

    class Counted(ops.StepTable):
        def __init__(self, **arguments):
            tables.append(self)
            super().__init__(**arguments)

    monkeypatch.setattr(ops, "StepTable", Counted)
    return tables


def test_the_compiler_copies_no_parameter_or_state(made):
    torch._dynamo.reset()
    params, states, counters, position = tensors(2)

    @torch.compile(fullgraph=True)
    def step(params, grads, states, counters, lr, position):
        functional.step("adam", params, grads, states, counters, lr, position, OPERATOR_CASES[2][2])

    grads = [torch.randn_like(param) for param in params]
    arguments = (params, grads, states, counters, torch.tensor([0.1]), position)
    _, [code] = run_and_get_code(step, *arguments)
    assert code.count("torch.ops.lrs_ext.step.default(") == 1
    assert not re.findall(
        r"empty_strided\w*\(|clone|copy_\(|cpp_fused", code.partition("def call")[2]
    )
    for _ in range(3):
        step(*arguments)
    assert len(made) == 2
    assert position.item() == 4


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_the_operator_serves_every_optimizer(name):
    opt = getattr(lrs_ext, name)([torch.ones(1, requires_grad=True)], lr=0.1)
    group, algorithm = opt.param_groups[0], opt.algorithm
    names = opt._state_names(group)
    assert functional.STATE_NAMES[algorithm][: len(names)] == tuple(names)
    assert functional.HYPER_NAMES.keys() == functional.STATE_NAMES.keys() == set(_C.algorithms)


def call(**changes):
    params, states, counters, position = tensors(1)
    grads = [torch.ones_like(param) for param in params]
    arguments = {
        "algorithm": "lion",
        "params": params,
        "grads": grads,
        "states": states,
        "counters": counters,
        "lr": torch.tensor([0.1]),
        "position": position,
        "hyper": [0.0, 0.0, 0.9, 0.99],
    }
    functional.step(**arguments | changes)
    return params


GAPS = [torch.zeros(5, 6)[:, ::2], torch.zeros(()), torch.zeros(300)]
TRANSPOSED = [torch.zeros(3, 5).t(), torch.zeros(()), torch.zeros(300)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"algorithm": "adagrad"}, ValueError, "algorithm must be one of"),
        ({"grads": []}, ValueError, "3 parameters, 0 gradients"),
        ({"states": []}, ValueError, "lion has 1 to 1 states, got 0"),
        ({"hyper": [0.0]}, ValueError, "hyper must be the 4 numbers"),
        ({"hyper": [0.0, 0.0, float("nan"), 0.9]}, ValueError, "beta1 must be finite"),
        ({"lr": torch.tensor([0.1], dtype=torch.float64)}, RuntimeError, "lr must be float32"),
        ({"lr": torch.ones(0)}, RuntimeError, "lr must be one number or a row"),
        ({"lr": torch.ones(2, 2)}, RuntimeError, "lr must be one number or a row"),
        ({"position": torch.tensor(0).int()}, RuntimeError, "position must be int64 and 0-d"),
        ({"position": torch.zeros(2).long()}, RuntimeError, "position must be int64 and 0-d"),
        ({"grads": [torch.ones(3)] * 3}, RuntimeError, "a gradient differs"),
        ({"params": GAPS, "grads": GAPS}, RuntimeError, "has gaps between its elements"),
        ({"states": GAPS}, RuntimeError, "a state has shape \\(5, 3\\), strides \\(6, 2\\)"),
        ({"states": TRANSPOSED}, RuntimeError, "a state has shape \\(5, 3\\), strides \\(1, 5\\)"),
        ({"counters": [torch.zeros(())] * 3}, ValueError, "a counter serves two parameters"),
        (
            {"params": [torch.zeros(4), torch.ones(4)], "grads": [torch.zeros(4)] * 2}
            | {"states": [torch.zeros(4)] * 2, "counters": [torch.zeros(()), torch.ones(())]},
            ValueError,
            "a state or a counter serves two parameters",
        ),
    ],
)
def test_the_operator_refuses_what_does_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_the_operator_does_not_pass_other_kernels_for_the_reference(monkeypatch):
    monkeypatch.setenv("LRS_EXT_BACKEND", "reference")
    with pytest.raises(RuntimeError, match="step has no reference backend, which LRS_EXT_BACKEND"):
        call()


def test_the_operator_without_parameters_does_nothing():
    call(params=[], grads=[], states=[], counters=[])


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


def change_nothing(arguments):
    pass


def replace_a_parameter(arguments):
    arguments["params"][2] = arguments["params"][2].clone()


def move_a_parameter(arguments):
    arguments["params"][0].data = arguments["params"][0].data.clone()


def replace_a_state(arguments):
    arguments["states"][1] = torch.ones_like(arguments["states"][1])


def move_a_counter(arguments):
    arguments["counters"][1].data = arguments["counters"][1] + 7.0


def move_the_position(arguments):
    arguments["position"].data = arguments["position"] + 3


def replace_the_rates(arguments):
    arguments["lr"] = learning_rates(
        lrs_ext.linear(0.02, total_steps=STEPS), arguments["lr"].device
    )


def change_a_rate(arguments):
    arguments["lr"].mul_(0.5)


def change_a_number(arguments):
    arguments["hyper"] = [0.3, *arguments["hyper"][1:]]


def drop_a_parameter(arguments):
    for name in ("params", "states", "counters"):
        arguments[name].pop()


@pytest.mark.parametrize(
    "change",
    [
        change_nothing,
        replace_a_parameter,
        move_a_parameter,
        replace_a_state,
        move_a_counter,
        move_the_position,
        replace_the_rates,
        change_a_rate,
        change_a_number,
        drop_a_parameter,
    ],
)
@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_of_the_same_tensors_follow_what_has_changed(change, before, device):
    """Against the operator with other tensors each time, of which it can keep nothing."""
    params, states, counters, position = tensors(1)
    arguments = {
        "params": [param.to(device) for param in params],
        "states": [state.to(device) for state in states],
        "counters": [counter.to(device) for counter in counters],
        "position": position.to(device),
        "lr": learning_rates(lrs_ext.rex(0.05, total_steps=STEPS), device),
        "hyper": [0.1, 0.0, 0.9, 0.99],
    }
    for step in range(before + 3):
        if step == before:
            change(arguments)
        lists = {name: copies(arguments[name]) for name in ("params", "states", "counters")}
        fresh = {**arguments, **lists, "position": arguments["position"].clone()}
        grads = [torch.randn_like(param) for param in arguments["params"]]
        functional.step("lion", grads=grads, **arguments)
        functional.step("lion", grads=grads, **fresh)
        for name in lists:
            assert all(map(torch.equal, arguments[name], fresh[name])), name
        assert torch.equal(arguments["position"], fresh["position"])


def test_tables_are_made_again_only_where_something_has_changed(made):
    params, states, counters, position = tensors(1)
    arguments = {"params": params, "states": states, "counters": counters, "position": position}
    for k in range(4):
        call(**arguments, lr=torch.tensor([0.1 * k]), grads=[torch.randn_like(p) for p in params])
    assert len(made) == 2
    params[0].data = params[0].data.clone()
    for _ in range(3):
        call(**arguments)
    assert len(made) == 3


def test_repeated_steps_refuse_another_gradient():
    params, states, counters, position = tensors(1)
    arguments = {"params": params, "states": states, "counters": counters, "position": position}
    for _ in range(3):
        call(**arguments)
    with pytest.raises(RuntimeError, match="a gradient differs"):
        call(**arguments, grads=[torch.ones(2)] * 3)
    assert position.item() == 3


def test_a_refused_step_keeps_no_gradient():
    params, states, counters, position = tensors(1)
    arguments = {"params": params, "states": states, "counters": counters, "position": position}
    for _ in range(3):
        call(**arguments)
    grads = [*map(torch.zeros_like, params[:2]), torch.zeros(2)]
    kept = [weakref.ref(grad) for grad in grads]
    with pytest.raises(RuntimeError, match="a gradient differs"):
        call(**arguments, grads=grads)
    del grads
    assert all(ref() is None for ref in kept)


def test_a_step_reads_its_own_gradients_while_another_thread_makes_one(monkeypatch):
    """A kernel lets other threads run, here at once."""
    param, counter, position = torch.zeros(3), torch.zeros(()), torch.tensor(0)
    launch, others = ops.StepTable._launch, []

    def step(value):
        lr, grad = torch.tensor(1.0), torch.full((3,), value)
        functional.step("sgd", [param], [grad], [], [counter], lr, position, [0.0] * 5)

    def launch_after_others(*args):
        while others:
            step(others.pop())
        launch(*args)

    for _ in range(2):
        step(0.0)
    monkeypatch.setattr(ops.StepTable, "_launch", launch_after_others)
    others.append(1.0)
    step(0.0)
    assert param.tolist() == [-1.0] * 3


def test_every_argument_that_changes_says_so_to_autograd():
    params, states, counters, position = tensors(1)
    arguments = {"params": params, "states": states, "counters": counters, "position": position}
    changed = [*params, *states, *counters, position]
    for _ in range(3):
        before = [tensor._version for tensor in changed]
        call(**arguments)
        assert all(t._version > version for t, version in zip(changed, before, strict=True))


@pytest.mark.parametrize("times", [1, 3])
def test_tensors_are_kept_only_for_a_position_that_has_seen_them_twice(times):
    params, states, counters, position = tensors(1)
    for _ in range(times):
        call(params=params, states=states, counters=counters, position=position)
    kept = [weakref.ref(tensor) for tensor in (*params, *states, *counters)]
    del params, states, counters
    assert all((ref() is not None) == (times > 1) for ref in kept)
    del position
    assert all(ref() is None for ref in kept)
