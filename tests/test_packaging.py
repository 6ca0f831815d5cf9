"""What is built and shipped: source archive, wheels, the core for C++ programs, build switches."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lrs_ext
from lrs_ext import _C

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
BUILD_REQUIREMENTS = json.loads(re.search(r"^requires = (\[.*\])$", PROJECT, re.MULTILINE)[1])
BUILD_BACKEND = re.search(r'^build-backend = "(.*)"$', PROJECT, re.MULTILINE)[1]
# Most of the time of a build. The flags themselves are those of the module that all tests run on.
QUICK = {"CMAKE_CXX_COMPILER_LAUNCHER": str(ROOT / "tests" / "unoptimised.sh")}
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
NOT_SOURCES = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "__pycache__", "*.so", "*.egg-info", "results"
)


def run(*command, cwd=None, check=True, **environment):
    """Runs a command, without the variables that steer a build or a backend unless given."""
    steering = {"CMAKE_ARGS", "LRS_CUDA", "LRS_CUDA_ARCHS", "PYTHONPATH", "TRITON_INTERPRET"}
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    kept |= QUICK | {"PATH": PATH}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def pip(*arguments, **options):
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources: a build leaves files behind."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "lrs", ignore=NOT_SOURCES)


@pytest.fixture(scope="module")
def build_tools():
    for name in ("scikit_build_core", "setuptools", "pybind11"):
        pytest.importorskip(name, reason=f"{name} is needed for a build without isolation")


@pytest.fixture(scope="module")
def sdist(source, build_tools, tmp_path_factory):
    target = tmp_path_factory.mktemp("sdist")
    code = f"import {BUILD_BACKEND} as backend; backend.build_sdist({str(target)!r})"
    run(sys.executable, "-c", code, cwd=source)
    [archive] = target.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(source, build_tools, tmp_path_factory):
    """Built with the tools of this environment, with CUDA for one architecture if nvcc is found."""
    target = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "-w", target, source, LRS_CUDA_ARCHS="80")
    [archive] = target.glob("*.whl")
    return archive


class Installed:
    """A wheel in an environment of its own that sees the torch of this one."""

    def __init__(self, wheel, folder):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        arguments = ["install", "--no-deps", "--no-index", wheel]
        pip("--python", self.python, *arguments)
        [site] = folder.glob("lib/python*/site-packages")
        # Only the folder: its own .pth files, which may lead to an editable install, stay unread.
        (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
        self.folder, self.site = folder, site

    def run(self, *arguments, **options):
        return run(self.python, *arguments, cwd=self.folder, **options)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(wheel, tmp_path_factory.mktemp("venv"))


STEP = """
import json, torch, lrs_ext
from lrs_ext import _C
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
lrs_ext.SGD([p], lr=lrs_ext.linear(0.5, total_steps=2)).step()
print(json.dumps([lrs_ext.__file__, _C.__file__, lrs_ext.__version__, p.tolist()]))
"""


def test_an_installed_wheel_takes_a_step(installed):
    report = installed.run("-c", STEP).stdout.splitlines()[-1]
    package, native, version, param = json.loads(report)
    assert Path(package).parent == Path(native).parent == installed.site / "lrs_ext"
    assert version == lrs_ext.__version__
    assert param == [0.5, 0.5, 0.5]


def test_an_installed_wheel_says_what_it_is(installed):
    info = json.loads(installed.run("-m", "lrs_ext", "info", "--json").stdout)
    assert info["lrs_ext"] == lrs_ext.__version__
    assert info["backends"]["cpu"]["used"] == "cpu"


def test_an_installed_wheel_passes_its_own_check(installed):
    report = installed.run("-m", "lrs_ext", "selfcheck").stdout
    assert len(re.findall(r"\bok\b", report)) >= 9  # three optimizers with three dtypes
    assert "WRONG" not in report


def test_sources_that_hide_an_installed_wheel_say_so(installed, source):
    done = run(installed.python, "-c", "import lrs_ext", cwd=source, check=False)
    assert "could not be loaded (No module named 'lrs_ext._C')" in done.stderr
    assert f"import it in another folder than {source}" in done.stderr


def test_a_build_in_isolation_from_the_source_archive_needs_no_torch(sdist, tmp_path):
    """Its environment has what [build-system] asks for and nothing else."""
    reached = pip(
        "download", "--no-deps", "-d", tmp_path / "tools", *BUILD_REQUIREMENTS, check=False
    )
    if reached.returncode != 0:
        pytest.skip(f"no package index within reach: {reached.stderr.splitlines()[-1]}")
    assert not any("torch" in requirement for requirement in BUILD_REQUIREMENTS)
    pip("wheel", "--no-deps", "-w", tmp_path, sdist, LRS_CUDA="0")
    [wheel] = tmp_path.glob("*.whl")
    installed = Installed(wheel, tmp_path / "venv")
    assert json.loads(installed.run("-c", STEP).stdout.splitlines()[-1])[3] == [0.5, 0.5, 0.5]
    info = json.loads(installed.run("-m", "lrs_ext", "info", "--json").stdout)
    assert "built without CUDA" in info["backends"]["cuda"]["reasons"]["cuda"]


# What is in the archives.


def test_the_wheel_has_the_package_with_its_types_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"lrs_ext/py.typed", "lrs_ext/_C.pyi"} <= set(names)
    ours = {p.name for p in (ROOT / "lrs_ext").glob("*.py")}
    assert ours <= {name.removeprefix("lrs_ext/") for name in names}
    roots = {name.split("/")[0] for name in names}
    assert roots == {"lrs_ext", f"lrs_ext-{lrs_ext.__version__}.dist-info"}


def test_the_source_archive_has_what_a_build_needs_and_no_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "lrs_ext/py.typed"} | native <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "build"))}
    assert not {name for name in names if name.endswith(".so")}


def test_the_version_is_the_same_everywhere(wheel):
    cmake = re.search(r"project\(lrs_ext VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    project = re.search(r'^version = "(.*)"$', PROJECT, re.MULTILINE)
    assert {project[1], cmake[1], wheel.name.split("-")[1]} == {lrs_ext.__version__}


# What the native module is linked to.


def dependencies(native):
    listing = run("readelf", "-d", native).stdout
    return re.findall(r"\(NEEDED\).*\[(\S+)\]", listing)


def test_the_native_module_links_neither_torch_nor_cuda(installed):
    for native in (*installed.site.glob("lrs_ext/_C.*.so"), _C.__file__):
        needed = dependencies(native)
        assert any(name.startswith("libc.") for name in needed)
        assert not [name for name in needed if re.search("torch|c10|cuda|nv", name)]


CUDA = """
import json
from lrs_ext import _C, backends
architectures = _C.cuda_architectures if _C.has_cuda else None
print(json.dumps([architectures, backends.unavailable_reason("cuda", "cuda")]))
"""


def test_a_build_with_cuda_loads_without_a_device_and_says_why_it_is_of_no_use(installed):
    # Without a driver, or, where there is one, with all its devices hidden.
    report = installed.run("-c", CUDA, CUDA_VISIBLE_DEVICES="").stdout
    architectures, reason = json.loads(report)
    if architectures is None:
        pytest.skip("no nvcc here: the wheel was built without CUDA")
    assert architectures == "80"
    assert re.search("driver|no CUDA", reason)


# Build switches.


def cmake(*arguments, **options):
    program = shutil.which("cmake", path=PATH)
    if program is None:
        pytest.skip("no cmake on the PATH or in this environment")
    return run(program, *arguments, **options)


# As on a machine without nvcc: CMake does not look for what it has been told.
NO_NVCC = ("-DCMAKE_CUDA_COMPILER=NOTFOUND", "-DLRS_NVCC=")


def configure(folder, *options, **environment):
    arguments = ["-S", ROOT, "-B", folder, "-DLRS_PYTHON=OFF", *options]
    done = cmake(*arguments, check=False, **environment)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def compile_commands(folder):
    entries = json.loads((folder / "compile_commands.json").read_text())
    return {entry["command"] for entry in entries}


def test_cuda_demanded_without_nvcc_fails_with_the_way_out(tmp_path):
    code, output = configure(tmp_path, *NO_NVCC, LRS_CUDA="1")
    assert code != 0
    assert "LRS_CUDA=1 but no nvcc was found: install the CUDA toolkit" in output
    assert "or unset LRS_CUDA to build without CUDA" in output


def test_cuda_not_demanded_without_nvcc_is_left_out(tmp_path):
    code, output = configure(tmp_path, *NO_NVCC)
    assert code == 0, output
    assert "lrs_ext: no CUDA backend" in output


def test_cuda_is_left_out_of_a_folder_that_has_been_configured_with_it(tmp_path):
    code, output = configure(tmp_path, "-DCMAKE_CUDA_COMPILER=/no/longer/there/nvcc", LRS_CUDA="0")
    assert code == 0, output
    assert "lrs_ext: no CUDA backend" in output


def test_a_broken_nvcc_fails_with_the_way_out(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    code, output = configure(tmp_path / "build", PATH=os.pathsep.join([str(tmp_path), PATH]))
    assert code != 0
    assert f"if {nvcc} does not work, LRS_CUDA=0 builds without CUDA" in output


@pytest.mark.parametrize("wanted", ["80,sm_90", "80,9.0", "80 90", "80,9999"])
def test_an_architecture_that_nvcc_does_not_know_is_refused(wanted, tmp_path):
    code, output = configure(tmp_path, LRS_CUDA_ARCHS=wanted)
    if "lrs_ext: no CUDA backend" in output:
        pytest.skip("no nvcc here")
    assert code != 0
    assert f"does not know {wanted.split(',')[-1]} in LRS_CUDA_ARCHS" in output


def test_the_newest_architecture_comes_last_whatever_the_order(tmp_path):
    code, output = configure(tmp_path, LRS_CUDA_ARCHS="90,80")
    assert code == 0, output
    if "lrs_ext: no CUDA backend" in output:
        pytest.skip("no nvcc here")
    assert "lrs_ext: CUDA backend for 80,90" in output
    [commands] = {c for c in compile_commands(tmp_path) if "step_sgd.cu" in c}
    assert re.search(r"arch=compute_90,code=\[?compute_90", commands)


def test_an_unknown_value_of_the_switch_is_refused(source, build_tools, tmp_path):
    done = pip("wheel", "--no-build-isolation", "--no-deps", source, check=False, LRS_CUDA="2")
    assert done.returncode != 0
    assert "LRS_CUDA must be 0, 1 or unset, got 2" in done.stdout + done.stderr


# The core from C++.

OUTSIDE = """
cmake_minimum_required(VERSION 3.20)
project(outside LANGUAGES CXX)
set(LRS_PYTHON OFF)
set(LRS_EXAMPLES ON)
add_subdirectory("{root}" lrs_ext)
add_executable(outside "{root}/tests/train_line.cpp")
target_link_libraries(outside PRIVATE lrs::core)

