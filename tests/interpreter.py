"""Triton's interpreter without its waste, and with the rounding of a GPU.

The waste is more than half of the time of a small launch.
"""

import dataclasses
import functools
from types import SimpleNamespace

import torch


def speed_up():
    """For a process that interprets to its end."""
    import triton.language as tl
    from triton.runtime import interpreter

    # It would prepare `triton.language` again at each call of a function in a kernel.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()

    # It would compute integers once more in int64, for assertions that only debugging evaluates.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # It would make a table of all types whenever it looks for one.
    dtype_of = interpreter._get_np_dtype
    known = functools.cache(dtype_of)
    interpreter._get_np_dtype = lambda kind: (
        known(kind) if type(kind) is tl.dtype else dtype_of(kind)
    )


def round_to_nearest():
    """It would cut a float32 off to a bfloat16."""
    import triton.language as tl
    from triton.runtime import interpreter

    converted = interpreter._convert_float

    def rounded(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return converted(values, source, target, rounding)
        return torch.tensor(values).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded
