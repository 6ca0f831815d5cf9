"""Claim: one optimizer step, schedule included, takes less time than with torch's fused AdamW.

    python benchmarks/bench_step.py                       # every case of this device, a table
    python benchmarks/bench_step.py --quick --check       # smaller cases, exit code 1 after a FAIL
    python benchmarks/bench_step.py --json step.json      # also the numbers
    python benchmarks/bench_step.py --report              # also a page in benchmarks/results/

The contenders take turns within one process, see step_contenders.py. Afterwards all of them have
made equally many steps and must have arrived at the same parameters, up to rounding where they are
stored in fewer bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machines
import results_page
import torch
from step_cases import Case, cases
from step_contenders import BACKENDS, Contender, contenders, missing_peers, unavailable
from torch import Tensor

from lrs_ext import timing

WARMUP = 3
HOST_BOUND_ELEMENTS = 2**15  # on a CPU, a step over fewer than these is all overhead


def missing_memory(case: Case, device: torch.device) -> str | None:
    """Returns why the contenders do not fit on a GPU, or None if they do."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    # Foreach and the comparison need temporaries.
    held = sum(c.bytes_held + c.param_dtype.itemsize for c in contenders(case, device))
    needed = case.elements * (held + 24)
    free = torch.cuda.mem_get_info(device)[0]
    if needed < 0.95 * free:
        return None
    return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def blank_result(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "algorithm": case.algorithm,
        "tensors": len(case.shapes),
        "parameters": case.elements,
        "rounds": case.rounds,
        "compares_storage": bool(case.kinds),
        "in_plot": case.in_plot,
        "skipped": None,
        "errors": {},
        "rows": [],
    }


@dataclass(frozen=True)
class Entrant:
    contender: Contender
    params: list[Tensor]
    step: timing.Call


@dataclass(frozen=True)
class Beginning:
    """What all begin with, by the dtype of their parameters."""

    params: dict[torch.dtype, list[Tensor]]
    gradients: dict[torch.dtype, list[Tensor]]

    @staticmethod
    def of(case: Case, device: torch.device, dtypes: set[torch.dtype]) -> Beginning:
        generator = torch.Generator(device).manual_seed(0)
        options = {"device": device, "generator": generator}
        params = [torch.randn(shape, **options).mul_(0.02) for shape in case.shapes]
        gradients = [torch.randn(shape, **options) for shape in case.shapes]
        return Beginning(
            {dtype: [param.to(dtype) for param in params] for dtype in dtypes},
            {dtype: [gradient.to(dtype) for gradient in gradients] for dtype in dtypes},
        )


def line_up(
    case: Case, device: torch.device, errors: dict[str, str]
) -> tuple[dict[str, Entrant], Beginning]:
    """Gives every contender its own parameters and its first steps; notes who cannot take part.

    Returns:
        The entrants by name, and what they began with.
    """
    entrants = {}
    invited = contenders(case, device)
    start = Beginning.of(case, device, {contender.param_dtype for contender in invited})
    for contender in invited:
        dtype = contender.param_dtype
        params = [tensor.clone().requires_grad_() for tensor in start.params[dtype]]
        if case.kinds:  # many contenders with large arrays: gradients are only read
            for param, gradient in zip(params, start.gradients[dtype], strict=True):
                param.grad = gradient
        else:
            give_gradients(params, start.gradients[dtype])
        try:
            step = contender.start(params)
            for _ in range(WARMUP):
                step()
            timing.synchronize(device)
        except Exception as error:  # the others' numbers are worth having all the same
            errors[contender.name] = one_line(error)
        else:
            entrants[contender.name] = Entrant(contender, params, step)
    return entrants, start


def run_case(case: Case, device: torch.device, result: dict[str, Any]) -> None:
    """Measures one case; `result` gets plain numbers for JSON, times in seconds."""
    entrants, start = line_up(case, device, result["errors"])
    calls = {name: entrant.step for name, entrant in entrants.items()}
    on_gpu = device.type == "cuda"
    per_turn = case.calls_per_turn
    host = timing.host_seconds(calls, case.rounds, device, calls_per_turn=per_turn)
    steps = timing.device_seconds(calls, case.rounds, device, host) if on_gpu else host
    shows_host = on_gpu or case.elements <= HOST_BOUND_ELEMENTS
    fresh = None
    if shows_host and len(case.shapes) > 1:

        def prepare(name: str) -> None:
            entrant = entrants[name]
            give_gradients(entrant.params, start.gradients[entrant.contender.param_dtype])

        fresh = timing.host_seconds(
            calls, case.rounds, device, prepare=prepare, calls_per_turn=per_turn
        )
    rows = {
        name: {
            "name": name,
            "is_ours": entrant.contender.is_ours,
            "kind": entrant.contender.kind,
            "param_dtype": str(entrant.contender.param_dtype).removeprefix("torch."),
            "bytes_per_parameter": entrant.contender.bytes_moved,
            "bytes_held": entrant.contender.bytes_held,
            "tolerance": entrant.contender.tolerance,
            "step": dataclasses.asdict(steps[name]),
            "host": dataclasses.asdict(host[name]) if shows_host else None,
            "host_new_gradients": dataclasses.asdict(fresh[name]) if fresh else None,
            "ratio": None,
            "difference": None,
            "launches": None,
        }
        for name, entrant in entrants.items()
    }
    baseline = entrants.get(contenders(case, device)[0].name)
    if baseline is not None:
        initial = start.params[baseline.contender.param_dtype]
        for name, row in rows.items():  # after equally many steps of each
            row["ratio"] = steps[baseline.contender.name].median / steps[name].median
            row["difference"] = difference(entrants[name].params, baseline.params, initial)
    if on_gpu and case.counts_launches:
        for name, row in rows.items():
            row["launches"] = machines.launches(entrants[name].step)
    result["rows"] = list(rows.values())


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def give_gradients(params: list[Tensor], gradients: list[Tensor]) -> None:
    """Sets equal gradients in new tensors at new addresses, as a backward pass does."""
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()


