"""The builds of the CPU loops, one per instruction set: exact storage, equal bits, wide vectors.

Each is compiled here into a library of its own, with the very commands of the project's build.
"""

import ctypes
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import cases
import pytest
import torch

from lrs_ext import _C, ops

# xdist: one worker compiles for all tests of the file.
pytestmark = pytest.mark.xdist_group(__name__)

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 2045  # no multiple of any vector: chunks begin and end anywhere

DRIVER = """
#include "step_cpu.h"
using namespace lrs;
template <typename From, typename To>
void convert(const From* source, To* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(target[i], load(source[i]));
}
extern "C" {
void load_bfloat16(const BFloat16* s, float* t, int64_t n) { convert(s, t, n); }
void load_float16(const Float16* s, float* t, int64_t n) { convert(s, t, n); }
void store_bfloat16(const float* s, BFloat16* t, int64_t n) { convert(s, t, n); }
void store_float16(const float* s, Float16* t, int64_t n) { convert(s, t, n); }
void step(Algorithm algorithm, const TensorEntry* tensors, const Group* groups, const Chunk* chunks,
          int64_t num_chunks, int64_t chunk_elements, int64_t* step, const void* const* gradients,
          Squares* chunk_squares, Squares* tensor_squares) {
  const StepTable table{algorithm, tensors, 0, groups, chunks, num_chunks, chunk_elements, step,
                        nullptr, chunk_squares, tensor_squares};
  if (algorithm == Algorithm::kLAMB) {
    LRS_ISA::lamb_moments(table, gradients, 0, num_chunks);
    LRS_ISA::lamb_params(table, gradients, 0, num_chunks);
  } else {
    LRS_ISA::step_chunks(table, gradients, 0, num_chunks);
  }
}
}
"""

IS_X86 = platform.machine() in ("x86_64", "AMD64")
VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64} if IS_X86 else {"baseline": 16}
REQUIRED_FLAGS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
}


@dataclass(frozen=True)
class Build:
    library: Path
    loops: list[Path]  # the object files
    remarks: str  # of the compiler on each loop; empty unless it is GCC


def runs_here(isa):
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return REQUIRED_FLAGS[isa] <= flags


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("no cmake on the PATH or in this environment")
    folder = tmp_path_factory.mktemp("build")
    configure = [cmake, "-S", ROOT, "-B", folder, "-DLRS_PYTHON=OFF"]
    environment = {**os.environ, "PATH": path, "LRS_CUDA": "0"}
    subprocess.run(configure, env=environment, check=True, capture_output=True)
    driver = folder / "driver.cpp"
    driver.write_text(DRIVER)
    found = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        isa = re.search(r"-DLRS_ISA=(\w+)", entry["command"])
        if isa is not None:
            command = shlex.split(entry["command"])
            flags = command[: command.index("-o")]
            found.setdefault(isa[1], (flags, []))[1].append(entry["file"])
    assert set(found) == set(VECTOR_BYTES)
    return {isa: build(*found[isa], driver, folder / isa) for isa in found}


def build(flags, sources, driver, target):
    library = target.with_suffix(".so")
    version = subprocess.run([flags[0], "--version"], check=True, capture_output=True, text=True)
    is_gcc = "Free Software Foundation" in version.stdout
    report = ["-fopt-info-vec-optimized-missed"] if is_gcc else []
    loops, remarks = [], ""
    for source in sources:
        loops.append(target.with_name(f"{target.name}_{Path(source).stem}.o"))
        command = [*flags, *report, "-c", source, "-o", loops[-1]]
        remarks += subprocess.run(command, check=True, capture_output=True, text=True).stderr
    subprocess.run([*flags, f"-I{ROOT}/csrc", "-shared", driver, *loops, "-o", library], check=True)
    return Build(library, loops, remarks)


@pytest.fixture(params=VECTOR_BYTES)
def isa(request):
    return request.param


@pytest.fixture
def library(builds, isa):
    if not runs_here(isa):
        pytest.skip(f"this processor has no {isa}")
    return ctypes.CDLL(str(builds[isa].library))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def test_the_widest_build_that_runs_here_is_in_use():
    assert _C.cpu_instruction_set() == [isa for isa in VECTOR_BYTES if runs_here(isa)][-1]


# Storage.

SMALL_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(library, name, source, dtype):
    target = torch.empty(source.shape, dtype=dtype)
    getattr(library, name)(pointer(source), pointer(target), ctypes.c_int64(source.numel()))
    return target


def assert_same_bits(actual, expected):
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def every_value(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)


@pytest.mark.parametrize("name", SMALL_DTYPES)
def test_loading_is_exact_for_every_bit_pattern(library, name):
    values = every_value(SMALL_DTYPES[name])
    assert_same_bits(convert(library, f"load_{name}", values, torch.float32), values.float())


