"""What the main job is asked to do: the options, their defaults, and what a resumed run keeps."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCHEDULES = ("rex", "linear", "cosine", "constant")
DEFAULT_SIZE = {
    "cpu": {"steps": 1200, "layers": 4, "width": 128, "context": 128, "batch_size": 16},
    "cuda": {"steps": 4000, "layers": 6, "width": 384, "context": 256, "batch_size": 64},
}
DEFAULT_LR = {
    "cpu": {"adamw": 3e-3, "adam": 3e-3, "sgd": 0.1},
    "cuda": {"adamw": 1e-3, "adam": 1e-3, "sgd": 0.1},  # wider, so lower
}
AUTO_BOUNDS = {"adamw": (1e-5, 1e-1), "adam": (1e-5, 1e-1), "sgd": (1e-3, 1e1)}
WARMUP_FRACTION = 0.05
MAX_SEED = 2**64 - 1  # of torch.manual_seed


class JobError(Exception):
    """Something the user can put right; the message says how."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a job; equal configs give equal losses on the CPU.

    Attributes:
        lr: the peak learning rate, None to let AutoLRS find it within `lr_bounds`.
    """

    schedules: tuple[str, ...]
    optimizer: str
    lr: float | None
    lr_bounds: tuple[float, float]
    steps: int
    warmup_steps: int
    backend: str | None
    device: str
    seed: int
    layers: int
    width: int
    context: int
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        lists = {"schedules": list(self.schedules), "lr_bounds": list(self.lr_bounds)}
        return {**dataclasses.asdict(self), **lists}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        tuples = {name: tuple(values[name]) for name in ("schedules", "lr_bounds")}
        return Config(**{**values, **tuples})


@dataclass(frozen=True)
class Request:
    """The command line: options given (and only those), and where to read and write."""

    given: dict[str, Any]
    resume: Path | None
    out: Path | None


def positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value: 'x'"
    return parse


def learning_rate(text: str) -> float | None:
    try:
        return None if text == "auto" else positive(float)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text}") from None


def learning_rate_bounds(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers LOW,HIGH, got {text}") from None
    if not 0.0 < low < high < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 < low < high < inf, got {text}")
    return low, high


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def seed(text: str) -> int:
    value = count(text)
    if value > MAX_SEED:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_SEED}, got {text}")
    return value


def schedule_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in SCHEDULES:
            raise argparse.ArgumentTypeError(
                f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}"
            )
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"names a schedule twice: {text}")
    return names


def parse_args(argv: Sequence[str] | None = None) -> Request:
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description="Train a byte-level transformer on the Python standard library's source.",
        argument_default=argparse.SUPPRESS,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--schedule", choices=SCHEDULES, help="learning-rate schedule (rex)")
    which.add_argument(
        "--compare",
        type=schedule_names,
        metavar="A,B,...",
        help="train each schedule at the same budget, e.g. rex,linear,cosine",
    )
    parser.add_argument("--optimizer", choices=tuple(DEFAULT_LR["cpu"]), help="(adamw)")
    rates = "; ".join(
        f"{device}: " + ", ".join(f"{name} {lr:g}" for name, lr in lrs.items())
        for device, lrs in DEFAULT_LR.items()
    )
    parser.add_argument(
        "--lr",
        type=learning_rate,
        help=f"peak learning rate, or auto to let AutoLRS find it ({rates})",
    )
    parser.add_argument(
        "--lr-bounds",
        type=learning_rate_bounds,
        metavar="LOW,HIGH",
        help="where --lr auto searches (1e-5,1e-1; sgd: 1e-3,10)",
    )
    parser.add_argument("--warmup-steps", type=count, help="part of --steps (5%% of it)")
    backends = ("cuda", "triton", "cpu", "reference")
    parser.add_argument("--backend", choices=backends, help="optimizer backend (by device)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    parser.add_argument("--seed", type=seed, help="of the weights and the data order (0)")
    sizes = {
        "steps": "budget in updates",
        "layers": "transformer blocks",
        "width": "of the model, a multiple of 32",
        "context": "bytes a sequence",
        "batch_size": "sequences an update",
    }
    for name, meaning in sizes.items():
        defaults = ", ".join(f"{size[name]} on {device}" for device, size in DEFAULT_SIZE.items())
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=positive(int), help=f"{meaning} ({defaults})")
    parser.add_argument("--out", type=Path, help="folder for the results (runs)")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="CHECKPOINT",
        help="continue a stopped run with the options it was started with",
    )
    given = vars(parser.parse_args(argv))
    resume, out = given.pop("resume", None), given.pop("out", None)
    if "schedule" in given:
        given["schedules"] = (given.pop("schedule"),)
    if "compare" in given:
        given["schedules"] = given.pop("compare")
    return Request(given, resume, out)


def check_device(name: str, way_out: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEFAULT_SIZE:
        raise JobError(f"unknown device {name!r}: give cpu, cuda or cuda:N")
    devices = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= devices:
        raise JobError(f"device {name} is not here (CUDA devices: {devices}): {way_out}")


def new_config(given: dict[str, Any]) -> Config:
    """Fill in what was not given; the sizes depend on the device."""
    device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    check_device(device, "use --device cpu")
    kind = torch.device(device).type
    optimizer = given.get("optimizer", "adamw")
    defaults = DEFAULT_SIZE[kind] | {
        "schedules": ("rex",),
        "optimizer": optimizer,
        "lr": DEFAULT_LR[kind][optimizer],
        "lr_bounds": AUTO_BOUNDS[optimizer],
        "backend": None,
        "device": device,
        "seed": 0,
    }
    values = defaults | given
    if "lr_bounds" in given and values["lr"] is not None:
        raise JobError("--lr-bounds is for --lr auto: add that, or leave out --lr-bounds")
    values.setdefault("warmup_steps", int(WARMUP_FRACTION * values["steps"]))
    if values["warmup_steps"] >= values["steps"]:
        raise JobError(
            f"--warmup-steps is part of --steps and must be less than {values['steps']},"
            f" got {values['warmup_steps']}"
        )
    return Config(**values)


def resumed_config(given: dict[str, Any], saved: Config, checkpoint: Path) -> Config:
    """The checkpoint's config; raise if an option that was given says otherwise."""
    for name, value in given.items():
        before = getattr(saved, name)
        if value != before:
            option = name.replace("_", "-")
            if name == "schedules":
                option = "schedule" if len(value) == 1 else "compare"
                value, before = ",".join(value), ",".join(before)
            if name == "lr_bounds":
                value, before = (f"{low:g},{high:g}" for low, high in (value, before))
            if name == "lr":
                value, before = ("auto" if rate is None else rate for rate in (value, before))
            before = "the default" if before is None else before
            raise JobError(
                f"--{option} {value} conflicts with {checkpoint}, which was started with {before}:"
                f" leave out --{option} to continue that run, or --resume to start a new one"
            )
    check_device(saved.device, f"{checkpoint} was trained on it; resume there or start a new run")
    return saved
