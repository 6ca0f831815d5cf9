"""Claim: one optimizer step, schedule included, takes less time than with torch's fused AdamW.

    python benchmarks/bench_step.py                       # every case of this device, a table
    python benchmarks/bench_step.py --quick --check       # smaller cases, exit code 1 after a FAIL
    python benchmarks/bench_step.py --json step.json      # also the numbers
    python benchmarks/bench_step.py --report              # also a page in benchmarks/results/

The contenders take turns within one process. A step of torch is `optimizer.step()` and then
`scheduler.step()` of a LambdaLR with the same schedule; ours is `optimizer.step()`. Afterwards all
of them have made equally many steps and must have arrived at the same parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results_page
import timing
import torch
from torch import Tensor

import lrs_ext
from lrs_ext import ops

LR = 1e-3
TOTAL_STEPS = 100_000
WARMUP = 3
BASELINE = "torch fused"
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# Distance between final parameters over the distance travelled. A step that is left out shows as
# 1 / steps, about 1e-3 or more here. For bfloat16 parameters torch rounds its states, we do not.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
HOST_BOUND_ELEMENTS = 2**15  # on a CPU, a step over fewer than these is all overhead


@dataclass(frozen=True)
class Case:
    """Parameters to update; the limits hold for CPUs."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    rounds: int
    dtype: torch.dtype = torch.float32
    min_ratio: float | None = None
    max_host_seconds: float | None = None
    calls_per_turn: int = 1

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def gpt2_shapes() -> tuple[tuple[int, ...], ...]:
    """The 148 parameters of GPT-2 with 124M parameters."""
    width, layers = 768, 12
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ((50257, width), (1024, width), *(norm + attention + norm + mlp) * layers, *norm)


CASES = (
    Case("1 x 64M", ((2**26,),), rounds=15, min_ratio=1.0),
    Case("300 x 10,000", ((10_000,),) * 300, calls_per_turn=5, rounds=100, min_ratio=3.0),
    Case(
        "300 x 16",
        ((16,),) * 300,
        rounds=30,
        min_ratio=10.0,
        max_host_seconds=50e-6,
        calls_per_turn=20,
    ),
)
GPU_CASES = (
    Case("1 x 256M", ((2**28,),), rounds=15),
    Case("GPT-2 124M", gpt2_shapes(), rounds=50),
    Case("1 x 64M bf16", ((2**26,),), rounds=30, dtype=torch.bfloat16),
    Case("GPT-2 124M bf16", gpt2_shapes(), rounds=50, dtype=torch.bfloat16),
)
QUICK_CASES = (
    Case("1 x 1M", ((2**20,),), rounds=5),
    Case("30 x 1,000", ((1_000,),) * 30, rounds=5),
    Case("30 x 16", ((16,),) * 30, rounds=5),
)


@dataclass(frozen=True)
class Contender:
    """A way to update: `start` takes parameters and returns what makes one step."""

    name: str
    start: Callable[[list[Tensor]], timing.Call]
    is_ours: bool

    def bytes_per_parameter(self, dtype: torch.dtype) -> int:
        """The least traffic: reads of all, writes of all but the gradient."""
        state = 4 if self.is_ours else dtype.itemsize
        return 3 * dtype.itemsize + 4 * state


def contenders(device: torch.device) -> list[Contender]:
    """Every backend that is available, and torch's own; the baseline comes first."""
    theirs = {BASELINE: start_torch(fused=True)}
    if device.type == "cuda":
        theirs["torch fused, tensor lr"] = start_torch(tensor_lr=True, fused=True)
        theirs["torch foreach"] = start_torch(foreach=True)
    missing = unavailable(device)
    backends = [name for name in BACKENDS[device.type] if name not in missing]
    return [
        *(Contender(name, start, is_ours=False) for name, start in theirs.items()),
        *(Contender(f"lrs_ext {name}", start_ours(name), is_ours=True) for name in backends),
    ]


def unavailable(device: torch.device) -> dict[str, str]:
    """Returns the backends that cannot take part, with the reason."""
    reasons = {name: ops.unavailable_reason(name, device.type) for name in BACKENDS[device.type]}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def start_ours(backend: str) -> Callable[[list[Tensor]], timing.Call]:
    def start(params: list[Tensor]) -> timing.Call:
        schedule = lrs_ext.rex(LR, total_steps=TOTAL_STEPS)
        return lrs_ext.AdamW(params, lr=schedule, backend=backend).step

    return start


def start_torch(*, tensor_lr: bool = False, **options: bool) -> Callable[..., timing.Call]:
    def start(params: list[Tensor]) -> timing.Call:
        lr = torch.tensor(LR, device=params[0].device) if tensor_lr else LR
        optimizer = torch.optim.AdamW(params, lr=lr, **options)
        # REX as a user of torch writes it, without the cost of a call into lrs_ext.
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (TOTAL_STEPS - step) / (TOTAL_STEPS - 0.5 * step)
        )

        def step() -> None:
            optimizer.step()
            scheduler.step()

        return step

    return start