@pytest.mark.parametrize("name", SMALL_DTYPES)
def test_storing_rounds_to_nearest_even(library, name):
    """At every value of the type, every tie between two of them, and one float32 to either side."""
    dtype = SMALL_DTYPES[name]
    values = every_value(dtype).float()
    finite = values[values.isfinite()].unique()
    ties = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    overflow = finite[-1:] + (finite[-1:] - finite[-2:-1]) / 2
    centres = torch.cat([values, ties, overflow, -overflow])
    infinity = torch.tensor(float("inf"))
    sides = [torch.nextafter(centres, infinity), torch.nextafter(centres, -infinity)]
    anything = torch.randint(-(2**31), 2**31, (100_001,)).to(torch.int32).view(torch.float32)
    values = torch.cat([centres, *sides, anything])
    assert values.to(dtype)[len(centres) - 2 : len(centres)].isinf().all()
    assert_same_bits(convert(library, f"store_{name}", values, dtype), values.to(dtype))


# Bits.

STATES = {
    "sgd": ["momentum_buffer"],
    "adam": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "lion": ["exp_avg"],
    "lamb": ["exp_avg", "exp_avg_sq"],
}
COUNTS = [("sgd", 0), ("sgd", 1), ("adam", 2), ("adam", 3), ("lion", 1), ("lamb", 2)]
HYPER = {
    "sgd": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "adam": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1},
    "lion": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1},
    "lamb": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1, "bias_correction": 1.0},
}


def updated(library, algorithm, names, dtype):
    """Parameters, states by name and LAMB's sums after one update of fixed numbers by a library."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for numel in (1, 3, 8, 37, 1000, 3 * CHUNK + 5):
        params.append(torch.randn(numel, generator=generator).to(dtype))
        params[-1].grad = torch.randn(numel, generator=generator).to(dtype)
    state = {p: {n: torch.rand(p.shape, generator=generator) + 0.5 for n in names} for p in params}
    counters = [torch.tensor(1.0) for _ in params]
    tensors = _C.StepTensors(ops._tensor_access(), [params], state, [names], counters)
    assert tensors.refresh([params], state, None)
    step = _C.Step(algorithm, tensors, CHUNK)
    groups, lr = ops.GroupTable(1, torch.device("cpu")), torch.tensor([0.5, 0.02])
    groups.write(0, lr, HYPER[algorithm])
    rows, chunks = torch.from_numpy(step.tensor_rows), torch.from_numpy(step.chunk_rows)
    gradients, committed = torch.from_numpy(step.gradient_addresses), torch.tensor(1)
    sums = torch.zeros(len(chunks), 2, dtype=torch.float64)
    norms = torch.rand(len(params), 2, generator=generator, dtype=torch.float64) + 0.5
    library.step(
        {"sgd": 0, "adam": 1, "lion": 2, "lamb": 3}[algorithm],
        *map(pointer, (rows, groups.rows, chunks)),
        ctypes.c_int64(len(chunks)),
        ctypes.c_int64(CHUNK),
        *map(pointer, (committed, gradients, sums, norms)),
    )
    return torch.cat(params), {n: torch.cat([state[p][n] for p in params]) for n in names}, sums


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("algorithm", "count"), COUNTS)
def test_every_build_gives_the_same_bits(builds, library, algorithm, count, dtype):
    names = STATES[algorithm][:count]
    param, states, sums = updated(library, algorithm, names, dtype)
    baseline = ctypes.CDLL(str(builds["baseline"].library))
    expected, expected_states, expected_sums = updated(baseline, algorithm, names, dtype)
    assert torch.equal(param, expected)
    assert torch.equal(sums, expected_sums)
    assert all(torch.equal(states[name], expected_states[name]) for name in names)


# Vectors.


@pytest.mark.skipif(not IS_X86, reason="reads x86 assembly")
@pytest.mark.parametrize("instruction", ["sqrtps", "divps", "mulpd"])
def test_the_loops_of_adam_and_lamb_compute_in_vectors(builds, isa, instruction):
    objdump = ["objdump", "-d", "--no-show-raw-insn", *builds[isa].loops]
    code = subprocess.run(objdump, check=True, capture_output=True, text=True).stdout
    register = {16: "%xmm", 32: "%ymm", 64: "%zmm"}[VECTOR_BYTES[isa]]
    # Adam's with and without amsgrad's state, and LAMB's two; its sums of squares are doubles.
    loops = len(cases.DTYPES) * (2 if instruction == "mulpd" else 4)
    assert len(re.findall(rf"\sv?{instruction}\s.*{register}", code)) >= loops


def test_the_compiler_vectorises_every_copy_of_the_element_loop(builds, isa):
    remarks = builds[isa].remarks
    if not remarks:
        pytest.skip("only GCC's remarks are understood")
    wide = re.compile(rf"(\S+): optimized: loop vectorized using {VECTOR_BYTES[isa]} byte vectors")
    vectorised = wide.findall(remarks)
    assert len(vectorised) >= len(cases.DTYPES) * (len(COUNTS) + 1)  # LAMB has two
    missed = re.findall(r"(\S+): missed: couldn't vectorize loop", remarks)
    assert not set(vectorised) & set(missed)
