"""Gradient release: each parameter is updated as soon as its gradient is there, which is freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lrs_ext.capture_checks import check_together
from lrs_ext.shards import local
from lrs_ext.step_hooks import uncompiled


class GradientRelease:
    """Hooks on parameters, put on by `begin`; `remove` takes them off.

    Args:
        update: updates one parameter from its gradient; returns whether a CUDA graph captures
            that. It is held weakly.
    """

    def __init__(self, update: Callable[[Tensor], bool]) -> None:
        self._update = weakref.WeakMethod(update)
        self._released: dict[Tensor, bool] = {}  # and whether that is in a graph
        self._handles: list[RemovableHandle] = []
        self._written: list[torch.Event] = []  # when the devices have the numbers of the groups
        self._read: list[torch.Event] = []  # when they have read those of the last step

    def begin(self, params: Iterable[Tensor]) -> None:
        """Releases the gradients of `params` from now on."""
        self._has_checked = False
        for param in params:
            self._handles.append(param.register_post_accumulate_grad_hook(self._release))  # type: ignore[no-untyped-call]

    @uncompiled
    def _release(self, param: Tensor) -> None:
        update = self._update()
        if update is None or param.grad is None:
            return
        if param in self._released:
            raise RuntimeError(
                "a second gradient for a parameter that step_in_backward has already updated: "
                "call step() after every backward(), and forget_graphs() after a capture that has "
                "failed; gradients that are freed at once cannot be accumulated"
            )
        if not self._has_checked:
            self._check_not_averaged()  # by now whatever wraps the model is there
            self._has_checked = True
        if local(param.grad).is_pinned():  # on its way here, where fully_shard offloads it
            torch.accelerator.current_stream().synchronize()
        is_captured = update(param)
        param.grad = None
        self._released[param] = is_captured

    @property
    def is_in_force(self) -> bool:
        return bool(self._handles)

    def wait_for_numbers(self) -> None:
        """Lets what follows come after what `note_numbers` has been told of.

        Hooks run on the streams of the forward pass, of which each part may have its own.
        """
        _wait(self._written)

    def note_numbers(self, devices: Iterable[torch.device]) -> None:
        """Remembers that numbers of the groups are being written to `devices`."""
        self._written = _events(devices)

    def wait_for_step(self) -> None:
        """Lets what follows come after the step that `note_step` has been told of.

        A hook runs on a stream of its parameter's device, and on the default streams of others.
        """
        _wait(self._read)

    def note_step(self, devices: Iterable[torch.device]) -> None:
        """Remembers that numbers of the groups are being read on `devices`."""
        self._read = _events(devices)

    def finish(self, is_captured: bool) -> bool:
        """Ends the step; returns whether any gradient has been released in it.

        Args:
            is_captured: whether the step is.

        Raises:
            RuntimeError: a backward pass was captured and the step is not, or the other way round.
        """
        self._written = []
        released, self._released = self._released, {}
        for was_captured in released.values():
            check_together("the backward pass of step_in_backward", was_captured, is_captured)
        return bool(released)

    def forget_capture(self) -> None:
        """Gives up a step whose gradients have been released in a graph alone."""
        if all(self._released.values()):
            self._released, self._written = {}, []

    def remove(self) -> None:
        """Takes the hooks off: from now on `step()` updates all parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _check_not_averaged(self) -> None:
        """Raises RuntimeError if DistributedDataParallel is going to average the gradients.

        It does so after the hooks of a parameter have run, and leaves no trace on the parameter.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        for module in gc.get_objects():
            is_replica = issubclass(type(module), DistributedDataParallel)
            if is_replica and module.process_group.size() > 1 and self._has_hooks_in(module):
                raise RuntimeError(
                    "DistributedDataParallel averages gradients after step_in_backward has used "
                    "and freed them, so that every rank would train on its own: use step() "
                    "without step_in_backward(), or fully_shard"
                )

    def _has_hooks_in(self, module: torch.nn.Module) -> bool:
        hooks = (param._post_accumulate_grad_hooks for param in module.parameters())
        return any(self._release in of_param.values() for of_param in hooks if of_param)


def _events(devices: Iterable[torch.device]) -> list[torch.Event]:
    events = []
    for device in devices:
        if device.type == "cuda":
            events.append(torch.Event(device))
            events[-1].record(torch.accelerator.current_stream(device))
    return events


def _wait(events: Iterable[torch.Event]) -> None:
    for event in events:
        event.wait(torch.accelerator.current_stream(event.device))
