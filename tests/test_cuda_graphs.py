"""Steps in CUDA graphs on a GPU: replays do as eager steps do."""

import dataclasses

import cases
import pytest
import torch
from moving import with_schedules
from test_cuda import SHAPES, dtypes, state_updates, sync_is_an_error

import lrs_ext
from lrs_ext.backends import unavailable_reason

pytestmark = pytest.mark.gpu


@dtypes
@state_updates
def test_a_captured_step_replays_a_schedule_as_eager_steps_do(row, dtype):
    steps, warmup = 12, 3
    schedule = lrs_ext.rex(row.lr, steps, warmup_steps=5, min_lr=row.lr / 10)
    eager, replayed = (Captured(row, schedule, dtype, first) for first in (steps + 2, warmup))
    for k in range(steps + 2):  # two more than the schedule has
        torch.manual_seed(k)
        gradients = [torch.randn(shape).to("cuda", dtype) for shape in SHAPES]
        eager.step(k, gradients)
        replayed.step(k, gradients)
        for a, b in zip(eager.tensors(), replayed.tensors(), strict=True):
            assert torch.equal(a, b)
    assert replayed.opt.schedule_buffer.step.item() == steps + 2
    assert replayed.graph is not None


@pytest.mark.parametrize("row", cases.MOVING, ids=str)
def test_numbers_that_move_do_so_in_a_captured_step(row):
    update = dataclasses.replace(row.update, options=with_schedules(row))
    schedule = lrs_ext.rex(update.lr, 9)
    eager, replayed = (Captured(update, schedule, torch.float32, first) for first in (12, 3))
    changes = {6: lrs_ext.linear(0.5, 500), 9: 0.25}
    for k in range(12):
        torch.manual_seed(k)
        gradients = [torch.randn(shape).cuda() for shape in SHAPES]
        for run in (eager, replayed):
            if k in changes:
                run.opt.param_groups[0]["weight_decay"] = changes[k]
                with sync_is_an_error():
                    run.opt.sync_groups()
            run.step(k, gradients)
        for a, b in zip(eager.tensors(), replayed.tensors(), strict=True):
            assert torch.equal(a, b)
    assert replayed.graph is not None


class Captured:
    """An optimizer whose steps from number `first` on are replays of one captured step."""

    def __init__(self, row, schedule, dtype, first):
        torch.manual_seed(0)
        self.params = [torch.randn(s).to("cuda", dtype).requires_grad_() for s in SHAPES]
        for param in self.params:
            param.grad = torch.zeros_like(param)
        self.opt = getattr(lrs_ext, row.name)(
            self.params, lr=schedule, backend="cuda", **row.options
        )
        self.first, self.graph = first, None

    def step(self, k, gradients):
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad.copy_(gradient)
        if k < self.first:
            self.opt.step()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.opt.step()
        self.graph.replay()

    def tensors(self):
        states = [self.opt.state.get(param, {}) for param in self.params]
        return [*self.params, *(tensor for state in states for tensor in state.values())]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_graph_with_the_backward_pass_reads_its_own_gradients(backend):
    reason = unavailable_reason(backend, "cuda")
    if reason is not None:
        pytest.skip(reason)
    param, factor = (
        torch.ones(1000, device="cuda", requires_grad=True),
        torch.ones((), device="cuda"),
    )
    opt = lrs_ext.SGD([param], lr=1.0, backend=backend)

    def train():
        opt.zero_grad()
        (param * factor).sum().backward()
        opt.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    captured = param.grad
    param.grad = None
    train()  # with a gradient elsewhere
    others = [torch.zeros(1, dtype=torch.int64).pin_memory() for _ in range(64)]
    factor.fill_(2.0)
    for _ in range(3):
        graph.replay()
    assert torch.equal(param, torch.full_like(param, 1.0 - 1.0 - 1.0 - 3 * 2.0))
    assert torch.equal(captured, torch.full_like(captured, 2.0))
    assert not any(other.any() for other in others)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_graph_of_more_tensors_than_few_arguments_hold(backend):
    reason = unavailable_reason(backend, "cuda")
    if reason is not None:
        pytest.skip(reason)
    params = [torch.ones(3, device="cuda", requires_grad=True) for _ in range(600)]
    for param in params:
        param.grad = torch.ones_like(param)
    opt = lrs_ext.SGD(params, lr=lrs_ext.linear(1.0, 4), backend=backend)
    opt.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for _ in range(2):
        graph.replay()
    assert torch.stack(params).eq(1.0 - 1.0 - 0.75 - 0.5).all()