# As strict as programs are, each header alone.
set(CMAKE_CXX_STANDARD 20)
add_library(strict SHARED "{root}/tests/train_line.cpp")
foreach(header {headers})
  file(WRITE "${{CMAKE_BINARY_DIR}}/${{header}}.cpp" "#include \\"${{header}}\\"\\n")
  target_sources(strict PRIVATE "${{CMAKE_BINARY_DIR}}/${{header}}.cpp")
endforeach()
target_link_libraries(strict PRIVATE lrs::core)
target_compile_options(strict PRIVATE -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion
                       -Wshadow -Wold-style-cast -Werror -fno-exceptions -fno-rtti)
"""
PYTHON_HEADERS = {"dict_versions.h", "known_groups.h", "step_tensors.h", "tensor_access.h"}


def test_a_cmake_project_trains_with_the_core(tmp_path):
    headers = {path.name for path in (ROOT / "csrc").glob("*.h")} - PYTHON_HEADERS
    project = OUTSIDE.format(root=ROOT, headers=" ".join(sorted(headers)))
    (tmp_path / "CMakeLists.txt").write_text(project)
    build = tmp_path / "build"
    cmake("-S", tmp_path, "-B", build, LRS_CUDA="0")
    cmake("--build", build, "--parallel", "2")
    for program in (build / "outside", build / "lrs_ext" / "train_line"):
        assert re.fullmatch(r"y = 2\.00\d* x \+ 1\.00\d* after 300 steps\n", run(program).stdout)
