"""What is checked while a step is captured into a CUDA graph, and afterwards, on any machine."""

import cases
import pytest
import torch

import lrs_ext

optimizers = pytest.mark.parametrize("name", cases.OPTIMIZERS)


@pytest.fixture
def capture(monkeypatch):
    """Makes optimizers on the CPU believe that the current stream is being captured."""

    def begin(opt):
        opt._is_on_gpu = True
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    begin.end = monkeypatch.undo
    return begin


def make(name, steps=1, **options):
    params = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    opt = getattr(lrs_ext, name)(params, **{"lr": lrs_ext.rex(0.1, total_steps=10)} | options)
    for _ in range(steps):
        set_gradients(params)
        opt.step()
    return params, opt


def set_gradients(params):
    for param in params:
        param.grad = torch.ones_like(param)


def values(params, opt):
    states = [t for p in params for t in opt.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*params, *states, opt.schedule_buffer.step)]


def assert_refused(params, opt, message):
    before = values(params, opt)
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values(params, opt), strict=True))
    assert not opt.was_captured


@optimizers
def test_a_step_after_a_first_one_is_captured(capture, name):
    params, opt = make(name)
    capture(opt)
    set_gradients(params)  # elsewhere in memory
    opt.step()
    assert opt.was_captured
    assert opt.schedule_buffer.step.item() == 2


@optimizers
def test_the_first_step_cannot_be_captured(capture, name):
    params, opt = make(name, steps=0)
    set_gradients(params)
    capture(opt)
    assert_refused(params, opt, "make a step before the capture")


@optimizers
def test_a_parameter_without_a_gradient_cannot_be_captured(capture, name):
    params, opt = make(name)
    params[1].grad = None
    capture(opt)
    assert_refused(params, opt, "1 of 2 parameters have no gradient in the capture")
    params[1].requires_grad_(False)
    opt.step()
    assert opt.was_captured


def test_parameters_with_gaps_cannot_be_captured(capture):
    param = torch.ones(4, 6)[:, ::2].requires_grad_()
    opt = lrs_ext.AdamW([param], lr=0.1)
    set_gradients([param])
    opt.step()
    capture(opt)
    assert_refused([param], opt, "with gaps between their elements contiguous")


NUMBERS = {"float": 0.5, "schedule": lrs_ext.linear(0.5, 10)}


CHANGED = [(key, name) for key in ("lr", "weight_decay", "betas") for name in NUMBERS]


@pytest.mark.parametrize(("key", "number"), [*CHANGED, ("eps", "float")])
def test_new_numbers_are_written_before_the_capture(capture, key, number):
    params, opt = make("AdamW")
    new = NUMBERS[number]
    opt.param_groups[0][key] = (new, 0.9) if key == "betas" else new
    capture(opt)
    set_gradients(params)
    assert_refused(params, opt, "call sync_groups\\(\\) before the capture")
    opt.sync_groups()
    opt.step()
    assert opt.was_captured


CHANGES = {
    "parameter": lambda p, opt: setattr(p, "data", p.data.clone()),
    "state": lambda p, opt: opt.state[p].update(exp_avg=opt.state[p]["exp_avg"].clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_of_a_captured_step_stay_where_they_are(capture, change):
    params, opt = make("AdamW")
    capture(opt)
    set_gradients(params)
    opt.step()
    capture.end()
    opt._is_on_gpu = False
    CHANGES[change](params[0], opt)
    before = values(params, opt)
    with pytest.raises(RuntimeError, match="call forget_graphs\\(\\), make a step and capture"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values(params, opt), strict=True))
    opt.forget_graphs()
    opt.step()
    assert opt.schedule_buffer.step.item() == 3


def test_there_are_no_new_groups_after_a_capture(capture):
    params, opt = make("AdamW")
    capture(opt)
    set_gradients(params)
    opt.step()
    capture.end()
    new = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="a new group is not in the captured CUDA graph"):
        opt.add_param_group({"params": [new]})
    assert len(opt.param_groups) == 1
    opt.forget_graphs()
    opt.add_param_group({"params": [new]})
    assert len(opt.param_groups) == 2
