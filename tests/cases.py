"""The rows of the test matrix: schedules, updates, dtypes, backends, shapes, tolerances.

Rows are data. A new schedule, optimizer, storage type or backend is one more row here.
"""

from dataclasses import dataclass, field

import torch

from lrs_ext.state_storage import Storage

HAS_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Tolerance:
    rtol: float
    atol: float


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    def __str__(self):
        return f"{self.name}-{self.device}"

    @property
    def interpreted(self):
        """Triton without a GPU: correct, but thousands of times slower."""
        return self.name == "triton" and self.device == "cpu"


BACKENDS = [
    Backend("cpu", "cpu"),
    Backend("reference", "cpu"),
    Backend("triton", "cuda" if HAS_GPU else "cpu"),
    Backend("reference", "cuda"),
    Backend("cuda", "cuda"),
]


@dataclass(frozen=True)
class ScheduleRow:
    """`name(lr, total_steps, **options)`, for our constructor and for the oracle alike."""

    name: str
    lr: float
    total_steps: int | None
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self):
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({self.total_steps}{',' if options else ''}{options})"


# Boundaries worth a row: no warm-up, only warm-up, one update, sampling that does not divide the
# budget, a sampling interval longer than the budget, fractions whose product is not an integer in
# floating point; for each profile its defaults and every parameter of its own.
SCHEDULES = [
    ScheduleRow("rex", 3e-4, 100),
    ScheduleRow("rex", 3e-4, 100, {"d": 0.0}),
    ScheduleRow("rex", 1.0, 100, {"d": 0.9}),
    ScheduleRow("rex", 0.1, 100, {"warmup_steps": 10}),
    ScheduleRow("rex", 0.1, 100, {"warmup_steps": 10, "min_lr": 1e-3, "d": 0.9}),
    ScheduleRow("rex", 0.1, 100, {"sampling": 7, "warmup_steps": 3}),
    ScheduleRow("rex", 0.1, 100, {"sampling": 1000}),
    ScheduleRow("rex", 0.1, 100, {"sampling": (0.07, 0.29, 0.57, 0.58)}),
    ScheduleRow("rex", 0.1, 10, {"sampling": (0.30000000000000004, 0.7000000000000001)}),
    ScheduleRow("rex", 0.1, 113, {"sampling": (1 / 3, 2 / 3), "warmup_steps": 13}),
    ScheduleRow("rex", 0.1, 1),
    ScheduleRow("rex", 0.1, 1, {"warmup_steps": 1}),
    ScheduleRow("rex", 0.1, 8, {"warmup_steps": 8, "min_lr": 0.02}),
    ScheduleRow("linear", 2.0, 37),
    ScheduleRow("linear", 0.1, 37, {"warmup_steps": 1, "min_lr": 0.1}),
    ScheduleRow("linear", 0.1, 37, {"warmup_steps": 5, "sampling": (0.5, 0.75)}),
    ScheduleRow("cosine", 3e-4, 1000),
    ScheduleRow("cosine", 3e-4, 1000, {"warmup_steps": 100, "min_lr": 3e-5, "sampling": 9}),
    ScheduleRow("exponential", 0.3, 100),
    ScheduleRow("exponential", 0.3, 90, {"gamma": -4.6, "warmup_steps": 7, "min_lr": 0.01}),
    ScheduleRow("step_decay", 0.1, 100),
    ScheduleRow(
        "step_decay", 0.1, 113, {"milestones": (1 / 3, 2 / 3), "gamma": 0.5, "warmup_steps": 13}
    ),
    ScheduleRow("step_decay", 0.1, 100, {"milestones": (0.07, 0.29, 0.58), "sampling": (0.5,)}),
    ScheduleRow("step_decay", 0.1, 10, {"milestones": (0.30000000000000004,), "min_lr": 0.01}),
    ScheduleRow("step_decay", 0.1, 8, {"milestones": (0.5,), "gamma": 0.0, "warmup_steps": 8}),
    ScheduleRow("delayed_linear", 0.1, 100),
    ScheduleRow("delayed_linear", 0.1, 110, {"delay": 0.75, "warmup_steps": 10, "min_lr": 0.02}),
    ScheduleRow("polynomial", 0.1, 100),
    ScheduleRow("polynomial", 0.1, 100, {"power": 2.5, "warmup_steps": 9, "sampling": 4}),
    ScheduleRow("one_cycle", 0.1, 100),
    ScheduleRow("one_cycle", 0.1, 101, {"low": 0.04, "min_lr": 0.01, "momentum": (0.8, 0.9)}),
    ScheduleRow("one_cycle", 0.1, 100, {"low": 0.0, "sampling": (0.25, 0.5, 0.75)}),
    ScheduleRow("wsd", 0.1, 100),
    ScheduleRow("wsd", 0.1, 120, {"decay": 0.35, "cooldown": "sqrt", "warmup_steps": 20}),
    ScheduleRow("wsd", 0.1, 100, {"decay": 1 / 3, "cooldown": "linear", "min_lr": 0.01}),
    ScheduleRow("wsd", 0.1, 100, {"decay": 0.2, "cooldown": "cosine", "sampling": 3}),
    ScheduleRow("wsd", 0.1, 100, {"decay": 1.0, "cooldown": "exponential"}),
    ScheduleRow("inverse_sqrt", 0.1, None, {"warmup_steps": 10, "capacity": 60}),
    ScheduleRow("inverse_sqrt", 0.1, None, {"warmup_steps": 1, "min_lr": 0.01, "sampling": 5}),
    ScheduleRow("constant", 0.1, None),
    ScheduleRow("constant", 0.1, None, {"warmup_steps": 4}),
    ScheduleRow("constant", 0.1, 20, {"warmup_steps": 4}),
]


