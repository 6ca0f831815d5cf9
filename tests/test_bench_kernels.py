"""The benchmark of the kernels alone: its program compiles; its table, of made-up numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_kernels


def case(shape, storage, chunk, microseconds, size):
    seconds = [microseconds * factor * 1e-6 for factor in (0.9, 1.0, 1.2)]
    return {"shape": shape, "storage": storage, "chunk": chunk, "seconds": seconds, "bytes": size}


def test_the_table_names_the_best_length_and_its_share_of_a_copy():
    cases = [case("copy", "", 0, 1000.0, 2e9)]
    times = dict(zip(bench_kernels.CHUNKS, (9.0, 8.0, 4.0, 5.0, 6.0), strict=True))
    cases += [case("1 x 16K", "float32", chunk, time, 2e6) for chunk, time in times.items()]
    copy, _, row = bench_kernels.table(cases)
    assert copy == "copy: 2.000 TB/s"
    assert row.split() == ["1", "x", "16K", "float32", "9.0", "8.0", "4.0*", "5.0", "6.0", "25%"]


def test_no_device_is_an_error_that_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench_kernels.main([])
    assert "sees no CUDA device" in capsys.readouterr().err


def test_a_program_that_fails_keeps_what_it_had_measured(tmp_path, capsys):
    program, numbers = tmp_path / "kernels", tmp_path / "numbers.json"
    cases = [case("copy", "", 0, 1000.0, 2e9), case("1 x 16K", "float32", 1024, 9.0, 2e6)]
    lines = "\n".join(map(json.dumps, cases))
    program.write_text(f"#!/bin/sh\necho '{lines}'\necho no memory >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(SystemExit, match="kernels ended with 3: no memory"):
        bench_kernels.report(bench_kernels.measured(program, 1), numbers)
    assert json.loads(numbers.read_text()) == cases
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["1", "x", "16K", "float32", "9.0*", "11%"]


def test_a_program_that_fails_at_once_is_an_error_with_its_output(tmp_path, capsys):
    program = tmp_path / "kernels"
    program.write_text("#!/bin/sh\necho no memory >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(SystemExit, match="kernels ended with 3: no memory"):
        bench_kernels.report(bench_kernels.measured(program, 1), None)
    assert not capsys.readouterr().out


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_program_compiles(tmp_path):
    source = bench_kernels.ROOT / "benchmarks" / "kernels.cu"
    include = f"-I{bench_kernels.ROOT / 'csrc'}"
    command = ["nvcc", "-std=c++17", "-arch=sm_90", include, "-c", source]
    subprocess.run([*command, "-o", tmp_path / "kernels.o"], check=True)
