"""Checkpoints: resuming to the bit, groups put there by hand, copies, distributed checkpoints."""

import copy
import io
import pickle

import cases
import pytest
import torch
from plain_optimizers import plain_optimizer
from torch.distributed.checkpoint import state_dict as dcp

import lrs_ext

OPTIONS = {
    "SGD": {},
    "SGD momentum": {"momentum": 0.9, "dampening": 0.5},
    "Adam": {"amsgrad": True, "betas": (0.8, 0.9)},
    "AdamW": {"weight_decay": 0.1},
    "Lion": {"weight_decay": 0.1, "betas": (0.8, 0.9)},
    "LAMB": {"weight_decay": 0.1, "bias_correction": False},
}
rows = pytest.mark.parametrize("row", OPTIONS)
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=str)
REX = lrs_ext.rex(0.1, 8, warmup_steps=2, min_lr=0.001)
SHAPES = [(5,), (2, 3, 4, 5), (7,)]


def make(row, params, backend=None, **options):
    options = OPTIONS[row] | options
    if backend is None:
        return plain_optimizer(row.split()[0])(params, foreach=False, **options)
    return getattr(lrs_ext, row.split()[0])(params, backend=backend.name, **options)


def make_params(backend, dtype=torch.float32):
    torch.manual_seed(0)
    params = [torch.randn(s).to(backend.device, dtype).requires_grad_() for s in SHAPES]
    params[1].data = params[1].data.contiguous(memory_format=torch.channels_last)
    return params


def copies(params):
    return [param.detach().clone().requires_grad_() for param in params]


def update(params, opt, k):
    """Update k, with its own random gradients; the third parameter gets none at first."""
    generator = torch.Generator().manual_seed(k)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        param.grad = None if i == 2 and k < 2 else grad
    opt.step()


def params_of(opt):
    return [param for group in opt.param_groups for param in group["params"]]


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_runs(opts, start, stop):
    """The optimizers go on from update `start`, equal to the bit in all that they hold."""
    for k in range(start, stop):
        for opt in opts:
            update(params_of(opt), opt, k)
        expected = opts[0]
        for opt in opts[1:]:
            assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in expected.param_groups]
            assert opt.current_lr() == expected.current_lr()
            assert torch.equal(opt.schedule_buffer.step, expected.schedule_buffer.step)
            for param, other in zip(params_of(opt), params_of(expected), strict=True):
                assert torch.equal(param, other)
                state, others = opt.state.get(param, {}), expected.state.get(other, {})
                assert set(state) == set(others)
                assert all(torch.equal(state[name], others[name]) for name in state)


# Our own checkpoints.


@rows
@dtypes
@pytest.mark.parametrize("saved_at", [0, 1, 2, 5, 8, 11])
def test_resuming_is_exact_at_any_step(backend, row, dtype, saved_at):
    opt = make(row, make_params(backend, dtype), backend, lr=REX)
    for k in range(saved_at):
        update(params_of(opt), opt, k)
    checkpoint = through_file(opt.state_dict())
    resumed = [
        make(row, copies(params_of(opt)), backend, lr=lr)
        for lr in (REX, 0.5, lrs_ext.linear(0.7, 3), lrs_ext.cosine(0.7, 500))
    ][: 1 if backend.interpreted else None]
    for other in resumed:
        other.load_state_dict(checkpoint)
        assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == REX(saved_at)
    assert_equal_runs([opt, *resumed], saved_at, saved_at + (2 if backend.interpreted else 4))


STORAGES = ({}, {"state_dtype": torch.bfloat16}, {"state_dtype": torch.uint8})


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_what_a_wrapper_keeps_in_the_state_comes_back_as_it_was(backend, storage):
    # As Lookahead does with its slow weights: some of it has the shape of its parameter.
    opt = make("AdamW", make_params(backend), backend, lr=REX, **storage)
    update(params_of(opt), opt, 0)
    kept = {
        "slow": torch.full(SHAPES[0], 1.234, device=backend.device),
        "rank": torch.arange(3, device=backend.device),
        "best_loss": torch.tensor(0.1, dtype=torch.float64, device=backend.device),
        "power": {"u": torch.ones(2, device=backend.device)},
    }
    first = params_of(opt)[0]
    opt.state[first].update(copy.deepcopy(kept))
    update(params_of(opt), opt, 1)
    resumed = make("AdamW", copies(params_of(opt)), backend, lr=REX, **storage)
    resumed.load_state_dict(through_file(opt.state_dict()))
    for k in (2, 3):
        for each in (opt, resumed):
            update(params_of(each), each, k)
    for param, other in zip(params_of(opt), params_of(resumed), strict=True):
        assert torch.equal(param, other)
    state = resumed.state[params_of(resumed)[0]]
    assert torch.equal(state["power"]["u"], kept["power"]["u"])
    for name in ("slow", "rank", "best_loss"):
        assert state[name].dtype == kept[name].dtype
        assert torch.equal(state[name], kept[name])


