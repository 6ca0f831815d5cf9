"""What nvcc makes of the CUDA kernels, on any machine that has it: registers, spills, widths."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from lrs_ext import _C

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ["80", "90", "100", "120"]
# 256 threads a block and four blocks at once on a multiprocessor of 65,536 registers.
MAX_REGISTERS = 64


STORAGES = ["Float32State", "BFloat16State", "Block8State"]
LAMB = ["lamb_moments_kernel", "lamb_params_kernel"]
CAPACITIES = [256, 3800]  # for the gradients of a launch
# Compiling everything for one architecture takes 20 seconds: for the others, Adam has to do, which
# needs the most registers.
EVERYTHING, THE_REST = "90", ["step_adam"]
# 16-byte loads and stores for three dtypes; where none are said, with two numbers of states. Beside
# compressed states, float32 parameters have the widest lanes.
WIDE = {
    "step_lion_Float32State": {"ld": 5, "st": 4},
    "lamb_moments_kernel": {"ld": 8, "st": 6},
    "lamb_params_kernel": {"ld": 7, "st": 1},
}


@pytest.fixture(scope="module")
def build_commands(tmp_path_factory):
    """For each .cu file of the build nvcc with its flags, but no architecture; where to call it."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("no cmake on the PATH or in this environment")
    folder = tmp_path_factory.mktemp("cuda")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LRS_CUDA")}
    configure = [cmake, "-S", ROOT, "-B", folder, "-DLRS_PYTHON=OFF"]
    subprocess.run(configure, env=environment | {"PATH": path}, check=True, capture_output=True)
    commands = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        if entry["file"].endswith(".cu"):
            command = shlex.split(entry["command"])
            flags = command[: command.index("-c")]
            commands[Path(entry["file"])] = [f for f in flags if "--generate-code" not in f]
    if not commands:
        pytest.skip("no nvcc: install the CUDA toolkit to check the kernels")
    assert commands.keys() == set((ROOT / "csrc").glob("*.cu"))
    return commands, folder


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def kernels(request, build_commands, tmp_path_factory):
    """The report of ptxas and the PTX of each kernel, by name, as in `step_adam_Block8State`."""
    commands, directory = build_commands
    nvcc = next(iter(commands.values()))[0]
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True)
    if f"sm_{request.param}" not in known.stdout.decode().split():
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    inspect = [f"-arch=sm_{request.param}", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
    report, code = {}, {}
    for source, command in commands.items():
        if request.param != EVERYTHING and source.stem not in THE_REST:
            continue
        output = ["-cubin", source, "-o", folder / f"{source.stem}.cubin"]
        compilation = [*command, *inspect, *output]
        done = subprocess.run(
            compilation, cwd=directory, check=True, capture_output=True, text=True
        )
        for text in done.stderr.split("Compiling entry function")[1:]:
            report[name_of(text)] = text
        for text in re.split(r"\.entry ", (folder / f"{source.stem}.ptx").read_text())[1:]:
            code[name_of(text)] = text
    assert report.keys() == code.keys()
    return {name: (report[name], code[name]) for name in report}


def name_of(text):
    mangled = re.search(r"_Z\w+", text)[0]
    step = re.search(r"step_kernelI\w*?\d([A-Za-z]+)ENS\w*?_\d+(\w+State)ELi\d+EEEv", mangled)
    name = f"step_{step[1].lower()}_{step[2]}" if step else None
    name = name or re.search(r"\d([a-z_]+_kernel)", mangled)[1]
    capacity = re.search(r"Li(\d+)EEEv", mangled)
    return f"{name} {capacity[1]}" if capacity else name


def number_before(what, report):
    return [int(number) for number in re.findall(rf"(\d+) {what}", report)]


def test_every_update_has_a_step_kernel_for_every_storage(request, kernels):
    others = {"fill_schedule_kernel", "write_group_kernel"}
    elementwise = [name for name in _C.algorithms if name != "lamb"]
    steps = [f"step_{name}_{storage}" for name in elementwise for storage in STORAGES]
    steps = {f"{n} {capacity}" for n in (*steps, "norm_kernel", *LAMB) for capacity in CAPACITIES}
    adam = {name for name in steps if name.startswith("step_adam")}
    is_everything = request.node.callspec.params["kernels"] == EVERYTHING
    assert kernels.keys() == (others | steps if is_everything else adam)


def test_no_kernel_spills_registers(kernels):
    for name, (report, _) in kernels.items():
        spills = number_before(r"bytes spill (?:stores|loads)", report)
        assert spills, name
        assert not any(spills), name


def test_hot_kernels_stay_in_registers_of_which_they_have_64(kernels):
    for name, (report, _) in kernels.items():
        if not name.startswith(("step_", "norm_", "lamb_")):
            continue
        [registers] = number_before("registers", report)
        assert registers <= MAX_REGISTERS, name
        assert number_before("bytes stack frame", report)[0] == 0, name


def test_step_kernels_move_16_bytes_at_a_time_to_and_from_global_memory(kernels):
    for name, (_, code) in kernels.items():
        if not name.startswith(("step_", "lamb_")):
            continue
        moves = re.findall(r"\b(ld|st)\.(global\.)?(?:nc\.)?v4\.", code)
        for kind in ("ld", "st"):
            kernel = name.split()[0]
            least = WIDE.get(kernel, {}).get(kind, 6 if kernel.endswith("Float32State") else 1)
            assert moves.count((kind, "global.")) >= least, (name, kind)
            # Without knowing the memory space, the hardware has to find it out at each access.
            assert moves.count((kind, "")) == 0, (name, kind)
