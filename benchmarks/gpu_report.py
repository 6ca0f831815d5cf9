"""Everything that needs a GPU, in one command: tests, features, sanitizers, benchmarks, the job.

    python benchmarks/gpu_report.py               # writes benchmarks/results/<device>.json and .md
    python benchmarks/gpu_report.py --minutes 20  # on a slower machine

Needs no network, but lrs_ext, pytest, hypothesis and expecttest, and for the main job and its tests
tqdm and matplotlib; with pytest-xdist it takes much less time.
What measures no time runs side by side, then the benchmarks one by one. A stage that fails or runs
out of time is recorded and the others go on; the exit code is 0 only if every stage passed. Ctrl-C
and SIGTERM end all commands and write what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_features
import machines
import results_page
import torch

from lrs_ext import backends

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SANITIZERS = ("memcheck", "racecheck", "initcheck")
JOB_STEPS = 200
ROUNDS = 11  # of the step benchmark: a GPU's times vary by a percent
LONGEST_TOGETHER = 420.0  # seconds for what runs side by side: most of it compiles Triton kernels
SHORTEST_STAGE = 5.0  # seconds; with less than that nothing is started
GRACE = 10.0  # seconds from an interrupt to the end of a stage that ran out of time
OUTPUT_LINES = 25
LISTED_FAILURES = 50
RUNNING: set[int] = set()  # process groups of the commands, to be ended with this process

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of the report.

    Attributes:
        run: gets its time limit in seconds.
        longest: what it may take, in seconds.
        is_timed: it measures time, and so runs alone.
    """

    run: Callable[[float], Outcome]
    longest: float
    is_timed: bool = False


def unusable_reason() -> str | None:
    """Returns why this machine cannot make a report, with the way out, or None if it can."""
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no CUDA device: run this on a machine with an NVIDIA "
            "GPU and its driver, with a CUDA build of torch; the tests and bench_step.py also run "
            "without one"
        )
    reason = backends.unavailable_reason("cuda", "cuda")
    return None if reason is None else f"the cuda backend of lrs_ext cannot be used: {reason}"


