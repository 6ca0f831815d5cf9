"""The native module with the CUDA kernels of csrc/ compiled for the host, in place of the real one.

The sources are compiled as they are but for three notations that are no C++: launches with
`<<< >>>`, `__grid_constant__` arguments, which are passed by reference, and `__shared__` variables,
which are static. `cuda_on_host/` has what they need of CUDA. Inside `HostCuda.installed()` the
"cuda" backend then runs on CPU tensors.
"""

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pybind11

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "cuda_on_host"

LAUNCH = re.compile(r"([\w:]+(?:<[^;{}()]*?>)?)\s*<<<(.*?)>>>\((?=(\)?))", re.DOTALL)
SHARED = re.compile(r"__shared__ ([^;]*?(\w+)(?:\[[^;]*\])?);")
GRID_CONSTANT = re.compile(r"const __grid_constant__ ([\w:<>, ]+?) (\w+)(?=[,)])")

# As in the project's build: no fused multiply-adds. Vectors of the device alias scalars.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"]
# A checked longjmp refuses to change stacks.
FLAGS += ["-O1", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
CUDA_FLAGS = ["-D__CUDACC__", "-include", "cuda_runtime.h", "-x", "c++"]
# Types of its own, apart from those of the real module.
MODULE_FLAGS = ['-DPYBIND11_COMPILER_TYPE="on_host"', "-DLRS_WITH_CUDA", '-DLRS_CUDA_ARCHS="host"']


def as_cpp(cuda):
    """Returns CUDA source as C++."""
    cuda = SHARED.sub(r"static \1; on_host::enter_shared(&\2, sizeof(\2));", cuda)
    cuda = GRID_CONSTANT.sub(r"const \1& \2", cuda)

    def call(match):
        kernel, configuration, has_no_arguments = match.groups()
        separator = "" if has_no_arguments else ", "
        return f"on_host::launch(on_host::Configuration({configuration}), {kernel}{separator}"

    return LAUNCH.sub(call, cuda)


def build(folder, sources, name, module_flags=MODULE_FLAGS):
    """Compiles sources into the shared library `name`; those in CUDA for the host."""
    for header in {header for source in sources for header in source.parent.glob("*.cuh")}:
        (folder / header.name).write_text(as_cpp(header.read_text()))
    include = [EMULATION, pybind11.get_include(), sysconfig.get_path("include")]
    # Quoted includes of a rewritten source are looked up here: its own folder holds only itself.
    include += dict.fromkeys(source.parent for source in sources)
    flags = [*FLAGS, *module_flags, *(f"-I{path}" for path in include), "-fopenmp"]
    compiler = os.environ.get("CXX", "c++")

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        options = []
        if source.suffix == ".cu":
            options = CUDA_FLAGS
            rewritten = folder / source.name
            rewritten.write_text(as_cpp(source.read_text()))
            source = rewritten
        run(compiler, *flags, *options, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [EMULATION / "blocks.cpp", *sources]))
    library = folder / name
    run(compiler, "-shared", "-fopenmp", *objects, "-o", library)
    return library


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[-3]}:\n{done.stderr}")


class HostCuda:
    """The native module of `folder`, built there first."""

    def __init__(self, folder, csrc=ROOT / "csrc"):
        sources = sorted([*csrc.glob("*.cu"), *csrc.glob("*.cpp")])
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        library = build(folder, sources, f"_C{suffix}")
        loader = importlib.machinery.ExtensionFileLoader("on_host._C", str(library))
        spec = importlib.util.spec_from_loader("on_host._C", loader)
        self.module = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self.runner = Runner(library)

    @contextlib.contextmanager
    def installed(self):
        """Lets `lrs_ext` use the module; "cuda" serves tensors on any device."""
        from lrs_ext import ops  # here: gpu_on_host.py builds a module before there is any

        access = functools.cache(ops._tensor_access.__wrapped__)
        with (
            mock.patch.object(ops, "_C", self.module),
            mock.patch.object(ops, "_tensor_access", access),
            mock.patch.object(ops, "cuda_unavailable_reason", return_value=None),
        ):
            yield self


class Runner:
    """What runs the blocks of a library; `native` has its other functions."""

    def __init__(self, path):
        self.native = ctypes.CDLL(str(path))
        self.native.on_host_launches.restype = ctypes.c_int64
        self.native.on_host_blocks.restype = ctypes.c_int64

    def set_order(self, order):
        """0: blocks and threads run as numbered, 1: the last first, others: in that shuffle."""
        self.native.on_host_set_order(order)

    @property
    def launches(self):
        return self.native.on_host_launches()

    @property
    def blocks(self):
        return self.native.on_host_blocks()