def test_a_step_is_captured_while_the_host_waits_to_know_of_an_earlier_one():
    """Whether that was skipped is on its way: to ask for it would end the capture."""
    param = torch.zeros(3, device="cuda", requires_grad=True)
    param.grad = torch.ones_like(param)
    opt = lrs_ext.SGD([param], lr=lrs_ext.linear(1.0, 4))
    opt.step()
    opt.found_inf = torch.ones((), device="cuda")
    opt.step()
    del opt.found_inf
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    graph.replay()
    assert torch.equal(param, torch.full_like(param, -1.0 - 0.75))
    assert opt.current_lr() == [0.5]
    assert opt.param_groups[0]["lr"] == 0.5


def test_a_graph_has_both_the_norm_and_the_step():
    """Replays of one alone would clip by the norm of the capture, or not at all."""
    param = torch.zeros(3, device="cuda", requires_grad=True)
    param.grad = torch.ones_like(param)
    opt = lrs_ext.SGD([param], lr=1.0)
    opt.step()
    lrs_ext.clip_grad_norm_(opt, 0.5)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=r"the step is in the capture .*, clip_grad_norm_ is not"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lrs_ext.clip_grad_norm_(opt, 0.5)
    graph.replay()
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_ is in the capture .*, the step"):
        opt.step()
    assert torch.equal(param, torch.full_like(param, -1.0))
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        lrs_ext.clip_grad_norm_(opt, 0.5)
        opt.step()
    for k in range(1, 4):
        graph.replay()
        assert (param + 1.0).norm().item() == pytest.approx(0.5 * k, rel=1e-5)


def test_a_graph_has_both_a_release_of_gradients_and_the_step():
    """Replays of the backward pass alone would leave the schedule where it is."""
    param = torch.zeros(3, device="cuda", requires_grad=True)
    opt = lrs_ext.SGD([param], lr=lrs_ext.linear(1.0, 4))
    opt.step_in_backward()

    def backward():
        param.sum().backward()

    def train():
        backward()
        opt.step()

    train()
    captured(backward).replay()
    with pytest.raises(RuntimeError, match=r"step_in_backward is in the capture .*, the step is"):
        opt.step()
    graph = captured(train)
    for _ in range(2):
        graph.replay()
    assert torch.equal(param, torch.full_like(param, -1.0 - 0.75 - 0.75 - 0.5))


def test_training_goes_on_after_a_capture_that_has_failed():
    param = torch.zeros(3, device="cuda", requires_grad=True)
    opt = lrs_ext.SGD([param], lr=torch.tensor(0.5, device="cuda"))
    opt.step_in_backward()

    def backward():
        param.sum().backward()

    def fail():
        backward()
        raise KeyError

    backward()
    opt.step()
    with pytest.raises(KeyError):
        captured(fail)
    opt.forget_graphs()
    for train in (backward, opt.step):
        train()
    graph = captured(lambda: [backward(), opt.step()])
    graph.replay()
    assert torch.equal(param, torch.full_like(param, -1.5))


def test_a_step_at_a_learning_rate_of_0_is_captured():
    param = torch.zeros(3, device="cuda", requires_grad=True)
    param.grad = torch.ones_like(param)
    opt = lrs_ext.SGD([param], lr=0.0)
    opt.step()
    graph = captured(opt.step)
    opt.param_groups[0]["lr"] = 0.5
    opt.sync_groups()
    graph.replay()
    assert torch.equal(param, torch.full_like(param, -0.5))


def test_a_number_on_the_gpu_is_refused():
    param = torch.nn.Parameter(torch.ones(8, device="cuda"))
    param.grad = torch.ones_like(param)
    opt = lrs_ext.AdamW([param], weight_decay=torch.tensor(0.1, device="cuda"))
    opt.step()
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="weight_decay of group 0 would be read from the GPU"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        opt.step()


def test_a_capture_that_fails_leaves_eager_steps_as_they_were():
    params = [torch.nn.Parameter(torch.ones(8, device="cuda")) for _ in range(2)]
    lr, decay = lrs_ext.rex(0.1, 10), lrs_ext.linear(0.1, 10)
    eager, failed = (lrs_ext.AdamW([param], lr=lr, weight_decay=decay) for param in params)

    def fail():
        failed.step()
        raise KeyError

    for k in range(4):
        for param, opt in zip(params, (eager, failed), strict=True):
            param.grad = torch.full_like(param, k + 1.0)
            opt.step()
        if k == 1:
            torch.cuda.synchronize()
            with pytest.raises(KeyError), torch.cuda.graph(torch.cuda.CUDAGraph()):
                fail()
            failed.forget_graphs()
        assert torch.equal(*params)
        for key in ("lr", "weight_decay"):
            assert failed.param_groups[0][key] == eager.param_groups[0][key]
    assert failed.current_lr() == eager.current_lr()


