"""Fused optimizer steps for PyTorch that read the learning rate from a schedule on the device."""

from lrs_ext import functional
from lrs_ext.autolrs.controller import AutoLRS
from lrs_ext.buffer import ScheduleBuffer
from lrs_ext.grad_scaling import clip_grad_norm_
from lrs_ext.lamb import LAMB
from lrs_ext.optimizers import SGD, Adam, AdamW, Lion
from lrs_ext.schedules import Schedule, constant, cosine, linear, rex

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "SGD",
    "Adam",
    "AdamW",
    "AutoLRS",
    "Lion",
    "Schedule",
    "ScheduleBuffer",
    "clip_grad_norm_",
    "constant",
    "cosine",
    "functional",
    "linear",
    "rex",
]
