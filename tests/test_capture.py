"""What is checked while a step is captured into a CUDA graph, and afterwards, on any machine."""

import cases
import pytest
import torch

import lrs_ext
from lrs_ext import capture_checks, ops
from lrs_ext.backends import unavailable_reason

optimizers = pytest.mark.parametrize("name", cases.OPTIMIZERS)


@pytest.fixture
def capture(monkeypatch):
    """Makes optimizers on the CPU believe that the current stream is being captured."""

    def begin(opt):
        monkeypatch.setattr(opt._preparation, "_is_on_gpu", True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

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


def test_a_capture_is_no_update(capture):
    """There is none before the first replay."""
    _, opt = make("SGD", momentum=lrs_ext.linear(0.9, total_steps=10))
    shown = dict(opt.param_groups[0])
    capture(opt)
    opt.step()
    assert opt.param_groups[0] == shown
    assert opt.committed_steps == 1


def test_a_tensor_that_is_copied_is_not_captured(capture):
    """Each replay would copy it over whatever takes its place."""
    lr = torch.tensor(0.5)
    params, opt = make("SGD", lr=lr.double())
    capture(opt)
    assert_refused(params, opt, "make it float32 on the parameters' device, or a float")
    with pytest.raises(RuntimeError, match="make it float32 on the parameters' device, or a float"):
        opt.lr_tensor(0)
    capture.end()
    opt.param_groups[0]["lr"] = lr
    opt.sync_groups()
    capture(opt)
    opt.step()
    assert opt.was_captured


@optimizers
def test_nobody_looks_for_gradients_in_a_capture(capture, name, monkeypatch):
    """To see whether a step at a learning rate of 0 counts is to wait, which ends the capture."""
    _, opt = make(name, lr=0.0)
    monkeypatch.setattr(opt._steps, "_are_zeroed", lambda groups: pytest.fail("waits"))
    capture(opt)
    opt.step()
    assert opt.was_captured


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
    with pytest.raises(RuntimeError, match="call sync_groups\\(\\) before the capture"):
        opt.sync_groups()
    if key == "lr":
        with pytest.raises(RuntimeError, match="call sync_groups\\(\\) before the capture"):
            opt.lr_tensor()
    capture.end()
    opt.sync_groups()
    capture(opt)
    opt.sync_groups()
    opt.step()
    assert opt.was_captured


@pytest.mark.parametrize("key", ["weight_decay", "betas"])
def test_a_number_on_the_device_is_not_read_in_a_capture(capture, key):
    params, opt = make("AdamW")
    number = torch.empty((), device="meta")  # which nobody can read
    opt.param_groups[0][key] = (number, number) if key == "betas" else number
    capture(opt)
    assert_refused(params, opt, "of group 0 would be read from the GPU.*make it a float")


def test_clipping_is_checked_as_the_step_is(capture):
    params, opt = make("AdamW", steps=0)
    set_gradients(params)
    capture(opt)
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        lrs_ext.clip_grad_norm_(opt, 1.0)
    assert not opt.state
    capture.end()
    opt.step()
    capture(opt)
    opt.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(RuntimeError, match="call sync_groups\\(\\) before the capture"):
        lrs_ext.clip_grad_norm_(opt, 1.0)
    capture.end()
    opt.sync_groups()
    capture(opt)
    lrs_ext.clip_grad_norm_(opt, 1.0)
    opt.step()
    assert opt.was_captured


@pytest.mark.parametrize("is_captured", [True, False])
def test_a_norm_is_taken_where_the_step_is(capture, is_captured):
    """Replays of one alone would clip by the norm of the capture, or not at all."""
    params, opt = make("AdamW")
    if is_captured:
        capture(opt)
    lrs_ext.clip_grad_norm_(opt, 1.0)
    if is_captured:
        capture.end()
    else:
        capture(opt)
    assert_refused(params, opt, "is in the capture of a CUDA graph, .* is not")
    opt.step()  # without a limit


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
    CHANGES[change](params[0], opt)
    before = values(params, opt)
    with pytest.raises(RuntimeError, match="call forget_graphs\\(\\), make a step and capture"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values(params, opt), strict=True))
    opt.forget_graphs()
    opt.step()
    assert opt.schedule_buffer.step.item() == 3


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_stay_where_they_are_from_the_step_to_the_capture(capture, change):
    params, opt = make("AdamW")
    CHANGES[change](params[0], opt)
    set_gradients(params)
    capture(opt)
    assert_refused(params, opt, "make a step before the capture")
    capture.end()
    opt.step()
    capture(opt)
    opt.step()
    assert opt.was_captured