def test_replays_go_on_from_a_checkpoint_that_is_loaded():
    params = [torch.zeros(3, device="cuda", requires_grad=True) for _ in range(2)]
    opts = [lrs_ext.AdamW([param], lr=lrs_ext.rex(0.1, 9)) for param in params]
    for param, opt in zip(params, opts, strict=True):
        param.grad = torch.ones_like(param)
        unused = opt.state_dict()
        opt.step()
    graph = captured(opts[1].step)
    for k in range(6):
        if k == 3:
            opts[1].load_state_dict(opts[0].state_dict())
            params[1].data.copy_(params[0])
        opts[0].step()
        graph.replay()
    assert torch.equal(*params)
    with pytest.raises(RuntimeError, match="the checkpoint has no exp_avg"):
        opts[1].load_state_dict(unused)


def test_replays_read_a_tensor_and_what_takes_its_place():
    param = torch.zeros((), device="cuda", requires_grad=True)
    param.grad = torch.full_like(param, -1.0)
    lr = torch.tensor(0.5, device="cuda")
    opt = lrs_ext.SGD([param], lr=lr.double())
    opt.step()
    with pytest.raises(RuntimeError, match="make it float32 on the parameters' device, or a float"):
        captured(opt.step)
    with pytest.raises(RuntimeError, match="make it float32 on the parameters' device, or a float"):
        captured(opt.lr_tensor, 0)
    opt.param_groups[0]["lr"] = lr
    opt.step()
    graph = captured(opt.step)
    lr.fill_(0.25)
    graph.replay()
    assert param.item() == 1.25
    opt.param_groups[0]["lr"] = 0.125
    opt.sync_groups()
    graph.replay()
    assert param.item() == 1.375


@pytest.mark.two_gpus
def test_a_graph_is_captured_on_the_gpu_of_the_step():
    """Otherwise the step would be made once, in the capture, and not in the replays."""
    with torch.cuda.device(1):
        param = torch.zeros(3, device="cuda", requires_grad=True)
        param.grad = torch.ones_like(param)
        opt = lrs_ext.SGD([param], lr=1.0)
        opt.step()
        torch.cuda.synchronize()
        with (
            pytest.raises(RuntimeError, match="captured on cuda:0, and a step on cuda:1 would"),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream("cuda:0")),
        ):
            opt.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream("cuda:1")):
            opt.step()
        graph.replay()
        assert torch.equal(param, torch.full_like(param, -2.0))


def changed_lr(opt):
    opt.param_groups[0]["lr"] = 0.5
    opt.sync_groups()


def captured(step, *arguments):
    """Returns the graph of what `step` does, after what has gone before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*arguments)
    return graph


CHANGES = {
    "lr": changed_lr,
    "schedule": lambda opt: opt.set_schedule(lrs_ext.rex(0.1, 4)),
    "table": lambda opt: opt.set_schedule(lrs_ext.from_values([0.1, 0.2])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_does_not_write_learning_rates(change):
    """Each replay would do so again, whatever the host has put there since."""
    param = torch.zeros(3, device="cuda", requires_grad=True)
    param.grad = torch.ones_like(param)
    opt = lrs_ext.SGD([param], lr=lrs_ext.linear(1.0, 4))
    opt.step()
    with pytest.raises(
        RuntimeError, match=r"before the capture|the capture of a CUDA graph, whose"
    ):
        captured(CHANGES[change], opt)
    CHANGES[change](opt)
    lr = opt.current_lr()[0]
    captured(opt.step).replay()
    assert param[0].item() == pytest.approx(-1.0 - lr)


def test_the_operator_refuses_to_be_captured():
    weight, gradient, lr = (torch.ones(3, device="cuda") for _ in range(3))
    count, position = torch.zeros((), device="cuda"), torch.tensor(0, device="cuda")
    arguments = ("sgd", [weight], [gradient], [], [count], lr, position, [0.0] * 5)
    lrs_ext.functional.step(*arguments)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        lrs_ext.functional.step(*arguments)
    assert int(position) == 1