def run_command(
    command: Sequence[str | Path], limit: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Runs a command in the repository's root; returns its exit code, None after `limit` seconds,
    and all that it printed."""
    # A file, not a pipe: nobody waits for grandchildren that keep it open.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to end it with all its children
        )
        RUNNING.add(process.pid)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGINT)  # pytest then still writes what it has found
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            end_group(process.pid)  # what it started may go on without it
            RUNNING.discard(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that the driver holds
                process.wait(GRACE)
        log.seek(0)
        return code, log.read().decode(errors="replace")


def end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def ending(code: int | None, output: str, limit: float) -> str:
    """Says in one line how a command ended."""
    if code is None:
        return f"did not finish within {limit:.0f} s"
    lines = [line for line in output.splitlines() if line.strip()]
    return f"exit code {code}" + (f": {without_paths(lines[-1])}" if code and lines else "")


def tail(output: str) -> str:
    """Returns the end of an output, to be kept with a failure."""
    return without_paths("\n".join(output.splitlines()[-OUTPUT_LINES:]))


def without_paths(text: str) -> str:
    """Leaves out where this machine keeps things."""
    for path, name in ((str(ROOT), "."), (sys.prefix, "PYTHON"), (str(Path.home()), "~")):
        if len(path) > 1:
            text = text.replace(path, name)
    return text


def run_tests(limit: float, *, folder: Path) -> Outcome:
    """Runs the tests for the GPUs that there are, of which none may be skipped.

    A file that cannot be imported fails, and the others run.
    """
    xml = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    marked = "gpu" if torch.cuda.device_count() < 2 else "gpu or two_gpus"
    command += ["-m", marked, f"--junitxml={xml}", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(16, os.cpu_count() or 1))]
    code, output = run_command(command, limit, {"OMP_NUM_THREADS": "1"})
    outcome: Outcome = {"passed": code == 0, "detail": ending(code, output, limit)}
    if xml.exists():
        counts, failures = read_junit(xml.read_text(encoding="utf-8"))
        more = len(failures) - LISTED_FAILURES
        listed = failures[:LISTED_FAILURES] + ([f"and {more} more"] if more > 0 else [])
        outcome.update(counts=counts, failures=listed)
        found = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        outcome["detail"] = found or "no test was found"
        if code is None:
            outcome["detail"] += f"; {ending(code, output, limit)}"
        outcome["passed"] = code == 0 and not failures and counts["passed"] > 0
    if not outcome["passed"]:
        outcome["output"] = tail(output)
    return outcome


def read_junit(xml: str) -> tuple[dict[str, int], list[str]]:
    """Returns how many tests had which outcome, and those that did not pass, with the reason.

    Skipped tests are among these, but for the reference backend, which has no tables to look at and
    is too slow for some, and for files that are passed over as a whole: they need a framework that
    is not here, and have no test for a GPU.
    """
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0, "xfailed": 0}
    kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
    failures = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        found = [element for element in case if element.tag in kinds]
        if not found:
            counts["passed"] += 1
            continue
        kind = kinds[found[0].tag]
        if found[0].get("type") == "pytest.xfail":
            kind = "xfailed"
        counts[kind] += 1
        message = (found[0].get("message") or "").strip().splitlines() or ["no message"]
        is_reference = "[reference" in (case.get("name") or "")
        is_by_design = is_reference or message[0] == "collection skipped"
        if kind != "xfailed" and not (kind == "skipped" and is_by_design):
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append(without_paths(f"`{name}` {kind}: {message[0]}"))
    return counts, failures


def run_sanitizer(limit: float, *, tool: str) -> Outcome:
    """Runs steps of every optimizer under one tool of compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        return {
            "passed": False,
            "detail": "compute-sanitizer was not found: it comes with the CUDA toolkit; "
            "put its folder on the PATH",
        }
    # torch's allocator hands out parts of large blocks: an access beyond a tensor would stay
    # within its block, and memory used before would pass for initialised.
    environment = {} if tool == "racecheck" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    # The CUDA runtime probes the driver for functions that may not exist; those are no errors.
    command += ["--report-api-errors", "no"]
    command += [sys.executable, str(BENCHMARKS / "sanitizer_steps.py")]
    code, output = run_command(command, limit, environment)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    clean = bool(summaries) and re.search(r"SUMMARY: 0 (errors|hazards)\b", summaries[-1])
    outcome: Outcome = {"passed": code == 0 and bool(clean)}
    outcome["detail"] = summaries[-1] if summaries else ending(code, output, limit)
    if not outcome["passed"]:
        outcome["output"] = tail(output)
    return outcome


def run_feature(limit: float, *, name: str) -> Outcome:
    """Runs one check of gpu_features.py with every backend that there is."""
    command = [sys.executable, BENCHMARKS / "gpu_features.py", name, "--device", "cuda"]
    code, output = run_command(command, limit)
    found = [line for line in output.splitlines() if line.startswith(f"{name}, ")]
    outcome: Outcome = {"passed": code == 0 and bool(found)}
    outcome["detail"] = "; ".join(found) if code == 0 else ending(code, output, limit)
    if not outcome["passed"]:
        outcome["output"] = tail(output)
    return outcome


def run_benchmark(limit: float, *, folder: Path) -> Outcome:
    """Runs bench_step.py; what it had measured when it failed is kept."""
    numbers = folder / "bench_step.json"
    script = BENCHMARKS / "bench_step.py"
    command = [sys.executable, script, "--device", "cuda", "--check", "--json", numbers]
    command += ["--rounds", str(ROUNDS)]
    code, output = run_command(command, limit)
    outcome: Outcome = {"passed": code == 0, "detail": ending(code, output, limit)}
    if numbers.exists():
        bench = outcome["bench"] = json.loads(numbers.read_text(encoding="utf-8"))
        passed = sum(check["passed"] for check in bench["checks"])
        checked = f"{passed} of {len(bench['checks'])} checks passed"
        outcome["detail"] = checked if code == 0 else f"{checked}; {outcome['detail']}"
    if code != 0:
        outcome["output"] = tail(output)
    return outcome


def run_suggestion(limit: float, *, folder: Path) -> Outcome:
    """Runs bench_suggest.py: what AutoLRS computes between two trials."""
    numbers = folder / "bench_suggest.json"
    script = BENCHMARKS / "bench_suggest.py"
    command = [sys.executable, script, "--device", "cuda", "--check", "--json", numbers]
    code, output = run_command(command, limit)
    outcome: Outcome = {"passed": code == 0, "detail": ending(code, output, limit)}
    if numbers.exists():
        outcome["suggestion"] = json.loads(numbers.read_text(encoding="utf-8"))
        medians = {row["name"]: row["seconds"]["median"] for row in outcome["suggestion"]["rows"]}
        outcome["detail"] = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in medians.items())
    if code != 0:
        outcome["output"] = tail(output)
    return outcome


def run_kernels(limit: float, *, folder: Path) -> Outcome:
    """Builds and runs bench_kernels.py; its table is kept whole, or as far as it went."""
    numbers = folder / "bench_kernels.json"
    command = [sys.executable, BENCHMARKS / "bench_kernels.py", "--json", numbers]
    code, output = run_command(command, limit)
    outcome: Outcome = {"passed": code == 0, "detail": ending(code, output, limit)}
    if numbers.exists():
        outcome["kernels"] = json.loads(numbers.read_text(encoding="utf-8"))
        cases = f"{len(outcome['kernels'])} cases"
        outcome["detail"] = cases if code == 0 else f"{cases}; {outcome['detail']}"
    outcome["output"] = without_paths(output)
    return outcome