@rows
@pytest.mark.parametrize("are_bare", [False, True])
@pytest.mark.parametrize("made_with", [1, 2, 3])
def test_other_groups_may_be_put_there_before_a_checkpoint(backend, row, made_with, are_bare):
    # As Lightning's BaseFinetuning does, which adds groups while it trains.
    params = make_params(backend)
    opt = make(row, params[:1], backend, lr=REX)
    opt.add_param_group({"params": params[1:], "lr": 0.05})
    for k in range(3):
        update(params, opt, k)
    others = copies(params)
    groups = [{"params": [param]} for param in others[:made_with]]
    resumed = make(row, groups, backend, lr=REX)
    update(others, resumed, 0)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    put = [{} if are_bare else dict(group) for group in opt.param_groups]
    put[0]["params"], put[1]["params"] = others[:1], others[1:]
    resumed.param_groups = put
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert_equal_runs([opt, resumed], 3, 6)


def put_other_groups(opt, new):
    """Appends one group and, where there are several, removes the first."""
    kept = opt.param_groups[1:] or opt.param_groups
    opt.param_groups[:] = [*kept, {"params": [new], "lr": 0.05, "weight_decay": 0.0}]


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_group_put_there_by_hand_leaves_the_schedules_of_the_others(backend, num_groups):
    params = make_params(backend)
    opt = make(
        "AdamW", [{"params": [p]} for p in params[:num_groups]], backend, lr=REX, weight_decay=REX
    )
    update(params, opt, 0)
    put_other_groups(opt, params[2])
    torch_opt = make("AdamW", [{"params": group["params"]} for group in opt.param_groups], lr=0.05)
    for k in range(4):
        update(params_of(torch_opt), torch_opt, k)
    opt.load_state_dict(through_file(torch_opt.state_dict()))
    for k in range(4, 7):
        known, new = opt.param_groups
        assert [known["lr"], known["weight_decay"], new["lr"]] == [REX(k), REX(k), 0.05]
        assert opt.current_lr() == pytest.approx([REX(k), 0.05])
        update(params, opt, k)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_faulty_group_put_there_by_hand_changes_nothing(backend, num_groups):
    params = make_params(backend)
    opt = make("AdamW", [{"params": [p]} for p in params[:num_groups]], backend, lr=REX)
    put_other_groups(opt, params[2])
    torch_opt = make("AdamW", [{"params": group["params"]} for group in opt.param_groups], lr=0.03)
    opt.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1\.0"):
        opt.load_state_dict(torch_opt.state_dict())
    opt.param_groups[1]["lr"] = 0.05
    opt.load_state_dict(torch_opt.state_dict())
    assert opt.current_lr() == pytest.approx([REX(0), 0.03])


def test_a_faulty_number_of_a_known_group_leaves_the_others_as_they_are(backend):
    params = make_params(backend)
    opt = make("AdamW", [{"params": [p]} for p in params[:2]], backend, lr=REX, weight_decay=REX)
    opt.param_groups.append({"params": [params[2]], "lr": 0.05})
    torch_opt = make("AdamW", [{"params": group["params"]} for group in opt.param_groups], lr=0.03)
    opt.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1\.0"):
        opt.load_state_dict(torch_opt.state_dict())
    assert [opt.param_groups[0][key] for key in ("lr", "weight_decay")] == [REX(0), REX(0)]


@pytest.mark.parametrize("moving", [{"lr": REX}, {"weight_decay": REX}], ids=list)
def test_groups_of_a_checkpoint_without_a_position_are_an_error(backend, moving):
    # As in most implementations of SAM, which save the groups of the optimizer inside of them.
    opt = make("AdamW", make_params(backend), backend, **moving)
    update(params_of(opt), opt, 0)
    groups = [{**group, "params": []} for group in opt.param_groups]
    saved = {"wrapper": through_file(groups), "inner": through_file(opt.state_dict())}
    resumed = make("AdamW", copies(params_of(opt)), backend, **moving)
    own = resumed.param_groups
    resumed.param_groups = [{**saved["wrapper"][0], "params": params_of(resumed)}]
    for ask in (resumed.current_lr, lambda: update(params_of(resumed), resumed, 1)):
        with pytest.raises(RuntimeError, match=r"group 0 is not the one .* wrapper saves groups"):
            ask()
    resumed.param_groups = own
    resumed.load_state_dict(saved["inner"])
    assert_equal_runs([opt, resumed], 1, 4)


