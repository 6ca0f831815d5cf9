"""Measuring: callables in turn within one process, and the device's copy bandwidth."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]

SPIN_CYCLES_PER_SECOND = 3e9  # at least the clock of any present GPU
COPY_BYTES = {"cpu": 2**29, "cuda": 2**31}  # beyond any cache


@dataclass(frozen=True)
class Spread:
    """Quartiles of what the rounds measured, in seconds.

    Attributes:
        has_waited: whether the device waited for the host in most rounds, see `device_seconds`.
    """

    lower: float
    median: float
    upper: float
    has_waited: bool = False

    @staticmethod
    def of(samples: list[float]) -> Spread:
        lower, median, upper = (float(value) for value in np.percentile(samples, (25, 50, 75)))
        return Spread(lower, median, upper)


def host_seconds(
    calls: Mapping[str, Call],
    rounds: int,
    device: torch.device,
    prepare: Callable[[str], object] | None = None,
    calls_per_turn: int = 1,
) -> dict[str, Spread]:
    """Measures what each call costs the host: on a GPU, the time to enqueue its work.

    The calls take turns, so that whatever disturbs the machine disturbs all of them. The device is
    idle when a call starts, and nobody waits for it within the measured time.

    Args:
        prepare: gets the name of the call that is next, outside the measured time.
        calls_per_turn: of which the mean counts. A single short call measures cold caches.
    """

    def measure(call: Call) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return _in_turn(calls, rounds, measure, prepare, calls_per_turn)


def device_seconds(
    calls: Mapping[str, Call], rounds: int, device: torch.device, host: Mapping[str, Spread]
) -> dict[str, Spread]:
    """Measures how long the GPU is busy with each call, without waits for the host in between.

    A call of more launches than the driver's queue takes (about a thousand), or one that itself
    waits for the device, cannot be enqueued ahead: its spread says that it has waited.

    Args:
        host: what `host_seconds` returned for the same calls.
    """
    longest = max(spread.upper for spread in host.values())
    cycles = int(SPIN_CYCLES_PER_SECOND * min(2 * longest + 5e-5, 0.1))
    waits: list[bool] = []

    def measure(call: Call) -> float:
        start, end = _event(), _event()
        synchronize(device)
        _spin(cycles)  # the host enqueues the whole call in the meantime
        start.record()
        call()
        # The device has come here before all was enqueued.
        waits.append(bool(start.query()))  # type: ignore[no-untyped-call]
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    spreads = _in_turn(calls, rounds, measure, None)
    return {
        name: dataclasses.replace(spread, has_waited=2 * sum(waits[i :: len(calls)]) > rounds)
        for i, (name, spread) in enumerate(spreads.items())
    }


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _spin(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def _in_turn(
    calls: Mapping[str, Call],
    rounds: int,
    measure: Callable[[Call], float],
    prepare: Callable[[str], object] | None,
    calls_per_turn: int = 1,
) -> dict[str, Spread]:
    if rounds < 1:
        raise ValueError(f"rounds must be positive, got {rounds}")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds = []
            for _ in range(calls_per_turn):
                if prepare is not None:
                    prepare(name)
                seconds.append(measure(call))
            samples[name].append(sum(seconds) / calls_per_turn)
    return {name: Spread.of(values) for name, values in samples.items()}


def copy_bandwidth(device: torch.device, size: int | None = None, rounds: int = 10) -> float:
    """Measures a copy within the memory of `device`: bytes read and written per second.

    Args:
        size: bytes of the source.
    """
    size = COPY_BYTES[device.type] if size is None else size
    # Written, not only allocated: pages that nobody wrote to share one page of zeros.
    source = torch.empty(size // 4, device=device).uniform_()
    target = torch.empty_like(source).copy_(source)
    calls = {"copy": lambda: target.copy_(source)}
    seconds = host_seconds(calls, rounds, device)
    if device.type == "cuda":
        seconds = device_seconds(calls, rounds, device, seconds)
    return 2 * source.nbytes / seconds["copy"].median


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