def run_job(limit: float, *, folder: Path, lr: str | None = None) -> Outcome:
    """Runs the main job briefly."""
    command = [sys.executable, BENCHMARKS / "train_gpt.py", "--device", "cuda"]
    command += ["--steps", str(JOB_STEPS), "--out", folder]
    command += [] if lr is None else ["--lr", lr]
    code, output = run_command(command, limit)
    loss = re.search(r"validation loss: .*", output)
    outcome: Outcome = {"passed": code == 0 and loss is not None}
    outcome["detail"] = ending(code, output, limit)
    if outcome["passed"]:
        outcome["detail"] = f"{JOB_STEPS} steps, {loss.group()}"
    else:
        outcome["output"] = tail(output)
    return outcome


def stages(folder: Path) -> dict[str, Stage]:
    """The stages by name."""
    together: dict[str, Callable[[float], Outcome]] = {
        "GPU tests": functools.partial(run_tests, folder=folder)
    }
    together |= {name: functools.partial(run_feature, name=name) for name in gpu_features.CHECKS}
    together |= {tool: functools.partial(run_sanitizer, tool=tool) for tool in SANITIZERS}
    together["main job"] = functools.partial(run_job, folder=folder)
    run_auto = functools.partial(run_job, folder=folder / "auto", lr="auto")
    together["main job with AutoLRS"] = run_auto
    found = {name: Stage(run, LONGEST_TOGETHER) for name, run in together.items()}
    found["kernels alone"] = Stage(functools.partial(run_kernels, folder=folder), 90, is_timed=True)
    run_bench = functools.partial(run_benchmark, folder=folder)
    found["step benchmark"] = Stage(run_bench, 240, is_timed=True)
    run_suggest = functools.partial(run_suggestion, folder=folder)
    found["AutoLRS suggestion"] = Stage(run_suggest, 60, is_timed=True)
    return found


def run_stages(
    planned: Mapping[str, Stage],
    document: dict[str, Any],
    save: Callable[[], object],
    deadline: float,
) -> None:
    """Runs all stages into `document`, in its order; a failure stops none of the others.

    Args:
        save: is called after each stage.
        deadline: by `time.monotonic`, in seconds.
    """
    outcomes: dict[str, Outcome] = {}
    lock = threading.Lock()

    def run(name: str) -> None:
        outcome = outcome_of(planned[name], deadline)
        with lock:
            outcomes[name] = outcome
            document["stages"] = {name: outcomes[name] for name in planned if name in outcomes}
            save()
            verdict = results_page.verdict(outcome["passed"])
            print(f"{name}, {outcome['seconds']} s: {verdict}: {outcome['detail']}", flush=True)

    together = [name for name, stage in planned.items() if not stage.is_timed]
    with ThreadPoolExecutor(len(planned)) as pool:
        try:
            list(pool.map(run, together))
        except KeyboardInterrupt:
            for group in tuple(RUNNING):  # which the threads wait for
                end_group(group)
            raise
    for name, stage in planned.items():
        if stage.is_timed:
            run(name)


def outcome_of(stage: Stage, deadline: float) -> Outcome:
    """Runs a stage as long as there is time, that of an end by force included."""
    started = time.monotonic()
    limit = min(stage.longest, deadline - GRACE - started)
    if limit < SHORTEST_STAGE:
        outcome: Outcome = {"passed": False, "detail": "no time was left: give more --minutes"}
    else:
        try:
            outcome = stage.run(limit)
        except Exception as error:
            text = without_paths(f"{type(error).__name__}: {error}")
            outcome = {"passed": False, "detail": text.splitlines()[0]}
    outcome["seconds"] = round(time.monotonic() - started, 1)
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together (9)")
    parser.add_argument("--out", type=Path, default=results_page.FOLDER, help="results folder")
    args = parser.parse_args(argv)
    if not 0.0 < args.minutes < math.inf:
        parser.error(f"--minutes must be positive and finite, got {args.minutes:g}")
    deadline = time.monotonic() + 60 * args.minutes
    reason = unusable_reason()
    if reason is not None:
        print(f"gpu_report.py: error: {reason}", file=sys.stderr)
        return 2
    machine = machines.machine(torch.device("cuda", 0))
    document: dict[str, Any] = {"machine": machine, "stages": {}}
    name = results_page.slug(machine["device"])
    save = functools.partial(results_page.write_json, document, args.out, name)
    is_stopped = False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run_stages(stages(Path(folder)), document, save, deadline)
    except KeyboardInterrupt:
        is_stopped = True
    finally:
        signal.signal(signal.SIGTERM, before)
    print("written: " + ", ".join(map(str, results_page.write(document, args.out, name))))
    if is_stopped:
        print("gpu_report.py: stopped: other stages have not run", file=sys.stderr)
        return 130
    return 0 if all(stage["passed"] for stage in document["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
