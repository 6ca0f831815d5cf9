"""What users do to an optimizer between its steps, in any order, beside one that is left alone."""

import copy
import io
import pickle

import cases
import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plain_optimizers import plain_optimizer

import lrs_ext

SHAPES = [(), (7,), (0,), (5, 5), (2, 3, 4, 5), (130,)]
LAYOUTS = ["plain", "turned", "gaps", "part"]
RATES = st.sampled_from(
    [
        0.05,
        np.float64(0.04),
        torch.tensor(0.02),
        torch.tensor([0.03], dtype=torch.float64),
        lrs_ext.rex(0.1, total_steps=6, warmup_steps=2),
        lrs_ext.from_values([0.01, 0.03, 0.02]),
    ]
).map(copy.deepcopy)
CYCLE = lrs_ext.one_cycle(0.1, total_steps=8).momentum
NUMBERS = {
    "weight_decay": [0.0, 0.1, lrs_ext.linear(0.2, total_steps=5)],
    "momentum": [0.9, 0.5, CYCLE],
    "betas": [(0.9, 0.99), [0.7, 0.8], (CYCLE, 0.9)],
}
number = st.integers(0, 7)


def laid_out(values, layout):
    """Equal values in other memory."""
    if layout == "turned":
        dims = tuple(range(values.dim()))[::-1]
        return values.permute(dims).contiguous().permute(dims)
    if layout == "gaps":
        return torch.empty(*values.shape, 2, dtype=values.dtype)[..., 0].copy_(values)
    if layout == "part":
        memory = torch.empty(values.numel() + 3, dtype=values.dtype)
        return memory[1 : 1 + values.numel()].view(values.shape).copy_(values)
    if layout == "expanded" and values.numel():
        return values.flatten()[0].clone().expand(values.shape)
    return values.clone(memory_format=torch.contiguous_format)


def value_at(value, step):
    """A number of a group in update `step`: schedules as the kernels read them."""
    if isinstance(value, (tuple, list)):
        return (value_at(value[0], step), value[1])
    return float(np.float32(value(step)) if isinstance(value, lrs_ext.Schedule) else value)


def through_file(saved, **options):
    file = io.BytesIO()
    torch.save(saved, file)
    return torch.load(io.BytesIO(file.getvalue()), **options)