def test_other_groups_are_refused_while_a_graph_holds_a_step(backend):
    params = make_params(backend)
    opt = make("AdamW", params, backend, lr=REX)
    update(params, opt, 0)
    saved = opt.state_dict()
    opt._preparation.was_captured = True
    opt.param_groups = [*opt.param_groups, {**opt.param_groups[0], "params": []}]
    with pytest.raises(RuntimeError, match="other groups are not in the captured graph"):
        opt.load_state_dict(saved)


@rows
def test_a_float_that_took_over_is_resumed_too(backend, row):
    opt = make(row, make_params(backend), backend, lr=REX)
    update(params_of(opt), opt, 0)
    opt.param_groups[0]["lr"] = 0.03
    checkpoints = [through_file(opt.state_dict())]
    update(params_of(opt), opt, 1)
    checkpoints.append(through_file(opt.state_dict()))
    resumed = make(row, copies(params_of(opt)), backend, lr=REX)
    resumed.load_state_dict(checkpoints[1])
    assert_equal_runs([opt, resumed], 2, 12)
    assert opt.param_groups[0]["lr"] == 0.03
    resumed.load_state_dict(checkpoints[0])
    update(params_of(resumed), resumed, 1)
    assert resumed.current_lr() == [float(torch.tensor(0.03))]


@rows
def test_groups_of_every_kind_of_learning_rate_are_resumed(backend, row):
    params = make_params(backend)
    lrs = [REX, 0.05, torch.tensor(0.02)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)]
    opt = make(row, groups, backend)
    for k in range(3):
        update(params, opt, k)
    checkpoint = through_file(opt.state_dict())
    opt.param_groups[2]["lr"].fill_(0.9)
    assert float(checkpoint["param_groups"][2]["lr"]) == pytest.approx(0.02)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(copies(params), lrs, strict=True)]
    resumed = make(row, groups, backend)
    resumed.load_state_dict(checkpoint)
    opt.param_groups[2]["lr"].fill_(0.02)
    assert_equal_runs([opt, resumed], 3, 6)


@rows
def test_a_kept_state_dict_does_not_follow_the_learning_rate(backend, row):
    lr = torch.tensor(0.02, device=backend.device)
    opt = make(row, make_params(backend), backend, lr=lr)
    kept = opt.state_dict()
    lr.fill_(0.9)
    assert float(kept["param_groups"][0]["lr"]) == pytest.approx(0.02)


@rows
def test_loading_keeps_every_address_and_the_tensor_lr(backend, row):
    lr = torch.tensor(0.02, device=backend.device)
    opt = make(row, make_params(backend), backend, lr=lr)
    for k in range(3):
        update(params_of(opt), opt, k)
    checkpoint = through_file(opt.state_dict())
    tensors = [t for p in params_of(opt) for t in opt.state[p].values()]
    tensors += [opt.schedule_buffer.values, opt.schedule_buffer.step, opt.param_groups[0]["lr"]]
    addresses = [tensor.data_ptr() for tensor in tensors]
    before = [tensor.clone() for tensor in tensors]
    update(params_of(opt), opt, 3)
    lr.fill_(0.9)
    opt.load_state_dict(checkpoint)
    assert opt.param_groups[0]["lr"] is lr
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert all(torch.equal(tensor, b) for tensor, b in zip(tensors, before, strict=True))


@rows
def test_a_checkpoint_of_a_new_optimizer_resets_a_used_one(backend, row):
    opt = make(row, make_params(backend), backend, lr=REX)
    checkpoint = through_file(opt.state_dict())
    for k in range(3):
        update(params_of(opt), opt, k)
    opt.load_state_dict(checkpoint)
    fresh = make(row, copies(params_of(opt)), backend, lr=REX)
    assert_equal_runs([fresh, opt], 0, 3)


