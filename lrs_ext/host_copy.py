"""Numbers on their way from the device, for which nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor

from lrs_ext import ops


class HostCopy:
    """Copies a tensor, of one element or float64, to the host.

    What is copied in the capture of a CUDA graph never arrives: its replays would go on writing to
    host memory, which may be somebody else's by then.
    """

    def __init__(self, value: Tensor) -> None:
        self._value: Tensor | None = None
        self._event: torch.Event | None = None
        if value.device.type != "cuda":
            self._value = value.clone()
        elif not torch.cuda.is_current_stream_capturing():
            self._value = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.Event(value.device)
            # By default, the event would be one of the current device, which may be another.
            self._event.record(torch.accelerator.current_stream(value.device))

    @property
    def is_here(self) -> bool:
        """Whether the number has arrived, as far as one may ask."""
        if self._event is None:
            return self._value is not None
        # To query an event in a capture is an error, which ends the capture.
        return not torch.cuda.is_current_stream_capturing() and bool(self._event.query())

    def read(self) -> float:
        """Returns the number, once it is here."""
        assert self._value is not None
        value = ops.host_value(self._value)
        assert value is not None
        return value

    def read_all(self) -> list[float]:
        """Returns the numbers, once they are here."""
        assert self._value is not None
        return ops.host_values(self._value)
