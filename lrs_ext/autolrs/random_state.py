"""The state of every random generator that training draws from: Python, NumPy, torch, devices."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Returns the states of all global generators, as plain numbers and CPU tensors; no sync.

    The states of CUDA generators, those of captured graphs included, are kept by the host.
    """
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - the one that loaders use
    keys, position = numpy["state"]["key"].tolist(), numpy["state"]["pos"]
    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": (keys, position, numpy["has_gauss"], numpy["gauss"]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if is_initialized else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets all global generators to what `random_state` has returned.

    The state may have been saved where there were more devices: theirs are left out.
    """
    state = on_host(state)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        for index, device in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device, index)


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a random state in CPU tensors, wherever ``torch.load`` has mapped it to."""
    cuda = [device.cpu() for device in state["cuda"]]
    return {**state, "torch": state["torch"].cpu(), "cuda": cuda}
