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

# xdist: one worker compiles for all tests of the file.
pytestmark = pytest.mark.xdist_group(__name__)

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ["80", "90", "100", "120"]
# 256 threads a block and four blocks at once on a multiprocessor of 65,536 registers.
MAX_REGISTERS = 64


STEP_KERNELS = [name for name in _C.algorithms if name != "lamb"]
STEP_KERNELS += ["lamb_moments_kernel", "lamb_params_kernel"]
# 16-byte loads and stores for three dtypes; where none are said, with two numbers of states.
WIDE = {
    "lion": {"ld": 5, "st": 4},
    "lamb_moments_kernel": {"ld": 8, "st": 6},
    "lamb_params_kernel": {"ld": 7, "st": 1},
}


@pytest.fixture(scope="module")
def build_command(tmp_path_factory):
    """nvcc with the flags of the project's build, but no architecture, and where to call it."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("no cmake on the PATH or in this environment")
    folder = tmp_path_factory.mktemp("cuda")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LRS_CUDA")}
    configure = [cmake, "-S", ROOT, "-B", folder, "-DLRS_PYTHON=OFF"]
    subprocess.run(configure, env=environment | {"PATH": path}, check=True, capture_output=True)
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        if entry["file"].endswith(".cu"):
            command = shlex.split(entry["command"])
            flags = command[: command.index("-c")]
            return [f for f in flags if not f.startswith("--generate-code")], entry["directory"]
    return pytest.skip("no nvcc: install the CUDA toolkit to check the kernels")


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def kernels(request, build_command, tmp_path_factory):
    """The report of ptxas and the PTX of each kernel, by name; Adam's step kernel is `adam`."""
    command, directory = build_command
    known = subprocess.run([command[0], "--list-gpu-code"], check=True, capture_output=True)
    if f"sm_{request.param}" not in known.stdout.decode().split():
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    inspect = [f"-arch=sm_{request.param}", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
    output = ["-cubin", ROOT / "csrc" / "step_cuda.cu", "-o", folder / "step_cuda.cubin"]
    compilation = [*command, *inspect, *output]
    done = subprocess.run(compilation, cwd=directory, check=True, capture_output=True, text=True)
    report = {name_of(text): text for text in done.stderr.split("Compiling entry function")[1:]}
    ptx = (folder / "step_cuda.ptx").read_text()
    code = {name_of(text): text for text in re.split(r"\.entry ", ptx)[1:]}
    assert report.keys() == code.keys()
    return {name: (report[name], code[name]) for name in report}


def name_of(text):
    mangled = re.search(r"_Z\w+", text)[0]
    update = re.search(r"step_kernelI\w*?\d([A-Za-z]+)EEEv", mangled)
    return update[1].lower() if update else re.search(r"\d([a-z_]+_kernel)", mangled)[1]


def number_before(what, report):
    return [int(number) for number in re.findall(rf"(\d+) {what}", report)]


def test_every_update_has_a_step_kernel(kernels):
    others = {"fill_schedule_kernel", "write_group_kernel"}
    assert kernels.keys() == others | set(STEP_KERNELS)


def test_no_kernel_spills_registers(kernels):
    for name, (report, _) in kernels.items():
        spills = number_before(r"bytes spill (?:stores|loads)", report)
        assert spills, name
        assert not any(spills), name


def test_step_kernels_stay_in_registers_of_which_they_have_64(kernels):
    for name in STEP_KERNELS:
        report, _ = kernels[name]
        [registers] = number_before("registers", report)
        assert registers <= MAX_REGISTERS, name
        assert number_before("bytes stack frame", report)[0] == 0, name


def test_step_kernels_move_16_bytes_at_a_time_to_and_from_global_memory(kernels):
    for name in STEP_KERNELS:
        _, code = kernels[name]
        moves = re.findall(r"\b(ld|st)\.(global\.)?(?:nc\.)?v4\.", code)
        for kind in ("ld", "st"):
            assert moves.count((kind, "global.")) >= WIDE.get(name, {}).get(kind, 6), (name, kind)
            # Without knowing the memory space, the hardware has to find it out at each access.
            assert moves.count((kind, "")) == 0, (name, kind)
