"""Triton's interpreter without its waste: of a small launch, more than half of the time."""

import dataclasses
import functools
from types import SimpleNamespace


def speed_up():
    """Lets it prepare `triton.language` once, not at each call of a function and to undo it."""
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()

    # Sums are made a second time in int64 for assertions that only debugging looks at.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    dtype_of = interpreter._get_np_dtype  # makes a table at each call
    known = functools.cache(dtype_of)
    interpreter._get_np_dtype = lambda kind: (
        known(kind) if type(kind) is tl.dtype else dtype_of(kind)
    )
