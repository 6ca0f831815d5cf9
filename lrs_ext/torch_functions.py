"""Functions of torch's libraries, which lrs_ext does not link, by the names of the native core."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

# What spares gradients their Python objects. Names of C++ functions are mangled, which says nothing
# of what they return: they are used up to the last torch with which all of this has been run.
LAST_DIRECT_TORCH = (2, 14)
DIRECT_FUNCTIONS = {
    "grad": "_ZNK3c1010TensorImpl4gradEv",
    "is_negated": "_ZN2at6native6is_negERKNS_6TensorE",
    "bump_version": "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE",
    "assign": "aoti_torch_assign_tensors",
    "make_undefined": "aoti_torch_new_uninitialized_tensor",
    "layout": "aoti_torch_get_layout",
    "dtype": "aoti_torch_get_dtype",
    "device_type": "aoti_torch_get_device_type",
    "device_index": "aoti_torch_get_device_index",
    "dim": "aoti_torch_get_dim",
    "sizes": "aoti_torch_get_sizes",
    "strides": "aoti_torch_get_strides",
}


def object_functions() -> dict[str, Any]:
    """Returns what reads tensors as Python objects, the arguments of `_C.TensorAccess`.

    Raises:
        RuntimeError: torch is too old to have them.
    """
    library = _torch_library()
    try:
        return {
            "exchange_api": Tensor.__dlpack_c_exchange_api__,
            "make_handles": torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors,
            "data_pointer": _address(library.aoti_torch_get_data_ptr),
            "delete_handle": _address(library.aoti_torch_delete_tensor_object),
            "is_negated": Tensor.is_neg,
            "plain_types": (Tensor, torch.nn.Parameter),
            "has_function_mode": torch._C._is_torch_function_mode_enabled,
        }
    except AttributeError as error:
        raise RuntimeError(
            f"lrs_ext needs torch 2.10 or later, got {torch.__version__}: {error}"
        ) from error


def direct_functions() -> dict[str, int] | None:
    """Returns the addresses of `DIRECT_FUNCTIONS`, None if torch lacks one or is newer than tried.

    Without them, gradients are read as Python objects.
    """
    library = _torch_library()
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    has_all = all(hasattr(library, symbol) for symbol in DIRECT_FUNCTIONS.values())
    if not has_all or version > LAST_DIRECT_TORCH:
        return None
    return {name: _address(getattr(library, symbol)) for name, symbol in DIRECT_FUNCTIONS.items()}


def _torch_library() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