class BesidePlainOne(RuleBasedStateMachine):
    """The twin is an optimizer of plain torch, which starts each step with the same numbers."""

    layouts, tolerance, dtype, storage = st.sampled_from(LAYOUTS), cases.TORCH, torch.float32, {}
    has_plain_twin = True

    @initialize(data=st.data(), name=st.sampled_from(cases.OPTIMIZERS), seed=st.integers(0, 99))
    def start(self, data, name, seed):
        self.random, self.name = torch.Generator().manual_seed(seed), name
        self.draw_kind(data)
        self.steps, self.numbers, self.handle = 0, [], None
        groups = [self.new_group(data) for _ in range(2)]
        self.opt = self.make([group for group, _ in groups])
        self.twin = self.make_twin([group for _, group in groups])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)

    def draw_kind(self, data):
        self.backend = data.draw(st.sampled_from(["cpu", "cpu", "reference"]))

    def make(self, groups):
        return getattr(lrs_ext, self.name)(groups, backend=self.backend, **self.storage)

    def make_twin(self, groups):
        return plain_optimizer(self.name)(groups, foreach=False)

    def randn(self, shape):
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def new_group(self, data):
        keys = {"SGD": ["momentum"], "LAMB": ["betas"]}.get(self.name, ["betas"])
        own = {k: data.draw(st.sampled_from(NUMBERS[k])) for k in ["weight_decay", *keys]}
        own |= {"lr": data.draw(RATES)}
        fixed = {}
        if self.name == "SGD":
            fixed["nesterov"] = data.draw(st.booleans())
        elif self.name.startswith("Adam") and not self.storage:
            fixed["amsgrad"] = data.draw(st.booleans())
        values = [self.randn(data.draw(st.sampled_from(SHAPES))) for _ in range(2)]
        params = [torch.nn.Parameter(laid_out(v, data.draw(self.layouts))) for v in values]
        twins = [torch.nn.Parameter(v.clone()) for v in values]
        self.numbers.append(copy.deepcopy(own))
        plain = {key: value_at(value, self.steps) for key, value in own.items()}
        return {**own, **fixed, "params": params}, {**plain, **fixed, "params": twins}

    def pairs(self):
        groups = zip(self.opt.param_groups, self.twin.param_groups, strict=True)
        return [pair for a, b in groups for pair in zip(a["params"], b["params"], strict=True)]

    @property
    def both(self):
        return self.opt, self.twin

    def pair(self, number):
        return self.pairs()[number % len(self.pairs())]

    # Comparison

    def close(self, ours, theirs):
        ours, theirs = torch.as_tensor(ours).detach(), theirs.detach()
        options = {"check_dtype": False, "check_stride": False}
        options |= {"rtol": self.tolerance.rtol, "atol": self.tolerance.atol}
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, **options)
        theirs.copy_(ours.reshape(theirs.shape))  # roundings must not add up

    @invariant()
    def agree(self):
        for param, twin in self.pairs():
            self.close(param, twin)
            states = self.opt.state.get(param, {}), self.twin.state.get(twin, {})
            ours, theirs = ({k: v for k, v in s.items() if v is not None} for s in states)
            if not (ours and theirs):  # an update that was skipped makes states too
                assert not any(torch.as_tensor(v).any() for v in (ours | theirs).values())
                continue
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                self.close(value, theirs[name])

    @rule()
    def read_rates(self):
        expected = [float(np.float32(value_at(n["lr"], self.steps))) for n in self.numbers]
        assert [np.float32(group["lr"]) for group in self.opt.param_groups] == expected
        assert [float(self.opt.lr_tensor(i)) for i in range(len(expected))] == expected
        assert self.opt.current_lr() == expected
        assert int(self.opt.schedule_buffer.step) == self.steps

    # Steps

    def give_gradients(self, data, layouts, scale=1.0):
        is_complete = data.draw(st.booleans())
        for param, twin in self.pairs():
            param.grad = twin.grad = None
            if is_complete or data.draw(st.booleans()):
                param.grad = laid_out(self.randn(param.shape) * scale, data.draw(layouts))
                twin.grad = param.grad.clone(memory_format=torch.contiguous_format) / scale

    def step_twin(self):
        for numbers, group in zip(self.numbers, self.twin.param_groups, strict=True):
            group.update({key: value_at(value, self.steps) for key, value in numbers.items()})
        self.twin.step()
        self.steps += any(twin.grad is not None for _, twin in self.pairs())

    @rule(data=st.data(), mode=st.sampled_from(["enable_grad", "no_grad", "inference_mode"]))
    def step(self, data, mode):
        if self.backend == "reference" and mode == "inference_mode":
            return  # as with torch.optim, its states could not be written outside of that mode
        self.give_gradients(data, st.sampled_from([*LAYOUTS, "expanded"]))
        with getattr(torch, mode)():
            self.opt.step()
        self.step_twin()

    @precondition(lambda self: self.handle is None)
    @rule(data=st.data(), overflows=st.booleans(), unscales=st.booleans())
    def step_with_scaler(self, data, overflows, unscales):
        self.scaler.scale(torch.zeros(()))
        self.give_gradients(data, self.layouts, self.scaler.get_scale())
        gradients = [param.grad for param, _ in self.pairs() if param.grad is not None]
        if not gradients:
            return
        if overflows:
            gradients[0].fill_(torch.inf)
        if unscales:
            self.scaler.unscale_(self.opt)
        self.scaler.step(self.opt)
        self.scaler.update()
        if not (overflows and gradients[0].numel()):
            self.step_twin()

    @rule()
    def release(self):
        if self.handle is None:
            self.handle = self.opt.step_in_backward()
        else:
            self.handle.remove()
            self.handle = None

    @rule()
    def step_after_backward(self):
        self.opt.zero_grad()
        loss = 0.0
        for param, twin in self.pairs():
            twin.grad = self.randn(param.shape)
            loss = loss + (param * twin.grad).sum().float()
        loss.backward()
        assert all((param.grad is None) <= (self.handle is not None) for param, _ in self.pairs())
        self.opt.step()
        self.step_twin()

    # Groups

    @precondition(lambda self: len(self.numbers) < 4)
    @rule(data=st.data())
    def add_group(self, data):
        group, twin = self.new_group(data)
        self.opt.add_param_group(group)
        self.twin.add_param_group(twin)

    @rule(number=number, lr=RATES)
    def change_lr(self, number, lr):
        index = number % len(self.numbers)
        self.numbers[index]["lr"] = copy.deepcopy(lr)
        if isinstance(lr, lrs_ext.Schedule):
            self.opt.set_schedule(lr, index)
        else:
            self.opt.param_groups[index]["lr"] = lr
            self.opt.sync_groups()

    @rule(data=st.data(), number=number)
    def change_number(self, data, number):
        numbers = self.numbers[number % len(self.numbers)]
        key = data.draw(st.sampled_from(sorted(numbers.keys() - {"lr"})))
        numbers[key] = data.draw(st.sampled_from(NUMBERS[key]))
        self.opt.param_groups[number % len(self.numbers)][key] = copy.deepcopy(numbers[key])

    # Parameters and states

    @precondition(lambda self: self.handle is None)
    @rule(data=st.data(), number=number)
    def move_param(self, data, number):
        param, _ = self.pair(number)
        param.data = laid_out(param.data, data.draw(self.layouts))

    @rule(data=st.data(), number=number)
    def change_state(self, data, number):
        states = [s.state.get(p) for s, p in zip(self.both, self.pair(number), strict=True)]
        if not all(states):
            return
        name = data.draw(st.sampled_from(sorted(states[0])))
        how = data.draw(st.sampled_from(["change", "replace", "retype"]))
        if how == "change":
            for state in states:
                state[name] = torch.as_tensor(state[name]) * 0 + (name == "step") * 3
        elif how == "replace":
            state = torch.as_tensor(states[0][name])
            states[0][name] = laid_out(state, data.draw(self.layouts))
        elif states[0][name].is_floating_point():
            states[0][name] = states[0][name].double()

    @rule(number=number)
    def forget_state(self, number):
        for opt, param in zip(self.both, self.pair(number), strict=True):
            opt.state.pop(param, None)

    # Copies and checkpoints

    @precondition(lambda self: self.handle is None)
    @rule(how=st.sampled_from(["deepcopy", "pickle", "save"]))
    def go_on_with_a_copy(self, how):
        if how == "deepcopy":
            self.opt = copy.deepcopy(self.opt)
        elif how == "pickle":
            self.opt = pickle.loads(pickle.dumps(self.opt))
        else:
            self.opt = through_file(self.opt, weights_only=False)

    @precondition(lambda self: self.handle is None)
    @rule(is_new=st.booleans(), by_torch=st.booleans())
    def resume(self, is_new, by_torch):
        saved = through_file(self.opt.state_dict(), weights_only=True)
        groups = [{"params": group["params"]} for group in self.opt.param_groups]
        if by_torch and self.has_plain_twin:
            other = plain_optimizer(self.name)(groups)
            other.load_state_dict(saved)
            saved = other.state_dict()
        if is_new:
            self.opt = self.make(groups)
        self.opt.load_state_dict(saved)

    @precondition(lambda self: self.has_plain_twin)
    @rule()
    def load_from_twin(self):
        for numbers, group in zip(self.numbers, self.twin.param_groups, strict=True):
            group.update({key: value_at(value, self.steps) for key, value in numbers.items()})
        self.opt.load_state_dict(copy.deepcopy(self.twin.state_dict()))
        counts = [float(state["step"]) for state in self.twin.state.values() if "step" in state]
        self.steps = int(max(counts, default=self.steps))


class BesideItself(BesidePlainOne):
    """The twin is an optimizer of the same kind, with the same bits; nobody moves its memory."""

    has_plain_twin, tolerance = False, cases.EXACT

    def draw_kind(self, data):
        # Plain torch takes other roots and quotients.
        self.backend = data.draw(st.sampled_from(["cpu", "reference"][: 1 + (self.name == "SGD")]))
        self.dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
        if self.name != "LAMB" and data.draw(st.booleans()):
            self.storage = data.draw(st.sampled_from(cases.STORAGES)).options
        if self.storage or self.name == "LAMB":  # blocks, random bits and sums follow the memory
            self.layouts = st.sampled_from(["plain", "part"])

    def make_twin(self, groups):
        return getattr(lrs_ext, self.name)(groups, backend="cpu", **self.storage)


TestBesidePlainOne, TestBesideItself = BesidePlainOne.TestCase, BesideItself.TestCase
TestBesidePlainOne.settings = settings(max_examples=200, stateful_step_count=20)
TestBesideItself.settings = TestBesidePlainOne.settings
