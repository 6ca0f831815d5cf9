"""The learning rates of AutoLRS: what the device uses, what the host shows, who is in charge."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from test_no_sync import NoReadingMethods, NoReadingOps

import lrs_ext
from lrs_ext.autolrs.rates import rates_of
from lrs_ext.autolrs.ratios import group_ratios
from lrs_ext.autolrs.shapes import Shape

KINDS = {"lrs_ext": lrs_ext.SGD, "torch": torch.optim.SGD}
SHAPE = [1.0, 0.75, 0.5, 0.25]
BUDGET = 12


def shape_at(updates):
    return SHAPE[min(updates, len(SHAPE) - 1)]


def make_shape(device="cpu", at=shape_at):
    return Shape(torch.tensor(SHAPE, dtype=torch.float64, device=device), at)


class Driven:
    """Two 0-d parameters that are 0 with gradient -1 before an update, and then the rate used."""

    def __init__(self, kind="lrs_ext", steps_before=0, device="cpu"):
        self.device = device
        self.params = [torch.zeros((), device=device, requires_grad=True) for _ in range(2)]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(self.params, (0.5, 1.0), strict=True)]
        self.opt = KINDS[kind](groups)
        for _ in range(steps_before):
            self.used()
        self.rates = rates_of(self.opt, group_ratios(self.groups), BUDGET + 1)

    @property
    def groups(self):
        return self.opt.param_groups

    @property
    def shown(self):
        return [float(group["lr"]) for group in self.groups]

    def used(self):
        """Steps once and returns the learning rate that each group's update used."""
        for param in self.params:
            param.data.zero_()
            param.grad = torch.full_like(param, -1.0)
        self.opt.step()
        return [param.item() for param in self.params]

    def update(self):
        used = self.used()
        self.rates.advance()
        return used

    def write(self, rate, is_known=True):
        self.rates.write(torch.tensor(rate, device=self.device), make_shape(self.device))
        if is_known:
            self.show()

    def show(self):
        if self.device == "cuda":
            torch.cuda.synchronize()  # the rate has arrived
        self.rates.show()

    def state_dict(self):
        file = io.BytesIO()
        torch.save({"opt": self.opt.state_dict(), "rates": self.rates.state_dict()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load_state_dict(self, state, order=("opt", "rates")):
        """Loads both; the controller's hook takes the learning rates over again."""
        for name in order:
            if name == "opt":
                self.opt.load_state_dict(state["opt"])
                self.rates.attach()
            else:
                self.rates.load_state_dict(state["rates"], make_shape())
        return self


def expected(rate, updates):
    return [float(np.float32(factor * rate * shape_at(updates))) for factor in (1.0, 2.0)]


ORDERS = [("opt", "rates"), ("rates", "opt")]
both_kinds = pytest.mark.parametrize("kind", KINDS)


# What the device uses


@both_kinds
@pytest.mark.parametrize("steps_before", [0, 1, 30])
def test_an_optimizer_that_has_stepped_follows_every_write(kind, steps_before):
    d = Driven(kind, steps_before)
    for rate in (0.5, 0.25):
        d.write(rate)
        assert [d.update() for _ in range(6)] == [expected(rate, k) for k in range(6)]


@both_kinds
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps_before", [0, 30])
@pytest.mark.parametrize("stop", range(4))
def test_a_resumed_run_goes_on_where_it_was(kind, order, steps_before, stop):
    d = Driven(kind, steps_before)
    d.write(0.5)
    for _ in range(stop):
        d.update()
    resumed = Driven(kind).load_state_dict(d.state_dict(), order)
    assert resumed.shown == d.shown
    assert resumed.update() == expected(0.5, stop)
    resumed.show()
    assert resumed.shown == pytest.approx(expected(0.5, stop + 1))
    resumed.write(0.25)
    assert [resumed.update() for _ in range(5)] == [expected(0.25, k) for k in range(5)]


def test_loading_in_the_same_process_keeps_the_addresses():
    d = Driven(steps_before=3)
    d.write(0.5)
    address = d.opt.schedule_buffer.values.data_ptr()
    for _ in range(3):
        d.update()
    d.load_state_dict(d.state_dict())
    assert d.opt.schedule_buffer.values.data_ptr() == address


def test_a_skipped_update_counts():
    d = Driven()
    d.write(0.5)
    d.update()
    d.rates.advance()  # a GradScaler has left out the step
    assert d.shown == pytest.approx(expected(0.5, 2))
    assert d.update() == expected(0.5, 2)


def test_an_update_that_may_have_been_skipped_costs_no_new_row(monkeypatch):
    """A flag on the device decides on updates 1 to 3, and skips 1 and 3."""
    d = Driven()
    d.write(0.5)
    puts = []
    monkeypatch.setattr(d.rates, "_put", lambda: puts.append(True))
    flags = {1: 1.0, 2: 0.0, 3: 1.0}
    for update in range(6):
        if update in flags:
            d.opt.found_inf = torch.tensor(flags[update])
        elif update - 1 in flags:
            del d.opt.found_inf
        used = [0.0, 0.0] if flags.get(update) else expected(0.5, update)
        assert d.update() == used
        assert d.shown == pytest.approx(expected(0.5, update + 1))
        assert d.opt.current_lr() == expected(0.5, update + 1)
    assert not puts
    monkeypatch.undo()
    d.write(0.25)
    assert [d.update() for _ in range(5)] == [expected(0.25, k) for k in range(5)]
    assert not d.rates._is_ahead


@both_kinds
def test_nothing_reads_from_the_device(kind):
    d = Driven(kind)
    rate, shape = torch.tensor(0.5, dtype=torch.float64), make_shape()
    for param in d.params:
        param.grad = torch.ones_like(param)
    with NoReadingOps(), NoReadingMethods():
        d.rates.write(rate, shape)
        d.rates.advance()
        d.rates.show()
        d.rates.scale_(rate)
        found, d.groups[0]["lr"] = d.groups[0]["lr"], 0.0
        d.rates.advance()
        d.rates.write(rate, shape)
        d.groups[0]["lr"] = found
        d.rates.advance()


# What the host shows


def test_the_rate_shown_is_the_rate_used_and_follows_a_new_segment_at_once():
    d = Driven()
    for rate in (0.5, 0.25):
        d.write(rate)
        for _ in range(6):
            shown = d.shown
            assert all(isinstance(group["lr"], float) for group in d.groups)
            assert d.update() == pytest.approx(shown)


def test_a_rate_that_comes_later_is_shown_for_the_present_update():
    d = Driven()
    d.write(0.25)
    d.write(0.5, is_known=False)
    d.update()
    d.update()
    d.show()
    assert d.shown == pytest.approx(expected(0.5, 2))


@pytest.mark.parametrize("stop", range(7))
def test_a_checkpoint_leaves_what_is_shown(stop):
    d = Driven()
    start = d.opt.schedule_buffer.step.clone()
    for update in range(7):
        if update % 3 == 0:  # roll back, as after a trial
            d.opt.schedule_buffer.step.copy_(start)
            d.write(0.5)
        if update == stop:
            d.opt.state_dict()
        assert d.shown == pytest.approx(expected(0.5, update % 3))
        assert d.update() == expected(0.5, update % 3)
        assert d.shown == pytest.approx(expected(0.5, update % 3 + 1))


def test_updates_of_a_replayed_graph_are_shown():
    d = Driven()
    d.write(0.5)
    d.opt._preparation.was_captured = True
    for update in range(1, 4):
        d.opt.schedule_buffer.step.add_(1)  # a replay, which the host does not see
        d.rates.advance()
        assert d.shown == pytest.approx(expected(0.5, update))
        assert d.opt.current_lr() == expected(0.5, update)


def test_committed_steps_only_grow():
    d = Driven()
    d.write(0.5)
    seen = []
    for _ in range(4):
        d.update()
        d.opt.schedule_buffer.step.zero_()
        d.opt.state_dict()
        seen.append(d.opt.committed_steps)
    assert seen == [1, 2, 3, 4]
    assert not d.opt.was_captured


# Who is in charge


@both_kinds
def test_what_the_host_writes_stays_until_it_is_handed_back(kind):
    d = Driven(kind)
    d.write(0.5)
    d.update()
    found, d.groups[0]["lr"] = d.groups[0]["lr"], 0.125
    assert d.update() == [0.125, expected(0.5, 1)[1]]
    d.rates.scale_(torch.tensor(0.5))
    d.show()
    assert d.shown == pytest.approx([0.125, expected(0.25, 2)[1]])
    assert d.update() == [0.125, expected(0.25, 2)[1]]
    d.write(1.0)
    assert d.update() == [0.125, expected(1.0, 0)[1]]
    d.groups[0]["lr"] = found
    if kind == "torch":
        d.rates.advance()  # where it is written, before the next update
        assert d.update() == expected(1.0, 2)
    else:
        assert d.update() == expected(1.0, 1)
        assert d.shown == pytest.approx(expected(1.0, 2))


def test_handing_back_before_a_step_has_seen_it():
    d = Driven()
    d.write(0.5)
    found, d.groups[0]["lr"] = d.groups[0]["lr"], 0.0
    d.write(0.25)
    d.groups[0]["lr"] = found
    assert d.update() == expected(0.25, 0)


def test_handing_back_after_a_tensor():
    d = Driven()
    d.write(0.5)
    found, d.groups[0]["lr"] = d.groups[0]["lr"], torch.tensor(0.125)
    assert d.update() == [0.125, expected(0.5, 0)[1]]
    d.groups[0]["lr"] = found
    assert d.opt.current_lr() == expected(0.5, 1)
    assert d.shown == pytest.approx(expected(0.5, 1))


@both_kinds
@pytest.mark.parametrize("order", ORDERS)
def test_a_frozen_group_stays_frozen_in_a_resumed_run(kind, order):
    d = Driven(kind)
    d.write(0.5)
    d.groups[0]["lr"] = 0.0
    d.update()
    resumed = Driven(kind).load_state_dict(d.state_dict(), order)
    assert resumed.update() == [0.0, expected(0.5, 1)[1]]
    resumed.write(0.25)
    assert resumed.update() == [0.0, expected(0.25, 0)[1]]


@pytest.mark.parametrize("total_steps", [5, 3 * BUDGET])
def test_a_loaded_schedule_steps_down(total_steps):
    scheduled = Driven()
    other = lrs_ext.SGD(scheduled.params, lr=lrs_ext.linear(0.1, total_steps))
    other.add_param_group({"params": [torch.zeros((), requires_grad=True)]})
    d = Driven()
    d.write(0.5)
    d.opt.load_state_dict(
        {
            "state": {},
            "param_groups": [
                {**group, "params": [index]}
                for index, group in enumerate(other.state_dict()["param_groups"])
            ],
        }
    )
    d.rates.attach()
    assert d.shown == pytest.approx(expected(0.5, 0))
    assert [d.update() for _ in range(5)] == [expected(0.5, k) for k in range(5)]
    d.write(0.25)
    assert [d.update() for _ in range(5)] == [expected(0.25, k) for k in range(5)]


WRITES = {
    "write": lambda d: d.write(0.25),
    "scale_": lambda d: d.rates.scale_(torch.tensor(0.5)),
    "advance": lambda d: d.rates.advance(),
    "attach": lambda d: d.rates.attach(),
}


@both_kinds
@pytest.mark.parametrize("name", WRITES)
def test_a_new_group_is_refused_before_anything_is_written(kind, name):
    d = Driven(kind)
    d.write(0.5)
    d.update()
    d.params.append(torch.zeros((), requires_grad=True))
    d.opt.add_param_group({"params": d.params[-1:], "lr": 0.125})
    before = copy.deepcopy(d.shown), d.rates.rate.clone(), d.rates.updates
    with pytest.raises(RuntimeError, match="make AutoLRS after add_param_group"):
        WRITES[name](d)
    assert (d.shown, d.rates.rate, d.rates.updates) == before
    if kind == "lrs_ext":
        assert d.used() == [*expected(0.5, 1), 0.125]
        assert d.used() == [*expected(0.5, 2), 0.125]


def test_a_float_after_a_long_schedule_survives_a_new_group():
    params = [torch.zeros((), requires_grad=True) for _ in range(2)]
    opt = lrs_ext.SGD(params[:1], lr=lrs_ext.linear(0.1, 20))
    opt.param_groups[0]["lr"] = 0.5
    assert opt.current_lr() == [0.5]
    opt.add_param_group({"params": params[1:], "lr": 0.25})
    assert opt.current_lr() == [0.5, 0.25]


def test_a_new_driver_takes_what_the_host_has_written():
    d = Driven()
    d.write(0.5)
    d.groups[0]["lr"], d.groups[1]["lr"] = 0.5, 1.0
    d.rates = rates_of(d.opt, group_ratios(d.groups), BUDGET)
    d.write(0.25)
    assert d.update() == expected(0.25, 0)


@both_kinds
def test_a_copy_that_would_drive_the_same_optimizer_is_refused(kind):
    d = Driven(kind)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"neither copied nor pickled.*state_dict"):
            copied([d.rates])
    if kind == "lrs_ext":  # copies of the optimizer are nobody's
        copy.deepcopy(d.opt)


# Who keeps whom alive


@both_kinds
def test_nobody_is_kept_alive(kind):
    class Controller:
        def value(self, updates):
            return 0.5

    gc.disable()
    try:
        d, controller = Driven(kind), Controller()
        d.rates.write(torch.tensor(0.5), make_shape(at=controller.value))
        d.show()
        d.write(0.25, is_known=False)
        seen = [weakref.ref(controller), weakref.ref(d.opt)]
        del controller, d
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_number_in_page_locked_memory_is_read_when_the_step_is_called():
    param = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    param.grad = torch.ones(4, device="cuda")
    lr, max_norm = torch.tensor(1.0).pin_memory(), torch.tensor(1.0).pin_memory()
    opt = lrs_ext.SGD([param], lr=lr)
    torch.cuda._sleep(100_000_000)
    lrs_ext.clip_grad_norm_(opt, max_norm)
    opt.step()
    lr.fill_(100.0)
    max_norm.fill_(100.0)
    assert param.tolist() == pytest.approx([-0.5] * 4, rel=1e-5)