@optimizers
def test_states_are_not_made_in_a_capture(capture, name):
    params, opt = make(name, steps=0)
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    set_gradients(params)
    capture(opt)
    assert_refused(params, opt, "make a step before the capture")
    assert not opt.state.get(params[1])
    assert params[1] not in opt.step_counters


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
@pytest.mark.parametrize("kept", [0, 1])
def test_a_captured_step_loses_no_states_to_a_checkpoint(capture, name, kept):
    """Replays would go on with those that it had, and nobody would look at them any more."""
    params, opt = make(name)
    checkpoint = opt.state_dict()
    capture(opt)
    opt.step()
    capture.end()
    opt.load_state_dict(checkpoint)
    before = values(params, opt)
    fewer = dict(list(checkpoint["state"].items())[:kept])
    with pytest.raises(RuntimeError, match=r"the checkpoint has no exp_avg.* CUDA graph would"):
        opt.load_state_dict({**checkpoint, "state": fewer})
    assert all(torch.equal(a, b) for a, b in zip(before, values(params, opt), strict=True))
    opt.forget_graphs()
    opt.load_state_dict({**checkpoint, "state": fewer})
    assert len(opt.state) == kept


STATE_OPTIONS = {"SGD": ("momentum", 0.9, 0.0), "AdamW": ("amsgrad", False, True)}


@pytest.mark.parametrize("name", STATE_OPTIONS)
def test_a_captured_step_keeps_its_states(capture, name):
    option, before, after = STATE_OPTIONS[name]
    params, opt = make(name, **{option: before})
    capture(opt)
    set_gradients(params)
    opt.step()
    capture.end()
    table = opt._preparation.tables.all[0].table
    opt.param_groups[0][option] = after
    for changed in (opt.sync_groups, opt.step):
        with pytest.raises(RuntimeError, match="decides which states a parameter has"):
            changed()
        assert opt._preparation.tables.all[0].table is table
    opt.forget_graphs()
    opt.step()
    assert opt.schedule_buffer.step.item() == 3


def test_a_captured_schedule_buffer_stays(capture):
    params, opt = make("AdamW", lr=0.1)
    capture(opt)
    set_gradients(params)
    opt.step()
    buffer = opt.schedule_buffer
    opt.reserve_(buffer.capacity)
    with pytest.raises(RuntimeError, match="reads the schedule buffer as it is"):
        opt.reserve_(buffer.capacity + 1)
    assert opt.schedule_buffer is buffer
    opt.forget_graphs()
    opt.reserve_(buffer.capacity + 1)


def backward(params):
    sum((2.0 * param).sum() for param in params).backward()


def test_a_release_of_gradients_is_captured(capture):
    params, opt = make("AdamW", steps=0)
    opt.step_in_backward()
    capture(opt)
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        backward(params)
    assert not opt.state
    capture.end()
    for param in params:
        param.grad = None
    backward(params)
    opt.step()
    opt.param_groups[0]["weight_decay"] = 0.5
    capture(opt)
    with pytest.raises(RuntimeError, match="call sync_groups\\(\\) before the capture"):
        backward(params)
    capture.end()
    opt.sync_groups()
    capture(opt)
    for param in params:
        param.grad = None
    backward(params)
    opt.step()
    assert opt.was_captured
    capture.end()
    params[0].data = params[0].data.clone()
    with pytest.raises(RuntimeError, match="since a CUDA graph captured the step"):
        backward(params)


@pytest.mark.parametrize("is_captured", [True, False])
def test_a_release_is_captured_with_the_step(capture, is_captured):
    """Replays of the backward pass alone would leave the schedule where it is."""
    params, opt = make("AdamW", steps=0)
    opt.step_in_backward()
    backward(params)
    opt.step()
    if is_captured:
        capture(opt)
    backward(params)
    if is_captured:
        capture.end()
    else:
        capture(opt)
    assert_refused(params, opt, "is in the capture of a CUDA graph, .* is not")
    backward(params)
    opt.step()
    assert opt.schedule_buffer.step.item() == 2


