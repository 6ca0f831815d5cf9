"""Names that parts of a step have in a profile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

is_profiling = torch._C._autograd._profiler_enabled
_NO_RANGE: AbstractContextManager[Any] = nullcontext()


def profile_range(name: str) -> AbstractContextManager[Any]:
    """Returns a context that has a name in a profile, if there is one to be."""
    return torch.autograd.profiler.record_function(name) if is_profiling() else _NO_RANGE