def missing_memory(case: Case, device: torch.device, count: int) -> str | None:
    """Returns why `count` contenders do not fit on a GPU, or None if they do."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    # Each holds parameters, gradients and states; foreach and the comparison need temporaries.
    needed = case.elements * ((count + 1) * (2 * case.dtype.itemsize + 8) + 16)
    free = torch.cuda.mem_get_info(device)[0]
    if needed < 0.95 * free:
        return None
    return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def blank_result(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tensors": len(case.shapes),
        "parameters": case.elements,
        "rounds": case.rounds,
        "skipped": None,
        "errors": {},
        "rows": [],
    }


@dataclass(frozen=True)
class Entrant:
    contender: Contender
    params: list[Tensor]
    step: timing.Call


def line_up(
    initial: list[Tensor], gradients: list[Tensor], device: torch.device, errors: dict[str, str]
) -> dict[str, Entrant]:
    """Gives every contender its own parameters and its first steps; notes who cannot take part."""
    entrants = {}
    for contender in contenders(device):
        params = [tensor.clone().requires_grad_() for tensor in initial]
        give_gradients(params, gradients)
        try:
            step = contender.start(params)
            for _ in range(WARMUP):
                step()
            timing.synchronize(device)
        except Exception as error:  # the others' numbers are worth having all the same
            errors[contender.name] = one_line(error)
        else:
            entrants[contender.name] = Entrant(contender, params, step)
    return entrants


def run_case(case: Case, device: torch.device, result: dict[str, Any]) -> None:
    """Measures one case; `result` gets plain numbers for JSON, times in seconds."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"dtype": case.dtype, "device": device, "generator": generator}
    initial = [torch.randn(shape, **options).mul_(0.02) for shape in case.shapes]
    gradients = [torch.randn(shape, **options) for shape in case.shapes]
    entrants = line_up(initial, gradients, device, result["errors"])
    calls = {name: entrant.step for name, entrant in entrants.items()}
    on_gpu = device.type == "cuda"
    per_turn = case.calls_per_turn
    host = timing.host_seconds(calls, case.rounds, device, calls_per_turn=per_turn)
    steps = timing.device_seconds(calls, case.rounds, device, host) if on_gpu else host
    shows_host = on_gpu or case.elements <= HOST_BOUND_ELEMENTS
    fresh = None
    if shows_host and len(case.shapes) > 1:
        fresh = timing.host_seconds(
            calls,
            case.rounds,
            device,
            prepare=lambda name: give_gradients(entrants[name].params, gradients),
            calls_per_turn=per_turn,
        )
    rows = {
        name: {
            "name": name,
            "is_ours": entrant.contender.is_ours,
            "bytes_per_parameter": entrant.contender.bytes_per_parameter(case.dtype),
            "step": dataclasses.asdict(steps[name]),
            "host": dataclasses.asdict(host[name]) if shows_host else None,
            "host_new_gradients": dataclasses.asdict(fresh[name]) if fresh else None,
            "ratio": None,
            "difference": None,
            "launches": None,
        }
        for name, entrant in entrants.items()
    }
    if BASELINE in entrants:
        for name, row in rows.items():  # after equally many steps of each
            row["ratio"] = steps[BASELINE].median / steps[name].median
            row["difference"] = difference(
                entrants[name].params, entrants[BASELINE].params, initial
            )
    if on_gpu:
        for name, row in rows.items():
            row["launches"] = timing.launches(entrants[name].step)
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
    tolerance = TOLERANCE[case.dtype]
    for row in result["rows"]:
        if not row["is_ours"]:
            continue
        apart = row["difference"]
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
    cases = QUICK_CASES if args.quick else CASES
    if device.type == "cuda" and not args.quick:
        cases += GPU_CASES
    for case in cases:
        if args.rounds is not None:
            case = dataclasses.replace(case, rounds=args.rounds)
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        result = blank_result(case)
        gc.collect()  # an optimizer and its scheduler hold each other
        try:
            result["skipped"] = missing_memory(case, device, len(contenders(device)))
            if result["skipped"] is None:
                run_case(case, device, result)
        except Exception as error:  # the other cases' numbers are worth having all the same
            result["errors"]["measurement"] = one_line(error)
        bench["cases"].append(result)
        bench["checks"] += checks(case, result, device)
        if args.json is not None:  # after each case: whoever stops this keeps what there is
            args.json.write_text(json.dumps(bench, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    device = args.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = time.monotonic()
    bench: dict[str, Any] = {
        "machine": timing.machine(device),
        "copy_bytes_per_second": timing.copy_bandwidth(device, 2**24 if args.quick else None),
        "baseline": BASELINE,
        "unavailable": unavailable(device),
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
        name = f"cpu-{results_page.slug(bench['machine']['device'])}"
        print("\nwritten: " + ", ".join(map(str, results_page.write(document, args.report, name))))
    return 1 if args.check and not all_passed else 0


if __name__ == "__main__":
    sys.exit(main())
