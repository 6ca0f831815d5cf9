"""Claim: the host's part of an optimizer step is a fraction of that of torch's fused AdamW.

    python benchmarks/bench_host_path.py                  # instructions per step, a table
    python benchmarks/bench_host_path.py --quick --check  # exit code 1 if more than the baseline
    python benchmarks/bench_host_path.py --update         # also makes the numbers the baseline

Counts of instructions by valgrind: unlike times they are the same in each run, however busy the
machine. Small float32 tensors are updated by AdamW with a REX schedule, with the gradients of
the last step or with new ones, as after a backward pass. A step is one as in bench_step.py. What
one costs is the difference of 2 n and n steps, over n, less the cost of calling nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results_page

BASELINE = results_page.FOLDER / "host-path.json"
MAX_RISE = 0.03
WARMUP = 3
ELEMENTS = 16
OURS, THEIRS, NOTHING = "lrs_ext", "torch fused", "nothing"
GRADIENTS = ("same", "new")
# Whose instructions: the first pattern that the path of a library matches.
OWNERS = {
    "lrs_ext": re.compile(r"/lrs_ext/_C\."),
    "torch": re.compile(r"/torch/lib/|/torch/_C\."),
    "interpreter": re.compile(r"/lib-dynload/|/libpython[^/]*$|/python[\d.]*$"),
    "other": re.compile(""),
}
# Switches counting on and off from within; the macros are instructions that valgrind recognises.
SWITCH = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void toggle(void) { CALLGRIND_TOGGLE_COLLECT; }
void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
# The only variables that reach the measured process: others would move its addresses.
ENVIRONMENT = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
FIXED_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


class BenchmarkError(Exception):
    """Something is missing; the message says the way out."""


@dataclass(frozen=True)
class Case:
    name: str
    tensors: int
    steps: int  # n


CASES = (Case("300 x 16", 300, steps=10), Case("5,000 x 16", 5_000, steps=2))
QUICK_CASES = (Case("300 x 16", 300, steps=3),)


# The measured process.


def measure(folder: Path, cases: Sequence[Case]) -> None:
    """Runs under callgrind; leaves a file in `folder` for each count."""
    import bench_step
    import step_cases
    import step_contenders
    import storages
    import torch

    adamw = step_cases.Case("host path", (), rounds=0)
    switch = ctypes.CDLL(str(folder / "switch.so"))
    toggle = switch.toggle
    starts: dict[str, Callable[..., Callable[[], object]]] = {
        NOTHING: lambda params: lambda: None,
        THEIRS: step_contenders.start_torch(adamw, fused=True),
        OURS: step_contenders.start_ours(adamw, "cpu", storages.KINDS["float32"]),
    }
    for case in cases:
        gradients = [torch.ones(ELEMENTS) for _ in range(case.tensors)]
        steps, params = {}, {}
        for name, start in starts.items():
            params[name] = [torch.ones(ELEMENTS, requires_grad=True) for _ in gradients]
            bench_step.give_gradients(params[name], gradients)
            steps[name] = start(params[name])
            for _ in range(WARMUP):
                steps[name]()
        gc.collect()
        gc.disable()
        switch.start()
        for name, step in steps.items():
            for kind in GRADIENTS:
                print(f"{case.name}, {name}, {kind} gradients ...", file=sys.stderr, flush=True)
                for count in (1, case.steps, 2 * case.steps):  # the first meets cold caches
                    for _ in range(count):
                        if kind == "new":
                            bench_step.give_gradients(params[name], gradients)
                        toggle()
                        step()
                        toggle()
                    switch.dump(json.dumps([case.name, name, kind, count]).encode())
        gc.enable()


# What callgrind wrote.


def parse_counts(text: str) -> tuple[str, dict[str, int]]:
    """Returns the label of a dump, and the instructions that each library ran itself.

    Source: Callgrind Format Specification, valgrind.org/docs/manual/cl-format.html. A name stands
    in full where its number comes up first. The line after `calls=` has what the callee took.
    """
    label, library = "", ""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    is_callee = False
    for line in text.splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            label = line.partition("Request: ")[2]
        elif line.startswith(("ob=", "cob=")):
            key, _, value = line.partition("=")
            number, _, name = value.partition(" ")
            name = names.setdefault(number, name)
            library = name if key == "ob" else library
        elif line.startswith("calls="):
            is_callee = True
        elif line[:1] in ("+", "-", "*") or line[:1].isdigit():
            if not is_callee:
                counts[library] = counts.get(library, 0) + int(line.split()[1])
            is_callee = False
    return label, counts


def by_owner(counts: dict[str, int]) -> dict[str, int]:
    found = {"total": sum(counts.values()), **dict.fromkeys(OWNERS, 0)}
    for library, count in counts.items():
        owner = next(name for name, pattern in OWNERS.items() if pattern.search(library))
        found[owner] += count
    return found


def per_step(dumps: dict[tuple[str, str, str, int], dict[str, int]]) -> list[dict[str, Any]]:
    """Returns a row for each case, contender and kind of gradients."""

    def cost(case: str, name: str, kind: str) -> dict[str, float]:
        counts = {key[3]: value for key, value in dumps.items() if key[:3] == (case, name, kind)}
        once, twice = sorted(counts)[-2:]
        return {k: (counts[twice][k] - counts[once][k]) / (twice - once) for k in counts[twice]}

    rows = []
    for case, name, kind in dict.fromkeys(key[:3] for key in dumps):
        if name != NOTHING:
            calling = cost(case, NOTHING, kind)
            instructions = {k: round(v - calling[k]) for k, v in cost(case, name, kind).items()}
            rows.append({"case": case, "name": name, "gradients": kind, **instructions})
    return rows


# The process that measures.


def count_instructions(folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    build_switch(folder)
    script = [sys.executable, __file__, "--measure", str(folder)]
    script += ["--quick"] * quick
    options = ["-q", f"--log-file={folder}/log", f"--callgrind-out-file={folder}/out"]
    counting = ["--instr-atstart=no", "--collect-atstart=no"]
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    done = subprocess.run(
        ["valgrind", "--tool=callgrind", *options, *counting, *script],
        env=kept | FIXED_ENVIRONMENT,
    )
    if done.returncode != 0:
        log = (folder / "log").read_text(errors="replace").strip()[-2000:]
        raise BenchmarkError(f"the measured process ended with code {done.returncode}: {log}")
    dumps = {}
    for path in sorted(folder.glob("out.*"), key=lambda path: int(path.suffix[1:])):
        label, counts = parse_counts(path.read_text(errors="replace"))
        case, name, kind, count = json.loads(label)
        dumps[case, name, kind, count] = by_owner(counts)
    return per_step(dumps)


def build_switch(folder: Path) -> None:
    if shutil.which("valgrind") is None:
        raise BenchmarkError("no valgrind on the PATH: install valgrind")
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        raise BenchmarkError(f"no C compiler {compiler}: install one or set CC")
    source, library = folder / "switch.c", folder / "switch.so"
    source.write_text(SWITCH)
    command = [compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(
            "valgrind's headers could not be used: install them with valgrind "
            f"(its package or valgrind-devel):\n{done.stderr}"
        )


def versions() -> str:
    """Names what the counts depend on besides our own code."""
    torch = importlib.metadata.version("torch")
    return f"Python {platform.python_version()}, torch {torch}, {platform.machine()}"


def risen(rows: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Compares our rows with the same ones of the baseline, in total and in our library."""
    stored = {(row["case"], row["name"], row["gradients"]): row for row in baseline}
    for row in rows:
        known = stored.get((row["case"], row["name"], row["gradients"]))
        if row["name"] != OURS or known is None:
            continue
        for what in ("total", "lrs_ext"):
            rise = row[what] / known[what] - 1
            yield {
                "case": f"{row['case']}, {row['gradients']} gradients",
                "what": what,
                "measured": row[what],
                "baseline": known[what],
                "rise": rise,
                "passed": rise <= MAX_RISE,
            }