def difference(params: list[Tensor], reference: list[Tensor], initial: list[Tensor]) -> float:
    """Returns the distance from the reference over the distance the reference has travelled."""
    travelled = distance(reference, initial)
    return distance(params, reference) / travelled if travelled > 0 else math.nan


@torch.no_grad()
def distance(first: list[Tensor], second: list[Tensor]) -> float:
    norms = [
        torch.linalg.vector_norm(a.float() - b.float(), dtype=torch.float64)
        for a, b in zip(first, second, strict=True)
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def checks(case: Case, result: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Compares what a case measured with what it must reach; NaN never passes."""
    found = []

    def add(what: str, measured: str, target: str, passed: bool) -> None:
        entry = {"case": case.name, "what": what, "measured": measured, "target": target}
        found.append({**entry, "passed": passed})

    for name, error in result["errors"].items():
        add(name, error, "runs", False)
    for row in result["rows"]:
        if not row["is_ours"]:
            continue
        apart, tolerance = row["difference"], row["tolerance"]
        apart = math.nan if apart is None else apart
        what = f"{row['name']}: distance from torch's result"
        add(what, f"{apart:.1e}", f"<= {tolerance:.0e}", apart <= tolerance)
        if device.type != "cpu":
            continue
        if case.min_ratio is not None:
            ratio = row["ratio"] or math.nan
            add("speed", f"{ratio:.2f}x", f">= {case.min_ratio:.1f}x", ratio >= case.min_ratio)
        if case.max_host_seconds is not None:
            target = f"<= {case.max_host_seconds * 1e6:.0f} us"
            for key, gradients in (("host", "same"), ("host_new_gradients", "new")):
                seconds = row[key]["median"]
                what = f"host time of a step, {gradients} gradients"
                add(what, f"{seconds * 1e6:.1f} us", target, seconds <= case.max_host_seconds)
    return found


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu, cuda or cuda:N ({default})")
    parser.add_argument("--quick", action="store_true", help="small cases without speed targets")
    parser.add_argument("--rounds", type=int, help="of each measurement (by case)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        nargs="?",
        const=results_page.FOLDER,
        help="write a page and its numbers there (benchmarks/results); CPUs only",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a check fails")
    args = parser.parse_args(argv)
    if args.device.partition(":")[0] not in BACKENDS:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {args.device}")
    args.device = torch.device(args.device)
    devices = torch.cuda.device_count()
    if args.device.type == "cuda" and (args.device.index or 0) >= devices:
        parser.error(f"{args.device} is not here (CUDA devices: {devices}): use --device cpu")
    if args.device.type == "cuda":
        args.device = torch.device("cuda", args.device.index or 0)
        if args.report is not None:
            parser.error("--report is for CPUs: make gpu-report writes the page of a GPU")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be positive, got {args.rounds}")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}: create it")
    return args


def run_cases(args: argparse.Namespace, bench: dict[str, Any]) -> None:
    """Fills in `cases` and `checks`."""
    device = args.device
    for case in cases(device.type, args.quick):
        if args.rounds is not None:
            case = dataclasses.replace(case, rounds=args.rounds)
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        result = blank_result(case)
        gc.collect()  # an optimizer and its scheduler hold each other
        try:
            result["skipped"] = missing_memory(case, device)
            if result["skipped"] is None:
                run_case(case, device, result)
        except Exception as error:  # the other cases' numbers are worth having all the same
            result["errors"]["measurement"] = one_line(error)
        bench["cases"].append(result)
        bench["checks"] += checks(case, result, device)
        if args.json is not None:  # after each case: whoever stops this keeps what there is
            results_page.write_whole(args.json, json.dumps(bench, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    device = args.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = time.monotonic()
    bench: dict[str, Any] = {
        "machine": machines.machine(device),
        "copy_bytes_per_second": timing.copy_bandwidth(device, 2**24 if args.quick else None),
        "unavailable": unavailable(device),
        "missing_peers": missing_peers(),
        "cases": [],
        "checks": [],
    }
    run_cases(args, bench)
    print("\n".join(f"{name}: {value}" for name, value in bench["machine"].items()))
    print(f"\n{results_page.bench_tables(bench)}")
    passed = sum(check["passed"] for check in bench["checks"])
    all_passed = 0 < passed == len(bench["checks"])
    if args.report is not None:
        stage = {
            "passed": all_passed,
            "seconds": time.monotonic() - started,
            "detail": f"{passed} of {len(bench['checks'])} checks passed",
            "bench": bench,
        }
        document = {"machine": bench["machine"], "stages": {"step benchmark": stage}}
        name = results_page.cpu_page(bench["machine"])
        print("\nwritten: " + ", ".join(map(str, results_page.write(document, args.report, name))))
    return 1 if args.check and not all_passed else 0


if __name__ == "__main__":
    sys.exit(main())
