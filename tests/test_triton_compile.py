"""What compilers make of the Triton kernels: registers, spills, widths.

Run as a script, this file compiles them ahead of time and prints a report: a process either
interprets or compiles.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

triton = pytest.importorskip("triton")

from lrs_ext import triton_kernels, triton_lamb, triton_norm  # noqa: E402

CHUNK = 2048

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
REGISTERS = {"cuda": 64, "hip": 128}  # a thread, for 1,024 threads on each multiprocessor
# The kernels of each algorithm and their arguments: tables, scalings, counts, constants.
TABLES, COUNTS = ["*i64", "*i64", "*i32", "*i64", "*i64", "*i32"], ["i32", "i32"]
SCALINGS = ("loss_scale", "found_inf", "norm", "max_norm")
ARGUMENTS = [*TABLES, *["*fp32"] * 4, *COUNTS]
LAMB_ARGUMENTS = [*TABLES, "*fp64", *["*fp32"] * 4, *COUNTS]
NORM_ARGUMENTS = ["*i64", "*i32", "*i64", "*fp64", "*fp32", "*i32", "i32", "constexpr"]
LAMB_KERNELS = {
    "lamb moments": triton_lamb.moments_kernel,
    "lamb params": triton_lamb.params_kernel,
}
LAUNCHES = [*triton_kernels.ALGORITHMS, *LAMB_KERNELS]
# Loads and stores of 128 bits in the aligned paths, float32 plus two 16-bit types, for the fewest
# plus the most states. SGD moves two lanes a piece; beside states, 16-bit lanes are 64 bits wide.
WIDE_ACCESSES = {
    "sgd": (2 * (2 + 3) + 2 * 2 * (2 + 1), 2 * (1 + 2) + 2 * 2 * (1 + 1)),
    "adam": ((4 + 5) + 2 * (2 + 3), (3 + 4) + 2 * (2 + 3)),
    "lion": (2 * 3 + 2 * 2, 2 * 2 + 2 * 2),
    "lamb moments": (4 + 2 * 2, 2 + 2 * 2),
    "lamb params": (3 + 2 * 2, 1),
}


def compile_step(algorithm, target, storage=("float32", "nearest"), scaled=False, **options):
    state_type, param_kind = storage
    constants = (
        *(CHUNK, *triton_kernels.ALGORITHMS[algorithm]),
        triton_kernels.STATE_TYPES[state_type],
        triton_kernels.PARAM_KINDS[param_kind],
        True,
    )
    kernel = triton_kernels.step_kernel
    if TARGETS[target][0] == "cuda":
        options = triton_kernels.launch_options(state_type) | options
    return compile_launch(kernel, target, ARGUMENTS, constants, scaled, **options)


def compile_launch(kernel, target, arguments, constants, scaled=False, **options):
    names = kernel.arg_names
    arguments = [*arguments, *["constexpr"] * len(constants)]
    constexprs = dict(zip(names[-len(constants) :], constants, strict=True))
    signature = dict(zip(names, arguments, strict=True))
    for name in () if scaled else SCALINGS:
        signature[name], constexprs[name] = "constexpr", None
    return compile_kernel(kernel, target, signature, constexprs, **options)


def compile_norm(target):
    kernel = triton_norm.norm_kernel
    signature = dict(zip(kernel.arg_names, NORM_ARGUMENTS, strict=True))
    return compile_kernel(kernel, target, signature, {"CHUNK": CHUNK})


def compile_kernel(kernel, target, signature, constexprs, **options):
    """Compiles ahead of time and describes the result."""
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constexprs)
    gpu = triton.backends.compiler.GPUTarget(*TARGETS[target])
    options["num_warps"] = triton_kernels.THREADS.value // gpu.warp_size
    options["enable_fp_fusion"] = False
    stages = triton.compile(source, target=gpu, options=options).asm
    assembly = stages.get("ptx") or stages["amdgcn"]
    registers, stack = resources(stages)
    return {
        "registers": registers,
        "stack": stack,  # bytes a thread; spilled registers are on the stack
        "wide_loads": len(re.findall(r"ld\.global\.v4\.b32|buffer_load_dwordx4", assembly)),
        "wide_stores": len(re.findall(r"st\.global\.v4\.b32|buffer_store_dwordx4", assembly)),
        "exchanges": stages["ttgir"].count("convert_layout"),
        "barriers": len(re.findall(r"bar\.sync|s_barrier", assembly)),
    }


def resources(stages):
    if "amdgcn" in stages:
        fields = (r"\.vgpr_count: +(\d+)", r"\.private_segment_fixed_size: +(\d+)")
        return [int(re.search(field, stages["amdgcn"])[1]) for field in fields]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(stages["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"Function \w+_kernel:\s+REG:(\d+) STACK:(\d+)", usage)
    return [int(number) for number in found.groups()]


# How states and bfloat16 parameters are kept beside float32 and rounded to nearest.
STORAGES = [
    ("float32", "split"),
    ("bfloat16", "stochastic"),
    ("block8", "split"),
    ("block8", "stochastic"),
]
STORAGE_KERNELS = [*((name, "sm_90") for name in triton_kernels.ALGORITHMS), ("adam", "gfx942")]
# Where threads wait for each other: at the ticket twice, and three times (twice with Triton 3.8)
# for each 8-bit state in the unaligned paths of the three dtypes, where several warps have a
# block. Aligned, one has it.
TICKET_BARRIERS = 2
BARRIERS_EACH = (2, 3)
UNALIGNED_STATES = {"sgd": 3, "adam": 2 * 3, "lion": 3}
# Beside compressed states the conversions take registers: for 768 threads on each multiprocessor.
STORAGE_REGISTERS = 80


def compile_all():
    rows = itertools.product(triton_kernels.ALGORITHMS, TARGETS)
    report = {f"{name}-{target}": compile_step(name, target) for name, target in rows}
    for (name, kernel), target in itertools.product(LAMB_KERNELS.items(), TARGETS):
        compiled = compile_launch(kernel, target, LAMB_ARGUMENTS, (CHUNK, True))
        report[f"{name}-{target}"] = compiled
    for (name, target), storage in itertools.product(STORAGE_KERNELS, STORAGES):
        kind = "-".join(storage)
        report[f"{name}-{target}-{kind}"] = compile_step(name, target, storage)
    for target in ("sm_90", "gfx942"):
        report[f"scaled-{target}"] = compile_step("adam", target, scaled=True)
        report[f"norm-{target}"] = compile_norm(target)
    report["starved"] = compile_step("adam", "sm_90", maxnreg=24)
    return report


@pytest.fixture(scope="module")
def report():
    """What `compile_all` returns in a process of its own; Triton keeps what it has compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, __file__]
    return json.loads(subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE).stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_compiles_to_wide_accesses_without_spills(report, launch, target):
    kernel = report[f"{launch}-{target}"]
    assert kernel["stack"] == 0
    assert kernel["registers"] <= REGISTERS[TARGETS[target][0]]
    assert (kernel["wide_loads"], kernel["wide_stores"]) == WIDE_ACCESSES[launch]
    assert kernel["exchanges"] == 0  # between threads, through shared memory


@pytest.mark.parametrize("storage", STORAGES, ids="-".join)
@pytest.mark.parametrize(("algorithm", "target"), STORAGE_KERNELS)
def test_every_storage_compiles_without_spills(report, algorithm, target, storage):
    kernel = report[f"{algorithm}-{target}-{'-'.join(storage)}"]
    states = UNALIGNED_STATES[algorithm] if storage[0] == "block8" else 0
    assert kernel["barriers"] - TICKET_BARRIERS in [each * states for each in BARRIERS_EACH]
    assert kernel["stack"] == 0
    assert kernel["registers"] <= max(STORAGE_REGISTERS, REGISTERS[TARGETS[target][0]])


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", ["scaled", "norm"])
def test_scaled_steps_and_norms_compile_without_spills(report, kernel, target):
    found = report[f"{kernel}-{target}"]
    assert found["stack"] == 0
    assert found["registers"] <= REGISTERS[TARGETS[target][0]]
    if kernel == "scaled":
        assert (found["wide_loads"], found["wide_stores"]) == WIDE_ACCESSES["adam"]


def test_spills_are_seen(report):
    assert report["starved"]["registers"] == 24
    assert report["starved"]["stack"] > 0


if __name__ == "__main__":
    print(json.dumps(compile_all()))