def test_a_capture_that_has_failed_leaves_no_norm(capture):
    params, opt = make("SGD", lr=1.0)
    capture(opt)
    lrs_ext.clip_grad_norm_(opt, 0.5)
    capture.end()
    opt.forget_graphs()
    opt.step()
    assert all(torch.equal(param, torch.full_like(param, -1.0)) for param in params)
    lrs_ext.clip_grad_norm_(opt, 0.5)
    opt.forget_graphs()
    opt.step()  # limited as it is to be
    assert torch.cat([param.flatten() + 1.0 for param in params]).norm().item() < 0.501


def test_a_capture_that_has_failed_leaves_no_released_gradients(capture):
    params, opt = make("SGD", steps=0)
    opt.step_in_backward()
    backward(params)
    opt.step()
    for message in ("a second gradient .*, and forget_graphs\\(\\) after a capture", None):
        capture(opt)
        backward(params)
        capture.end()
        if message is not None:
            with pytest.raises(RuntimeError, match=message):
                backward(params)
            for param in params:
                param.grad = None
        opt.forget_graphs()
    backward(params)
    opt.step()
    assert opt.schedule_buffer.step.item() == 2
    backward(params)
    opt.forget_graphs()
    opt.step()
    assert opt.schedule_buffer.step.item() == 3


def test_the_operator_stays_out_of_graphs():
    assert torch.Tag.cudagraph_unsafe in torch.ops.lrs_ext.step.default.tags


def test_a_capture_on_another_gpu_is_refused():
    first, second = (torch.device("cuda", index) for index in range(2))
    capture_checks.check_device(first, 0)
    capture_checks.check_device(torch.device("cpu"), 0)
    with pytest.raises(
        RuntimeError, match=r"captured on cuda:0, and a step on cuda:1 would not be"
    ):
        capture_checks.check_device(second, 0)


def test_what_the_host_follows_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    capture_checks.check_outside("auto.step()", torch.device("cpu"))
    with pytest.raises(
        RuntimeError, match=r"auto.step\(\) cannot be captured .* after each replay"
    ):
        capture_checks.check_outside("auto.step()", torch.device("cuda"))


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


@pytest.mark.parametrize("move", [list.reverse, list.pop, lambda groups: groups.append(groups[0])])
def test_groups_that_have_moved_are_refused(capture, move):
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    opt = lrs_ext.SGD([{"params": [param]} for param in params], lr=0.1)
    for param in params:
        param.grad = torch.ones(3)
    opt.step()
    buffer = opt.schedule_buffer
    move(opt.param_groups)
    capture(opt)
    with pytest.raises(RuntimeError, match="groups have been added, removed or put in another ord"):
        opt.step()
    assert opt._numbers.rates.buffer is buffer


@pytest.fixture
def triton_capture(capture, monkeypatch):
    """As `capture`, of a step by Triton's kernels, which may pin no memory in it."""
    if unavailable_reason("triton", "cpu") is not None:
        pytest.skip("needs Triton's interpreter")

    def refuse(*_):
        raise AssertionError("memory is pinned in a capture")

    def begin(opt):
        table = opt._preparation.tables.all[0].table
        capture(opt)
        monkeypatch.setattr(table, "_is_being_captured", lambda: True)
        monkeypatch.setattr(ops, "_pinned", refuse)
        return table

    begin.end = capture.end
    return begin


def addresses_of(params):
    return [param.grad.data_ptr() for param in params]


def test_a_graph_of_triton_kernels_keeps_the_addresses_that_it_copies(triton_capture):
    params, opt = make("SGD", backend="triton")
    set_gradients(params)
    table = triton_capture(opt)
    opt.step()
    [captured] = table._captured_addresses
    assert captured.tolist() == addresses_of(params)
    expected = captured.clone()
    triton_capture.end()
    kept = [param.grad for param in params]  # or their memory would be used again
    set_gradients(params)
    opt.step()
    assert torch.equal(captured, expected)
    assert table._gradients.tolist() == addresses_of(params)
    assert kept[0] is not params[0].grad


def test_every_graph_of_triton_kernels_has_its_own_addresses(triton_capture):
    params, opt = make("SGD", backend="triton")
    found, kept = [], []
    for _ in range(2):
        set_gradients(params)
        opt.step()
        table = triton_capture(opt)
        lrs_ext.clip_grad_norm_(opt, 1.0)
        opt.step()  # from the same addresses
        triton_capture.end()
        found.append(addresses_of(params))
        kept += [param.grad for param in params]
    assert [captured.tolist() for captured in table._captured_addresses] == found
