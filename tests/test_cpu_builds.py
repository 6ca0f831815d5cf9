"""The builds of the CPU loops, one per instruction set: exact storage, equal bits, wide vectors.

Each is compiled here into a library of its own, with the very commands of the project's build.
"""

import ctypes
import itertools
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

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 15 * ops.QUANT_BLOCK

DRIVER = """
#include "float16_pieces.h"
#include "step_cpu.h"
using namespace lrs;
template <typename From, typename To>
void convert(const From* source, To* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(target[i], load(source[i]));
}
extern "C" {
void load_bfloat16(const BFloat16* s, float* t, int64_t n) { convert(s, t, n); }
void load_float16(const Float16* s, float* t, int64_t n) { widen(s, n, t); }
void store_bfloat16(const float* s, BFloat16* t, int64_t n) { convert(s, t, n); }
void store_float16(const float* s, Float16* t, int64_t n) { narrow(s, n, t); }
void step(Algorithm algorithm, StateType state_type, bool stochastic, const TensorEntry* tensors,
          const Group* groups, const Chunk* chunks, int64_t num_chunks, int64_t chunk_elements,
          int64_t* step, const void* const* gradients, Squares* chunk_squares,
          Squares* tensor_squares) {
  StepTable table{};
  table.algorithm = algorithm;
  table.state_type = state_type;
  table.rounds_stochastically = stochastic;
  table.tensors = tensors;
  table.groups = groups;
  table.chunks = chunks;
  table.num_chunks = num_chunks;
  table.chunk_elements = chunk_elements;
  table.step = step;
  table.chunk_squares = chunk_squares;
  table.tensor_squares = tensor_squares;
  if (algorithm == Algorithm::kLAMB) {
    LRS_ISA::lamb_moments(table, gradients, 0, num_chunks);
    LRS_ISA::lamb_params(table, gradients, 0, num_chunks);
  } else {
    LRS_ISA::step_chunks(table, gradients, 0, num_chunks);
  }
}
void squares(const TensorEntry* tensors, const Chunk* chunks, int64_t num_chunks,
             int64_t chunk_elements, const void* const* gradients, double* sums) {
  StepTable table{};
  table.tensors = tensors;
  table.chunks = chunks;
  table.chunk_elements = chunk_elements;
  LRS_ISA::square_chunks(table, gradients, 0, num_chunks, sums);
}
}
"""

IS_X86 = platform.machine() in ("x86_64", "AMD64")
VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64} if IS_X86 else {"baseline": 16}
REQUIRED_FLAGS = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"},
}


@dataclass(frozen=True)
class Build:
    library: Path
    objects: dict[str, Path]  # by source
    remarks: dict[str, str]  # of the compiler on each loop, by source; empty unless it is GCC


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
    sources = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        isa = re.search(r"-DLRS_ISA=(\w+)", entry["command"])
        if isa is not None:
            command = shlex.split(entry["command"])
            source = (command[: command.index("-o")], Path(entry["file"]))
            sources.setdefault(isa[1], []).append(source)
    assert set(sources) == set(VECTOR_BYTES)
    return {isa: build(found, driver, folder / isa) for isa, found in sources.items()}


def build(sources, driver, target):
    flags = sources[0][0]
    version = subprocess.run([flags[0], "--version"], check=True, capture_output=True, text=True)
    is_gcc = "Free Software Foundation" in version.stdout
    report = ["-fopt-info-vec-optimized-missed"] if is_gcc else []
    objects, remarks = {}, {}
    for own_flags, source in sources:
        objects[source.stem] = target.with_suffix(f".{source.stem}.o")
        command = [*own_flags, *report, "-c", source, "-o", objects[source.stem]]
        compiled = subprocess.run(command, check=True, capture_output=True, text=True)
        remarks[source.stem] = compiled.stderr
    library = target.with_suffix(".so")
    inputs = [f"-I{ROOT}/csrc", driver, *objects.values()]
    subprocess.run([*flags, "-shared", *inputs, "-o", library], check=True)
    return Build(library, objects, remarks)


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
    "adamw": ["exp_avg", "exp_avg_sq"],
    "lion": ["exp_avg"],
    "lamb": ["exp_avg", "exp_avg_sq"],
}
COUNTS = [("sgd", 0), ("sgd", 1), ("adam", 2), ("adam", 3), ("lion", 1), ("lamb", 2)]
COMPRESSED_COUNTS = [("sgd", 1), ("adam", 2), ("adamw", 2), ("lion", 1)]
ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1}
HYPER = {
    "sgd": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "adam": ADAM,
    "adamw": {**ADAM, "decoupled_weight_decay": 1.0},
    "lion": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1},
    "lamb": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1, "bias_correction": 1.0},
}


