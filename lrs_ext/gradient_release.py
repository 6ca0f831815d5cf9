"""Gradient release: each parameter is updated as soon as its gradient is there, which is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class GradientRelease:
    """Hooks on parameters, made by `step_in_backward`; `remove` takes them off.

    Args:
        params: those whose gradients are to be released.
        update: updates one parameter from its gradient. It is held weakly.
    """

    def __init__(self, params: Iterable[Tensor], update: Callable[[Tensor], None]) -> None:
        self._released: set[Tensor] = set()
        owner = weakref.WeakMethod(update)

        def release(param: Tensor) -> None:
            update = owner()
            if update is None or param.grad is None:
                return
            if param in self._released:
                raise RuntimeError(
                    "a second gradient for a parameter that step_in_backward has already updated: "
                    "call step() after every backward(); gradients that are freed at once cannot "
                    "be accumulated"
                )
            update(param)
            param.grad = None
            self._released.add(param)

        self._handles: list[RemovableHandle] = []
        for param in params:
            self._handles.append(param.register_post_accumulate_grad_hook(release))  # type: ignore[no-untyped-call]

    @property
    def is_in_force(self) -> bool:
        return bool(self._handles)

    def finish(self) -> bool:
        """Ends the step; returns whether any gradient has been released in it."""
        has_released = bool(self._released)
        self._released.clear()
        return has_released

    def remove(self) -> None:
        """Takes the hooks off: from now on `step()` updates all parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