def rows_table(rows: list[dict[str, Any]]) -> str:
    header = ["case", "gradients", "optimizer", "total", *OWNERS]
    lines = [
        [row["case"], row["gradients"], row["name"], *(f"{row[k]:,}" for k in ("total", *OWNERS))]
        for row in rows
    ]
    return results_page.table(header, lines)


def checks_table(checks: list[dict[str, Any]]) -> str:
    lines = [
        [
            check["case"],
            check["what"],
            f"{check['measured']:,}",
            f"{check['baseline']:,}",
            f"{check['rise']:+.1%}",
            results_page.verdict(check["passed"]),
        ]
        for check in checks
    ]
    return results_page.table(["case", "count", "measured", "baseline", "rise", "result"], lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only 300 tensors, fewer steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit with 1 if a count is more than {MAX_RISE:.0%}% above the baseline",
    )
    parser.add_argument("--update", action="store_true", help="store the numbers as baseline")
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", default=BASELINE, help="by versions (%(default)s)"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in the measured process
    args = parser.parse_args(argv)
    if args.update and args.check:
        parser.error("--update replaces the baseline that --check compares with: give one of them")
    if args.update and args.quick:
        parser.error("--update stores every case: leave --quick out")
    for path in (args.json, args.baseline):
        if path is not None and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent}: create it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.measure is not None:
        measure(args.measure, QUICK_CASES if args.quick else CASES)
        return 0
    baselines = json.loads(args.baseline.read_text()) if args.baseline.exists() else {}
    known = baselines.get(versions())
    try:
        if args.check and known is None:
            raise BenchmarkError(
                f"{args.baseline} has no numbers for {versions()}, only for {list(baselines)}: "
                "add them with --update"
            )
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = count_instructions(Path(folder), quick=args.quick)
    except BenchmarkError as error:
        print(f"bench_host_path.py: error: {error}", file=sys.stderr)
        return 2
    print(f"\nInstructions per step; {versions()}; {time.monotonic() - started:.0f} s\n")
    print(rows_table(rows))
    checks = list(risen(rows, known or []))
    if checks:
        print(f"\n{checks_table(checks)}")
    if args.json is not None:
        document = {"versions": versions(), "rows": rows, "checks": checks}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.update:
        baselines[versions()] = rows
        args.baseline.write_text(json.dumps(baselines, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {args.baseline}")
    return 1 if args.check and not all(check["passed"] for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