def test_a_longer_schedule_takes_over_an_optimizer_in_use(backend):
    """Its rows are new, and with them the step that the kernels read."""
    saved = make("AdamW", make_params(backend), backend, lr=REX)
    for k in range(3):
        update(params_of(saved), saved, k)
    opt = make("AdamW", copies(params_of(saved)), backend, lr=0.5)
    update(params_of(opt), opt, 0)
    for param, other in zip(params_of(opt), params_of(saved), strict=True):
        param.data.copy_(other.data)
    capacity = opt.schedule_buffer.capacity
    opt.load_state_dict(through_file(saved.state_dict()))
    assert opt.schedule_buffer.capacity > capacity
    assert_equal_runs([saved, opt], 3, 6)


def test_a_longer_schedule_is_refused_while_a_graph_reads_the_rows(backend):
    saved = make("AdamW", make_params(backend), backend, lr=REX)
    opt = make("AdamW", copies(params_of(saved)), backend, lr=0.5)
    update(params_of(opt), opt, 0)
    opt._preparation.was_captured = True
    before = [param.detach().clone() for param in params_of(opt)]
    with pytest.raises(RuntimeError, match="a CUDA graph reads the present ones"):
        opt.load_state_dict(saved.state_dict())
    assert all(map(torch.equal, before, params_of(opt)))
    assert opt.param_groups[0]["lr"] == 0.5
    assert opt.schedule_buffer.step.item() == 1


@pytest.mark.parametrize(
    ("row", "missing"),
    [("Adam", "exp_avg_sq"), ("AdamW", "exp_avg"), ("AdamW", "step"), ("LAMB", "exp_avg_sq")],
)
def test_a_state_that_lacks_a_part_is_refused(backend, row, missing):
    """torch fails at the first step. What is missing must not begin at 0 beside the others."""
    opt = make(row, make_params(backend), backend, lr=0.5)
    update(params_of(opt), opt, 2)
    saved = through_file(opt.state_dict())
    del saved["state"][1][missing]
    before = through_file(opt.state_dict())
    with pytest.raises(ValueError, match=f"but not {missing}: the checkpoint belongs to another"):
        opt.load_state_dict(saved)
    torch.testing.assert_close(opt.state_dict()["state"], before["state"], rtol=0, atol=0)
    saved["state"][1].clear()  # starts anew
    opt.load_state_dict(saved)
    update(params_of(opt), opt, 3)
    assert [state["step"].item() for state in opt.state.values()] == [2, 1, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [("exp_avg", [1.0, 2.0]), ("step", None), ("step", "3"), ("step", torch.ones(2))],
    ids=str,
)
def test_a_state_of_another_kind_is_refused(backend, name, value):
    opt = make("AdamW", make_params(backend), backend, lr=REX)
    update(params_of(opt), opt, 2)
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["state"][1][name] = value
    before = {key: array.clone() for key, array in opt.state[params_of(opt)[1]].items()}
    with pytest.raises(ValueError, match=f"the loaded {name} is no .*belongs to another optimizer"):
        opt.load_state_dict(checkpoint)
    after = opt.state[params_of(opt)[1]]
    assert all(torch.equal(after[key], array) for key, array in before.items())


@rows
def test_states_of_inference_mode_are_loaded_into(backend, row):
    opt, other = (make(row, make_params(backend), backend, lr=REX) for _ in range(2))
    with torch.inference_mode():
        update(params_of(opt), opt, 2)
        checkpoint = copy.deepcopy(opt.state_dict())
        update(params_of(opt), opt, 3)
        other.load_state_dict(checkpoint)
    for loading in (opt, other):
        loading.load_state_dict(checkpoint)
        assert loading.schedule_buffer.step.item() == 1
        for index, param in enumerate(params_of(loading)):
            saved = checkpoint["state"].get(index, {})
            assert all(torch.equal(loading.state[param][key], saved[key]) for key in saved)


@pytest.mark.parametrize("before", [torch.Tensor.to_sparse, torch.Tensor.to_dense])
@pytest.mark.parametrize("after", [torch.Tensor.to_sparse, torch.Tensor.to_dense])
def test_a_tensor_of_another_layout_that_somebody_else_keeps_is_loaded(before, after):
    param = torch.zeros(2, requires_grad=True)
    opt = lrs_ext.AdamW([param], lr=REX)
    update([param], opt, 1)
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["state"][0]["mask"] = after(torch.eye(2))
    opt.state[param]["mask"] = before(torch.eye(2).mul(3.0))
    opt.load_state_dict(checkpoint)
    assert torch.equal(opt.state[param]["mask"].to_dense(), torch.eye(2))


