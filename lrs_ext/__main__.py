"""Commands: ``python -m lrs_ext info``, ``selfcheck``, ``plot`` and ``bench``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
from typing import Any

import torch
from torch import Tensor

import lrs_ext
from lrs_ext import bench, ops
from lrs_ext.backends import BACKENDS, select_backend, unavailable_reason

# Largest |difference| / max(1, |value|) after one step: about two units in the last place.
_TOLERANCES = {torch.float32: 2.4e-7, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def info() -> dict[str, Any]:
    """Returns versions, devices, and for each device type its backend and why not the others."""
    devices = {"cpu": platform.processor() or platform.machine()}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    backends = {}
    for device_type in ("cpu", "cuda"):
        reasons = {name: unavailable_reason(name, device_type) for name in BACKENDS}
        if device_type == "cuda" and not torch.cuda.is_available():
            is_gpu_build = torch.version.cuda is not None or torch.version.hip is not None
            missing = "torch sees no GPU" if is_gpu_build else "torch is a CPU build"
            reasons = {name: reason or missing for name, reason in reasons.items()}
        backends[device_type] = {
            "used": _backend_for(device_type, reasons),
            "reasons": {name: reason for name, reason in reasons.items() if reason},
        }
    return {
        "lrs_ext": lrs_ext.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "LRS_EXT_BACKEND": os.environ.get("LRS_EXT_BACKEND") or None,
        "build": ops.build_info(),
        "devices": devices,
        "backends": backends,
    }


def _backend_for(device_type: str, reasons: dict[str, str | None]) -> str | None:
    try:
        backend = select_backend(None, torch.device(device_type))
    except (RuntimeError, ValueError):
        return None
    return backend if reasons[backend] is None else None


def selfcheck() -> list[dict[str, Any]]:
    """Runs one step of each available backend, optimizer and dtype against the reference backend.

    Returns:
        One row per combination: device, backend, optimizer, dtype, largest relative error, ok.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for device in devices:
        for backend in BACKENDS:
            if backend == "reference" or unavailable_reason(backend, device) is not None:
                continue
            for cls in (lrs_ext.SGD, lrs_ext.Adam, lrs_ext.AdamW, lrs_ext.Lion, lrs_ext.LAMB):
                for dtype in ops.DTYPES:
                    got = _one_step(cls, backend, device, dtype)
                    want = _one_step(cls, "reference", device, dtype)
                    error = float(((got - want).abs() / want.abs().clamp(min=1.0)).max())
                    rows.append(
                        {
                            "device": device,
                            "backend": backend,
                            "optimizer": cls.__name__,
                            "dtype": str(dtype).removeprefix("torch."),
                            "error": error,
                            "ok": error <= _TOLERANCES[dtype],
                        }
                    )
    return rows


def _one_step(cls: Any, backend: str, device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    params = []
    for numel in (1, 1000, 20_001):
        value = torch.randn(numel, generator=generator).to(device, dtype)
        param = torch.nn.Parameter(value)
        param.grad = torch.randn(numel, generator=generator).to(device, dtype)
        params.append(param)
    lr = lrs_ext.rex(0.1, total_steps=10)
    extra = {"momentum": 0.9} if cls is lrs_ext.SGD else {}
    cls(params, lr=lr, weight_decay=0.1, backend=backend, **extra).step()
    return torch.cat([p.detach().double() for p in params])


def _version(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None


def _print_info() -> None:
    report = info()
    for name in ("lrs_ext", "python", "torch", "triton"):
        print(f"{name:<9} {report[name] or 'not installed'}")
    asked = report["LRS_EXT_BACKEND"]
    if asked is not None:
        hint = "" if asked in BACKENDS else f", which is not one of {', '.join(BACKENDS)}"
        print(f"LRS_EXT_BACKEND      {asked}{hint}")
    for name, value in report["build"].items():
        print(f"{name:<20} {value}")
    for name, value in report["devices"].items():
        print(f"device {name}: {value}")
    for device_type, entry in report["backends"].items():
        print(f"\nparameters on {device_type}: {entry['used'] or 'no kernel'}")
        for name, reason in entry["reasons"].items():
            print(f"  not {name}: {reason}")


def _print_selfcheck() -> bool:
    rows = selfcheck()
    print(f"{'device':<7} {'backend':<8} {'optimizer':<9} {'dtype':<9} {'error':>9}")
    for row in rows:
        print(
            f"{row['device']:<7} {row['backend']:<8} {row['optimizer']:<9} {row['dtype']:<9} "
            f"{row['error']:>9.1e}  {'ok' if row['ok'] else 'WRONG'}"
        )
    return all(row["ok"] for row in rows)


def _plot(options: argparse.Namespace) -> int:
    from lrs_ext.plots import plot_samplings

    samplings = [int(text) if text.isdecimal() else text for text in options.sampling]
    try:
        plot_samplings(options.names, samplings, options.steps).savefig(options.out, dpi=150)
    except (ImportError, OSError, ValueError) as error:
        print(f"python -m lrs_ext plot: {error}", file=sys.stderr)
        return 1
    return 0


def _bench(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("python -m lrs_ext bench: torch sees no GPU: take --device cpu", file=sys.stderr)
        return 1
    rows = []
    for tensors, elements in bench.TENSORS:
        rows.append(bench.measure(options.optimizer, device, tensors, elements, options.rounds))
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}"
    print(f"One step of {options.optimizer} and its schedule, float32, {name}, ", end="")
    print(f"backend {rows[0].backend}; medians of {options.rounds} rounds, in turns")
    print(bench.table(rows))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    description = "What lrs_ext is and does on this machine. Each command has a --help of its own."
    parser = argparse.ArgumentParser(prog="python -m lrs_ext", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="versions, devices and backends")
    info_parser.add_argument("--json", action="store_true", help="print one JSON object")
    commands.add_parser("selfcheck", help="one step of each backend against the reference")
    plot_parser = commands.add_parser("plot", help="curves of schedules, side by side")
    plot_parser.add_argument("names", nargs="+", metavar="NAME", help="rex, linear, cosine, ...")
    plot_parser.add_argument(
        "--sampling",
        nargs="+",
        default=["every iteration"],
        help=f"a panel each: {', '.join(lrs_ext.SAMPLING)}, or a number".replace("%", "%%"),
    )
    plot_parser.add_argument("--steps", type=int, default=1000, help="the budget (default 1000)")
    plot_parser.add_argument("--out", required=True, metavar="FILE", help="lr.png, lr.svg, ...")
    bench_parser = commands.add_parser("bench", help="steps here against torch's fused optimizer")
    bench_parser.add_argument(
        "--optimizer", choices=bench.OPTIMIZERS, default="AdamW", help="(default AdamW)"
    )
    bench_parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default %(default)s)",
    )
    bench_parser.add_argument(
        "--rounds", type=_positive, default=21, help="of which the median counts (default 21)"
    )
    bench_parser.add_argument("--json", action="store_true", help="print one JSON array")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "info" and options.json:
        print(json.dumps(info(), indent=2))
    elif options.command == "info":
        _print_info()
    elif options.command == "plot":
        return _plot(options)
    elif options.command == "bench":
        return _bench(options)
    else:
        return 0 if _print_selfcheck() else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
