"""What bench_storage.py measured, as a table, a page and a plot.

A row is one run: ``kind``, ``steps``, ``seed``, ``validation_loss``, ``training_loss``,
``bytes_held``, ``bytes_moved``, ``seconds``, ``processor_seconds``; or, instead of numbers,
``error``. Losses are compared seed by seed: initial model, data and their order are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machines
import numpy as np
import results_page
import torch
from storages import KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

BASELINE = "float32"
CONTROL = "float32, weights rounded once"
# Standard errors: 95 % for ten comparisons at once, of about 20 degrees of freedom.
SIGNIFICANT = 3.2
COLORS = {
    "float32": "#0b6bcb",
    "fp16 nearest": "#868e96",
    "bf16 nearest": "#d9480f",
    "bf16 stochastic": "#2b8a3e",
    "bf16 split": "#862e9c",
}
MARKERS = {"float32 states": "o", "bf16 states": "s", "8-bit states": "^"}
INTRODUCTION = """\
{runs} runs on {device}, torch {torch}, one thread each; written by
`python benchmarks/bench_storage.py` and `--report`. Each trains the GPT of the main job ({layers}
blocks of width {width}, {context} bytes a sequence, {batch_size} sequences an update) with AdamW
and REX (peak {lr:g}, {warmup_steps} updates of warm-up) for {steps:,} updates, gradients clipped at
norm 1. Parameters of 16 bits are cast to float32 for the forward and backward pass, so that
nothing but the storage differs: weights, gradients (of the parameters' dtype) and states.

- **loss**: validation loss at the end in nats per byte, mean over {seeds} seeds; **+-** is its
  standard deviation over them.
- **difference**: from float32's run of the same seed, mean over seeds, with its standard error;
  **worst** is the largest of them.
- **{control}**: float32 throughout, but the initial weights are rounded to bfloat16.
  What it differs by is what any disturbance, however small, does to a run.
- **held**: bytes of parameter and states per parameter, **moved**: bytes read and written per
  parameter in a step, both measured from the tensors; a gradient takes 4 or 2 bytes more."""


def by_kind(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Returns the runs that ended well, by kind in the usual order, then by seed."""
    found: dict[str, dict[int, Row]] = {}
    for kind in (CONTROL, *KINDS):
        runs = {row["seed"]: row for row in rows if row["kind"] == kind and "error" not in row}
        if runs:
            found[kind] = dict(sorted(runs.items()))
    return found


def differences(runs: dict[int, Row], baseline: dict[int, Row]) -> list[float]:
    """Returns the validation losses less the baseline's, for the seeds that both have."""
    common = sorted(runs.keys() & baseline.keys())
    return [runs[seed]["validation_loss"] - baseline[seed]["validation_loss"] for seed in common]


def deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def summary(rows: Sequence[Row]) -> list[Row]:
    """Returns one row of numbers a kind; what cannot be computed is None."""
    grid = by_kind(rows)
    found = []
    for kind, runs in grid.items():
        losses = [run["validation_loss"] for run in runs.values()]
        apart = differences(runs, grid.get(BASELINE, {}))
        numbers = {
            "loss": float(np.mean(losses)),
            "spread": deviation(losses),
            "difference": float(np.mean(apart)) if apart else math.nan,
            "standard_error": deviation(apart) / max(len(apart), 1) ** 0.5,
            "worst": max(apart, default=math.nan),
            "bytes_held": float(np.mean([run["bytes_held"] for run in runs.values()])),
            "bytes_moved": float(np.mean([run["bytes_moved"] for run in runs.values()])),
        }
        rounded = {k: round(v, 6) if math.isfinite(v) else None for k, v in numbers.items()}
        found.append({"kind": kind, "seeds": len(runs)} | rounded)
    return found


def main_table(rows: Sequence[Row]) -> str:
    header = ("storage", "keywords", "held", "moved", "loss", "+-", "difference", "error", "worst")

    def show(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.4f}"

    lines = []
    for row in summary(rows):
        kind = KINDS.get(row["kind"])
        cells = [row["kind"], f"`{kind.keywords}`" if kind else ""]
        cells += [f"{row['bytes_held']:.2f}", f"{row['bytes_moved']:.2f}"]
        cells += [show(row["loss"]), show(row["spread"]), show(row["difference"], "+")]
        lines.append([*cells, show(row["standard_error"]), show(row["worst"], "+")])
    return results_page.table(header, lines)


def resolution(rows: Sequence[Row]) -> float | None:
    """Returns how far a kind's mean difference must be from 0 to be told from chance, or None.

    The differences of one kind scatter over the seeds by what chance does to two runs; all kinds
    are taken together, as three numbers alone say little about their own scatter.
    """
    grid = by_kind(rows)
    baseline = grid.get(BASELINE, {})
    samples = [differences(runs, baseline) for kind, runs in grid.items() if kind != BASELINE]
    samples = [sample for sample in samples if len(sample) > 1]
    if not samples:
        return None
    pooled = math.sqrt(float(np.mean([deviation(sample) ** 2 for sample in samples])))
    return SIGNIFICANT * pooled / math.sqrt(max(map(len, samples)))


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Says of each kind whether it is as good as float32, as far as these runs can tell."""
    numbers, limit = {row["kind"]: row for row in summary(rows)}, resolution(rows)
    if limit is None:
        return ["Nothing was compared: one seed does not tell chance from storage."]
    baseline = numbers[BASELINE]
    lines = [
        f"A mean difference below {limit:.4f} cannot be told from chance; float32's own spread "
        f"over seeds is {baseline['spread'] or math.nan:.4f}."
    ]
    for kind, row in numbers.items():
        apart = row["difference"]
        if kind == BASELINE or apart is None:
            continue
        text = "not told from float32" if abs(apart) < limit else "worse" if apart > 0 else "better"
        lines.append(f"{kind}: {apart:+.4f} ({apart / baseline['loss']:+.2%}), {text}")
    return lines


def write(rows: Sequence[Row], config: dict[str, Any], folder: Path) -> list[Path]:
    """Writes storage.json, storage.md and storage.png; returns their paths."""
    machine = machines.machine(torch.device("cpu"))
    document = {"machine": machine, "config": config, "summary": summary(rows), "runs": list(rows)}
    numbers = results_page.write_json(document, folder, "storage")
    page, picture = folder / "storage.md", folder / "storage.png"
    page.write_text(render(rows, config, machine), encoding="utf-8")
    plot(rows).savefig(picture, dpi=130)
    return [numbers, page, picture]


def render(rows: Sequence[Row], config: dict[str, Any], machine: dict[str, str]) -> str:
    seeds = len({row["seed"] for row in rows})
    names = {"runs": len(rows), "seeds": seeds, "control": CONTROL} | config
    names |= {"device": machine["device"], "torch": machine["torch"]}
    minutes = sum(row.get("processor_seconds", 0) for row in rows) / 60
    errors = [
        f"{row['kind']}, seed {row['seed']}: {row['error']}" for row in rows if "error" in row
    ]
    parts = [
        "# Storage types: convergence and bytes",
        INTRODUCTION.format(**names),
        main_table(rows),
        "![Loss difference against bytes per parameter](storage.png)",
        "## Against float32",
        results_page.bullets(verdicts(rows)),
        *(["## Failed", results_page.bullets(errors)] if errors else []),
        f"All runs together took {minutes:.0f} minutes of one core.",
    ]
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[Row]) -> Figure:
    """Returns a figure: loss difference by bytes held, a dot a kind, a thin bar over the seeds.

    Kinds that hold equally many bytes stand side by side.
    """
    import matplotlib
    from matplotlib.figure import Figure

    grid = by_kind(rows)
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        baseline = grid.get(BASELINE, {})
        limit = resolution(rows)
        if limit is not None:
            axes.axhspan(-limit, limit, color="#e9ecef", label="means that chance explains")
        taken: list[int] = []
        for kind, runs in grid.items():
            apart = differences(runs, baseline)
            if kind == CONTROL or not apart:
                continue
            held = next(iter(runs.values()))["bytes_held"]
            held += 0.15 * taken.count(round(held))
            taken.append(round(held))
            params, _, states = kind.partition(", ")
            color, marker = COLORS[params], MARKERS[states or "float32 states"]
            axes.plot([held, held], [min(apart), max(apart)], color=color, linewidth=1)
            axes.plot([held], [np.mean(apart)], marker, color=color, label=kind)
        axes.axhline(0, color="#868e96", linewidth=0.8)
        axes.set_xlabel("bytes held per parameter (parameter and AdamW's states)")
        axes.set_ylabel("validation loss less float32's (nats per byte)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
