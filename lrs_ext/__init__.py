"""Fused optimizer steps for PyTorch that read the learning rate from a schedule on the device."""

from lrs_ext import functional
from lrs_ext.autolrs.controller import AutoLRS
from lrs_ext.buffer import ScheduleBuffer
from lrs_ext.clipping import clip_grad_norm_
from lrs_ext.constructors import (
    constant,
    cosine,
    delayed_linear,
    exponential,
    from_function,
    from_values,
    inverse_sqrt,
    join,
    linear,
    one_cycle,
    polynomial,
    rex,
    step_decay,
    wsd,
)
from lrs_ext.lamb import LAMB
from lrs_ext.lr_scheduler import ScheduleLR
from lrs_ext.optimizers import SGD, Adam, AdamW, Lion
from lrs_ext.plateau import ReduceOnPlateau
from lrs_ext.profile_schedule import SAMPLING
from lrs_ext.schedules import Schedule

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "SAMPLING",
    "SGD",
    "Adam",
    "AdamW",
    "AutoLRS",
    "Lion",
    "ReduceOnPlateau",
    "Schedule",
    "ScheduleBuffer",
    "ScheduleLR",
    "clip_grad_norm_",
    "constant",
    "cosine",
    "delayed_linear",
    "exponential",
    "from_function",
    "from_values",
    "functional",
    "inverse_sqrt",
    "join",
    "linear",
    "one_cycle",
    "polynomial",
    "rex",
    "step_decay",
    "wsd",
]
