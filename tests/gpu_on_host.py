"""Runs a program as if the machine had two GPUs: `python tests/gpu_on_host.py FOLDER -m pytest`.

Builds in FOLDER what stands for them: the CUDA runtime (`cuda_on_host/runtime_*.cpp`), the native
module with kernels on the host (`host_cuda.py`), and a `sitecustomize` by which every Python
process of the program gets the operators of `torch_on_host.py`. Needs a torch built for CUDA.

As a plugin of pytest it leaves out the tests that cannot work so.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import host_cuda

TESTS = Path(__file__).resolve().parent
MODULE_FLAGS = ["-DON_HOST_RUNTIME", "-DLRS_WITH_CUDA", '-DLRS_CUDA_ARCHS="80,90,100,120"']

# Parts of names of tests, by the reason why they are left out.
LEFT_OUT = {
    "Triton compiles for GPUs; its interpreter has the ordinary tests": [
        "triton",
        "test_norms_of_many_chunks_on_a_gpu",
    ],
    "torch's operators have the CPU's kernels here, and so the ordinary tests": ["reference-cuda"],
    "a launch takes 4 KB of arguments here, which fewer tensors fill": [
        "-3801]",
        "-7600]",
        "-7601]",
    ],
    "blocks run one after another here: runs cannot differ": ["test_runs_are_identical_to_the_bit"],
    "torch's profiler sees no GPU": ["test_a_step_is_one_kernel_or_lambs_two_and_nothing_else"],
    "only strided tensors are known here": ["sparse gradient"],
}


def pytest_collection_modifyitems(config, items):
    parts = [part for parts in LEFT_OUT.values() for part in parts]
    left_out = [item for item in items if any(part in item.nodeid for part in parts)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def include_folders():
    """Where the headers of the CUDA runtime are: those of torch's own, then triton's."""
    packages = Path(importlib.util.find_spec("torch").origin).parents[1]
    own = packages.glob("nvidia/*/include/cuda_runtime_api.h")
    return [*(path.parent for path in own), packages / "triton/backends/nvidia/include"]


def build_runtime(folder, headers):
    """Compiles the runtime. Its name is that of the driver, which nothing then looks for."""
    library = folder / "libcuda.so.1"
    host_cuda.run(
        *(os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-shared"),
        *("-Wl,-soname,libcuda.so.1", *(f"-I{path}" for path in headers)),
        *(*sorted(host_cuda.EMULATION.glob("runtime_*.cpp")), "-o", library),
    )
    return library


def build(folder):
    """Builds all in a folder, unless it has what was built from the same sources."""
    folder.mkdir(parents=True, exist_ok=True)
    csrc = host_cuda.ROOT / "csrc"
    module = folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    inputs = [
        *csrc.iterdir(),
        *host_cuda.EMULATION.iterdir(),
        TESTS / "host_cuda.py",
        Path(__file__),
    ]
    if module.exists() and module.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
        return
    build_runtime(folder, include_folders())
    customize = f"import torch_on_host\n\ntorch_on_host.install({str(module)!r})\n"
    (folder / "sitecustomize.py").write_text(customize)
    sources = sorted([*csrc.glob("*.cu"), *csrc.glob("*.cpp")])
    host_cuda.build(folder, sources, module.name, MODULE_FLAGS)


def environment(folder):
    path = [folder, TESTS, host_cuda.ROOT, os.environ.get("PYTHONPATH")]
    return os.environ | {
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "PYTHONPATH": os.pathsep.join(str(entry) for entry in path if entry),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    build(target)
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environment(target))
