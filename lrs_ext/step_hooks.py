"""What surrounds an optimizer's step: hooks, profiler ranges, torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.optim import Optimizer, optimizer

from lrs_ext.profiler_ranges import is_profiling

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(func: Callable[P, T]) -> Callable[P, T]:
    """Wraps what torch.compile is to run as it is, outside of the graph.

    Torch's own wrapper would import the compiler in programs that do without it.
    """

    @functools.wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling():
            return disabled(*args, **kwargs)
        return func(*args, **kwargs)

    disabled: Callable[P, T] = _disable_dynamo(func)
    return call


def watched_step(func: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a `step` as torch does, but only where a profiler or a hook is there to notice.

    Under torch.compile the step runs as it is, outside of the graph: one launch is nothing to
    compile, and a graph would be tied to what a step changes. `uncompiled` would be one call more.
    """
    hooked = Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return uncompiled_step(self, *args, **kwargs)
        is_watched = (
            is_profiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
        )
        return (hooked if is_watched else func)(self, *args, **kwargs)

    uncompiled_step = _disable_dynamo(step)
    return step
