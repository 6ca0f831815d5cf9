"""The CUDA kernels alone, AdamW: seconds of a step by shape, storage and length of the chunks.

    python benchmarks/bench_kernels.py                  # builds them for this GPU, then a table
    python benchmarks/bench_kernels.py --json FILE      # also the numbers

Without Python, torch or the host path: what a change of a kernel does shows here first, in a
minute. Every step starts with other data in the caches. The share is that of the bandwidth of a
copy in the same run; the best length of each row has a star.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import results_page

ROOT = Path(__file__).resolve().parent.parent
CHUNKS = (1024, 2048, 4096, 8192, 16384)
ROUNDS = 21

Case = dict[str, Any]


def built(folder: Path, architecture: str) -> Path:
    """Builds the program for one architecture, such as "90", and returns its path."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit("there is no cmake on the PATH: pip install cmake")
    options = ["-DLRS_PYTHON=OFF", "-DLRS_BENCHMARKS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    environment = os.environ | {"LRS_CUDA": "1", "LRS_CUDA_ARCHS": architecture}
    for command in (
        [cmake, "-S", ROOT, "-B", folder, *options],
        [cmake, "--build", folder, "--target", "kernels", "--parallel"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}{done.stderr}\nthe kernels could not be built")
    return folder / "kernels"


def measured(program: Path, rounds: int) -> Iterator[Case]:
    """Runs the program and yields its cases as they come; the copy comes first.

    Raises:
        SystemExit: the program has failed.
    """
    command = [program, str(rounds), *map(str, CHUNKS)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                yield json.loads(line)
        if process.returncode != 0:
            errors.seek(0)
            raise SystemExit(f"{program.name} ended with {process.returncode}: {errors.read()}")


def table(cases: Sequence[Case]) -> list[str]:
    """Returns the lines of the table; the last row may lack some lengths."""
    copy, *steps = cases
    bandwidth = copy["bytes"] / copy["seconds"][1]
    lines = [f"copy: {bandwidth / 1e12:.3f} TB/s"]
    lines.append(f"{'us of a step, chunks of':<42}" + "".join(f"{c:>10,}" for c in CHUNKS))
    lines[-1] += f"{'share':>8}"
    rows: dict[tuple[str, str], list[Case]] = {}
    for case in steps:
        rows.setdefault((case["shape"], case["storage"]), []).append(case)
    for (shape, storage), row in rows.items():
        best = min(row, key=lambda case: float(case["seconds"][1]))
        times = [f"{case['seconds'][1] * 1e6:>9.1f}{'*' if case is best else ' '}" for case in row]
        share = best["bytes"] / best["seconds"][1] / bandwidth
        lines.append(f"{shape:<16}{storage:<26}{''.join(times):<{10 * len(CHUNKS)}}{share:>7.0%}")
    return lines


def report(measurements: Iterable[Case], path: Path | None) -> None:
    """Prints the table and writes the numbers, of what there is also where a measurement fails."""
    cases: list[Case] = []
    try:
        for case in measurements:
            cases.append(case)
            if path is not None:
                results_page.write_whole(path, json.dumps(cases, indent=1))
    finally:
        if cases:
            print("\n".join(table(cases)))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be positive, got {options.rounds}")
    import torch

    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device: the kernels need one")
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = built(Path(folder), f"{major}{minor}")
        print(torch.cuda.get_device_name())
        report(measured(program, options.rounds), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
