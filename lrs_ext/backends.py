"""The choice of a backend: which can serve a device, why not the others, and which one does."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from lrs_ext import ops
from lrs_ext.param_devices import devices_of

BACKENDS = ("cuda", "triton", "cpu", "reference")


def unavailable_reason(backend: str, device: str) -> str | None:
    """Returns why `backend` cannot serve tensors on `device`, or None if it can.

    Args:
        device: such as "cpu" or "cuda:1"; "cuda" is the current one.
    """
    device_type = torch.device(device).type
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if device_type == "cpu" else f"it updates CPU tensors, not {device_type} ones"
    if backend == "cuda":
        return ops.cuda_unavailable_reason(device)
    if backend == "triton":
        return _triton_unavailable_reason(device_type)
    raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def _triton_unavailable_reason(device_type: str) -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "triton needs a GPU; TRITON_INTERPRET=1 runs its slow interpreter on CPU tensors"
    if device_type not in ("cpu", "cuda"):
        return f"it updates CUDA and ROCm tensors, not {device_type} ones"
    return None


def select_backend(requested: str | None, device: torch.device) -> str:
    """Returns the backend for parameters on `device`.

    Args:
        requested: a name, or None for the environment variable LRS_EXT_BACKEND or else the fastest
            kernel for the device; `reference` is never chosen unasked.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot serve the device; the message says why, and which can.
    """
    requested, origin = _request(requested)
    if requested is not None:
        reason = unavailable_reason(requested, str(device))
        if reason is None:
            return requested
        usable = [name for name in BACKENDS if unavailable_reason(name, str(device)) is None]
        raise RuntimeError(
            f"{origin}={requested!r} cannot be used for parameters on {device}: {reason}; "
            f"available here: {usable}"
        )
    candidates = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    reasons = {name: unavailable_reason(name, str(device)) for name in candidates}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise RuntimeError(
        f"no kernel can be used for parameters on {device}: {reasons}; "
        "backend='reference' runs anywhere, slowly"
    )


def _request(requested: str | None) -> tuple[str | None, str]:
    """Returns the backend that is asked for, and where."""
    origin = "backend"
    if requested is None and os.environ.get("LRS_EXT_BACKEND"):
        requested, origin = os.environ["LRS_EXT_BACKEND"], "LRS_EXT_BACKEND"
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"{origin} must be one of {BACKENDS}, got {requested!r}")
    return requested, origin


def select_backends(requested: str | None, params: Iterable[Tensor]) -> dict[torch.device, str]:
    """Returns the backend on each device of `params`, that of the first one first.

    Without parameters, as on a rank that got none, it is that of the CPU, whatever is asked for.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: there is none for a device; see `select_backend`.
    """
    params = list(params)
    if not params:
        _request(requested)
        return {torch.device("cpu"): "cpu"}
    devices = devices_of(params)
    if any(device.type == "meta" for device in devices):
        raise RuntimeError(
            "parameters on meta have no memory, and to_empty() puts others in their place: make "
            "the optimizer after it"
        )
    return {device: select_backend(requested, device) for device in devices}