class Update:
    """Parameters of fixed numbers, how they are kept, and their native tables."""

    def __init__(self, algorithm, names, dtype, row):
        generator = torch.Generator().manual_seed(0)
        self.params, self.state = [], {}
        self.algorithm, self.row = algorithm, row
        for numel in (1, 3, 8, 37, 1000, 3 * CHUNK + 5):
            param = torch.randn(numel, generator=generator).to(dtype)
            param.grad = torch.randn(numel, generator=generator).to(dtype)
            numbers = {name: torch.rand(numel, generator=generator) + 0.5 for name in names}
            self.params.append(param)
            self.state[param] = row.storage.loaded(param, numbers, names)
            row.storage.complete(param, self.state[param], names)
        counters = [torch.tensor(1.0) for _ in self.params]
        tables = [self.params], self.state, [names], counters, row.storage.state_type
        self.tensors = _C.StepTensors(ops._tensor_access(), *tables)
        assert self.tensors.refresh([self.params], self.state, None)
        step = _C.Step(algorithm.removesuffix("w"), self.tensors, CHUNK, row.storage.state_type)
        self.rows = torch.from_numpy(step.tensor_rows)
        self.chunks = torch.from_numpy(step.chunk_rows)
        self.gradients = torch.from_numpy(step.gradient_addresses)
        self.sums = torch.zeros(len(self.chunks), 2, dtype=torch.float64)  # LAMB's
        norms = torch.rand(len(self.params), 2, generator=generator, dtype=torch.float64)
        self.norms = norms + 0.5

    def run(self, library):
        """All arrays after one update by a library."""
        groups, lr = ops.GroupTable(1, torch.device("cpu")), torch.tensor([0.5, 0.02])
        groups.write(0, lr, HYPER[self.algorithm])
        committed = torch.tensor(1)
        library.step(
            {"sgd": 0, "adam": 1, "adamw": 1, "lion": 2, "lamb": 3}[self.algorithm],
            {"float32": 0, "bfloat16": 1, "block8": 2}[self.row.storage.state_type],
            ctypes.c_bool(self.row.stochastic_rounding),
            *map(pointer, (self.rows, groups.rows, self.chunks)),
            ctypes.c_int64(len(self.chunks)),
            ctypes.c_int64(CHUNK),
            *map(pointer, (committed, self.gradients, self.sums, self.norms)),
        )
        arrays = [array for state in self.state.values() for array in state.values()]
        return [*self.params, *arrays, self.sums]

    def squares(self, library):
        sums = torch.full((len(self.chunks),), -1.0, dtype=torch.float64)
        library.squares(
            *map(pointer, (self.rows, self.chunks)),
            ctypes.c_int64(len(self.chunks)),
            ctypes.c_int64(CHUNK),
            *map(pointer, (self.gradients, sums)),
        )
        return sums


def variants():
    for row, dtype in itertools.product(cases.STORAGES, cases.DTYPES):
        if row != cases.STORAGES[0] and dtype == torch.float16:
            continue
        is_plain = row.state_dtype == torch.float32
        for algorithm, count in COUNTS if is_plain else COMPRESSED_COUNTS:
            name = f"{algorithm}-{count}-{dtype}-{row}"
            yield pytest.param(algorithm, STATES[algorithm][:count], dtype, row, id=name)


@pytest.mark.parametrize(("algorithm", "names", "dtype", "row"), list(variants()))
def test_every_build_gives_the_same_bits(builds, library, algorithm, names, dtype, row):
    arrays = Update(algorithm, names, dtype, row).run(library)
    baseline = ctypes.CDLL(str(builds["baseline"].library))
    expected = Update(algorithm, names, dtype, row).run(baseline)
    assert all(torch.equal(a, b) for a, b in zip(arrays, expected, strict=True))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_build_adds_squares_in_the_same_order(builds, library, dtype):
    update = Update("sgd", [], dtype, cases.STORAGES[0])
    sums = update.squares(library)
    assert torch.equal(sums, update.squares(ctypes.CDLL(str(builds["baseline"].library))))
    exact = sum(param.grad.double().square().sum() for param in update.params)
    assert sums.sum().item() == pytest.approx(exact.item(), rel=1e-14)


# Vectors.

STEP, NORM, LAMB = "step_cpu_chunks", "norm_cpu_chunks", "lamb_cpu_chunks"


def count_in_vectors(builds, isa, source, instruction):
    objdump = ["objdump", "-d", "--no-show-raw-insn", builds[isa].objects[source]]
    code = subprocess.run(objdump, check=True, capture_output=True, text=True).stdout
    register = {16: "%xmm", 32: "%ymm", 64: "%zmm"}[VECTOR_BYTES[isa]]
    return len(re.findall(rf"\sv?{instruction}\s.*{register}", code))


@pytest.mark.skipif(not IS_X86, reason="reads x86 assembly")
@pytest.mark.parametrize("instruction", ["sqrtps", "divps"])
def test_the_loops_of_adam_take_roots_and_divide_in_vectors(builds, isa, instruction):
    loops = sum(1 for variant in variants() if variant.values[0] in ("adam", "adamw"))
    assert count_in_vectors(builds, isa, STEP, instruction) >= loops
    assert count_in_vectors(builds, isa, LAMB, instruction) >= 2 * len(cases.DTYPES)  # two passes


@pytest.mark.skipif(not IS_X86, reason="reads x86 assembly")
@pytest.mark.parametrize("source", [NORM, LAMB])
def test_the_loops_of_the_norms_square_in_vectors(builds, isa, source):
    assert count_in_vectors(builds, isa, source, "mulpd") >= len(cases.DTYPES)


@pytest.mark.skipif(not IS_X86, reason="reads x86 assembly")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("source", [STEP, NORM, LAMB])
def test_float16_is_converted_by_instructions_of_the_cpu(builds, isa, source):
    assert count_in_vectors(builds, isa, source, "cvtph2ps") >= 1
    assert count_in_vectors(builds, isa, source, "cvtps2ph") >= (source != NORM)


def test_the_compiler_vectorises_every_copy_of_the_element_loop(builds, isa):
    remarks = builds[isa].remarks[STEP]
    if not remarks:
        pytest.skip("only GCC's remarks are understood")
    wide = re.compile(rf"(\S+): optimized: loop vectorized using {VECTOR_BYTES[isa]} byte vectors")
    vectorised = wide.findall(remarks)
    # Five loops: elements, random bits, pairs, and the two passes over blocks.
    assert len(set(vectorised)) >= 5
    assert len(vectorised) >= sum(1 for _ in variants())
    missed = re.findall(r"(\S+): missed: couldn't vectorize loop", remarks)
    assert not set(vectorised) & set(missed)