@dataclass(frozen=True)
class UpdateRow:
    """An optimizer class by name with its options; `lr` is the peak that suits the options."""

    name: str
    options: dict = field(default_factory=dict, hash=False)
    lr: float = 0.02

    def __str__(self):
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})"


UPDATES = [
    UpdateRow("SGD"),
    UpdateRow("SGD", {"weight_decay": 0.3}),
    UpdateRow("SGD", {"maximize": True, "weight_decay": 0.1}),
    UpdateRow("SGD", {"momentum": 0.9}),
    UpdateRow("SGD", {"momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1}),
    UpdateRow("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    UpdateRow("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    UpdateRow("Adam"),
    UpdateRow("Adam", {"betas": (0.5, 0.75), "eps": 1e-3}),
    UpdateRow("Adam", {"betas": (0.0, 0.0)}),
    UpdateRow("Adam", {"weight_decay": 0.1, "maximize": True}),
    UpdateRow("Adam", {"amsgrad": True, "betas": (0.9, 0.5)}),
    UpdateRow("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    UpdateRow("AdamW"),
    UpdateRow("AdamW", {"weight_decay": 0.3, "betas": (0.9, 0.95), "eps": 1e-6}),
    UpdateRow("AdamW", {"weight_decay": 0.1, "amsgrad": True, "betas": (0.8, 0.6)}),
    UpdateRow("AdamW", {"weight_decay": 0.0, "maximize": True}),
    UpdateRow("AdamW", {"weight_decay": 0.1, "maximize": True, "amsgrad": True}),
    UpdateRow("Lion"),
    UpdateRow("Lion", {"weight_decay": 0.3, "betas": (0.95, 0.98)}),
    UpdateRow("Lion", {"weight_decay": 0.1, "betas": (0.5, 0.0), "maximize": True}),
    UpdateRow("LAMB"),
    UpdateRow("LAMB", {"weight_decay": 0.3, "betas": (0.5, 0.75), "eps": 1e-3}),
    UpdateRow("LAMB", {"weight_decay": 0.0, "bias_correction": False}),
    UpdateRow("LAMB", {"weight_decay": 0.0, "always_adapt": False, "maximize": True}),
    UpdateRow("LAMB", {"weight_decay": 0.1, "always_adapt": False, "betas": (0.0, 0.0)}),
]
# One row for each combination of states; for properties that do not depend on the options.
STATE_UPDATES = [UPDATES[i] for i in (1, 4, 7, 15, 19, 22)]
# Where an element does not depend on the rest of its tensor.
ELEMENTWISE_UPDATES = STATE_UPDATES[:-1]
TORCH_OPTIMIZERS = ["SGD", "Adam", "AdamW"]  # those that torch.optim has too
OPTIMIZERS = [*TORCH_OPTIMIZERS, "Lion", "LAMB"]


@dataclass(frozen=True)
class MovingRow:
    """An optimizer and the schedules of its numbers, by the keys of `numbers`: weight_decay, and
    momentum or, for betas[0], beta1. `options` has the fixed beta2.
    """

    update: UpdateRow
    numbers: dict = field(hash=False)

    def __str__(self):
        numbers = ",".join(f"{name}={schedule}" for name, schedule in self.numbers.items())
        return f"{self.update}:{numbers}"


DECAY = ScheduleRow("linear", 0.3, 5)
RISE = ScheduleRow("constant", 0.9, 20, {"warmup_steps": 4})
FALL = ScheduleRow("polynomial", 0.95, 5, {"min_lr": 0.5, "power": 2.0})
TO_ZERO = ScheduleRow("cosine", 0.8, 4)
MOVING = [
    MovingRow(UpdateRow("SGD"), {"weight_decay": DECAY}),
    MovingRow(UpdateRow("SGD", {"dampening": 0.25}), {"momentum": FALL, "weight_decay": DECAY}),
    MovingRow(UpdateRow("SGD", {"nesterov": True, "maximize": True}), {"momentum": RISE}),
    MovingRow(UpdateRow("SGD", {"dampening": 0.5, "weight_decay": 0.1}), {"momentum": TO_ZERO}),
    MovingRow(UpdateRow("Adam", {"betas": (None, 0.9)}), {"beta1": FALL, "weight_decay": DECAY}),
    MovingRow(
        UpdateRow("AdamW", {"betas": (None, 0.9), "amsgrad": True}),
        {"beta1": RISE, "weight_decay": DECAY},
    ),
    MovingRow(UpdateRow("AdamW", {"betas": (None, 0.95)}), {"beta1": TO_ZERO}),
    MovingRow(UpdateRow("Lion", {"betas": (None, 0.9)}), {"beta1": FALL, "weight_decay": DECAY}),
    MovingRow(
        UpdateRow("LAMB", {"betas": (None, 0.9), "always_adapt": False}),
        {"beta1": RISE, "weight_decay": DECAY},
    ),
]
# All numbers of each optimizer.
MOVING_ALL = [MOVING[i] for i in (1, 4, 5, 7, 8)]


@dataclass(frozen=True)
class StorageRow:
    """The keywords of an optimizer that say how it keeps states and bfloat16 parameters."""

    state_dtype: torch.dtype = torch.float32
    master_weights: bool = False
    stochastic_rounding: bool = False

    def __str__(self):
        param = "split" if self.master_weights else "nearest"
        param = "stochastic" if self.stochastic_rounding else param
        return f"{str(self.state_dtype).removeprefix('torch.')}-{param}"

    @property
    def options(self):
        return dict(vars(self))

    @property
    def storage(self):
        return Storage(**self.options)


STORAGES = [
    StorageRow(state_dtype, **param)
    for state_dtype in (torch.float32, torch.bfloat16, torch.uint8)
    for param in ({}, {"master_weights": True}, {"stochastic_rounding": True})
]
# The optimizers that have these keywords.
STORING_OPTIMIZERS = [name for name in OPTIMIZERS if name != "LAMB"]
# Bytes that one state takes for each parameter, the scales of 8-bit blocks included.
STATE_BYTES = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.uint8: 1.0 + 4 / 128}
# One row for each combination of states that can be compressed.
STORED_UPDATES = [UPDATES[i] for i in (1, 4, 7, 14, 19)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFUSED_DTYPES = [torch.float64, torch.complex64, torch.int32]

# 0-d, empty, one element, odd sizes, one more than a power of two.
SHAPES = [(), (0,), (1,), (3, 0, 2), (7,), (4, 5), (3, 1, 2), (2, 3, 5, 7), (257,), (33, 65)]
INTERPRETED_SHAPES = [(), (0,), (7,), (3, 1, 2), (257,)]

# Each learning rate below is one float64 expression of a few operations; cosine loses the digits of
# f in 1 + cos(pi p), hence the absolute part.
SCHEDULE = Tolerance(rtol=1e-13, atol=1e-16)

# One update from equal states: about three roundings in float32, then one to the storage type,
# which may fall to the other side: 1 ulp. Absolute parts are for results near zero: parameters and
# gradients are of the order of 1, updates of 0.1 at most.
PARAM = {
    torch.float32: Tolerance(rtol=3e-7, atol=3e-8),
    torch.bfloat16: Tolerance(rtol=2**-7, atol=3e-8),
    torch.float16: Tolerance(rtol=2**-10, atol=2**-24),
}
# States are float32 whatever the parameter: a handful of roundings of numbers of the order of 1.
STATE = Tolerance(rtol=5e-7, atol=3e-7)
# Trajectories of STEPS updates against torch.optim's own float32.
TORCH = Tolerance(rtol=3e-6, atol=1e-6)
# States of 8 bits that were cut into other blocks: rounded once more to the nearest of 3 bits of
# mantissa, or of 4 bits of a root; absolute for what is small in its block.
BLOCKS_APART = Tolerance(rtol=0.07, atol=1e-3)
# Steps from states that were rounded by other random bits: the distance, as a share of the way.
STEPS_APART = 0.2
# Equality to the bit.
EXACT = Tolerance(rtol=0.0, atol=0.0)

STEPS = 6