def test_a_checkpoint_of_lion_does_not_serve_adamw(backend):
    saved = make("Lion", make_params(backend), backend, lr=0.5)
    update(params_of(saved), saved, 2)
    opt = make("AdamW", make_params(backend), backend, lr=0.5)
    with pytest.raises(ValueError, match="has step, exp_avg, but not exp_avg_sq"):
        opt.load_state_dict(saved.state_dict())


@rows
def test_states_of_16_bit_parameters_are_loaded_in_float32(backend, row):
    opt = make(row, make_params(backend, torch.bfloat16), backend, lr=REX)
    for k in range(3):
        update(params_of(opt), opt, k)
    resumed = make(row, copies(params_of(opt)), backend, lr=REX)
    resumed.load_state_dict(opt.state_dict())
    for param, other in zip(params_of(resumed), params_of(opt), strict=True):
        for name, tensor in resumed.state.get(param, {}).items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, opt.state[other][name])
            assert tensor.data_ptr() != opt.state[other][name].data_ptr()


@pytest.mark.gpu
@rows
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")], ids=str)
def test_checkpoints_move_between_devices(row, devices):
    backends = [cases.Backend(device, device) for device in devices]
    opts = [make(row, make_params(backend), backend, lr=REX) for backend in backends]
    for opt in opts:
        for k in range(3):
            update(params_of(opt), opt, k)
    opts[1].load_state_dict(through_file(opts[0].state_dict()))
    for param, other in zip(params_of(opts[0]), params_of(opts[1]), strict=True):
        for name, tensor in opts[0].state.get(param, {}).items():
            assert opts[1].state[other][name].device == other.device
            assert torch.equal(opts[1].state[other][name].cpu(), tensor.cpu())


# Copies.


@rows
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_to_the_bit_and_share_nothing(backend, row, steps, copied):
    params = make_params(backend)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]
    opt = make(row, groups, backend, lr=REX)
    for k in range(steps):
        update(params, opt, k)
    opt.param_groups[1]["lr"] = 0.04
    other = copied(opt)
    assert type(other) is type(opt)
    assert other.backend == opt.backend
    update(params_of(other), other, steps)
    assert opt.schedule_buffer.step.item() == steps
    update(params, opt, steps)
    assert_equal_runs([opt, other], steps + 1, steps + 4)


# Distributed checkpoints, which step an optimizer without states to create them.


class Model(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        a, b, c = make_params(backend)
        self.a, self.b, self.c = (torch.nn.Parameter(p.detach()) for p in (a, b, c))
        self.frozen = torch.nn.Parameter(torch.ones(3, device=backend.device), requires_grad=False)


@rows
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("lr", [REX, 0.05, torch.tensor(0.05)], ids=["schedule", "float", "tensor"])
def test_asking_for_a_distributed_state_dict_moves_nothing(backend, row, steps, lr):
    model, untouched = Model(backend), Model(backend)
    opts = [make(row, m.parameters(), backend, lr=copy.deepcopy(lr)) for m in (model, untouched)]
    for k in range(steps):
        for opt in opts:
            update(params_of(opt)[:3], opt, k)
            opt.zero_grad()
    state_dict = dcp.get_optimizer_state_dict(model, opts[0])
    assert opts[0].schedule_buffer.step.item() == steps
    for state in state_dict["state"].values():
        assert state.get("step", torch.tensor(0)) <= steps
    for param, other in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(param, other)
    for k in range(steps, steps + 3):
        for opt in opts:
            update(params_of(opt)[:3], opt, k)
        for param, other in zip(model.parameters(), untouched.parameters(), strict=True):
            assert torch.equal(param, other)
    assert opts[0].current_lr() == opts[1].current_lr()


@pytest.mark.parametrize("row", ["SGD momentum", "Adam", "AdamW", "Lion", "LAMB"])
def test_resuming_through_a_distributed_state_dict_is_exact(backend, row):
    model = Model(backend)
    opt = make(row, model.parameters(), backend, lr=REX)
    for k in range(4):
        update(params_of(opt)[:3], opt, k)
    state_dict = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt))
    resumed_model = Model(backend)
    resumed_model.load_state_dict(model.state_dict())
    resumed = make(row, resumed_model.parameters(), backend, lr=REX)
    dcp.set_optimizer_state_dict(resumed_model, resumed, state_dict)
    for k in range(4, 10):
        for o in (opt, resumed):
            update(params_of(o)[:3], o, k)
        assert opt.current_lr() == resumed.current_lr() == [float(torch.tensor(REX(k + 1)))]
        for param, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
            assert torch.equal(param, other)
