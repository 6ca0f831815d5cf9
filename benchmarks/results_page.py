"""Results as files: one JSON and one readable page a device, from what the benchmarks measured.

A document is plain data: ``machine`` (facts by name, the first is the device) and ``stages`` by
name. A stage has ``passed``, ``seconds``, ``detail`` (one line) and what it measured: ``counts``
and ``failures`` of tests, ``output`` (the end of what a failed command printed), or ``bench``, the
data of bench_step.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


def write(document: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes `name`.json and `name`.md; returns their paths."""
    numbers, page = write_json(document, folder, name), folder / f"{name}.md"
    page.write_text(render(document), encoding="utf-8")
    return [numbers, page]


def write_json(document: dict[str, Any], folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def slug(device: str) -> str:
    """Returns a device's name as a file's: "NVIDIA H100 80GB HBM3" is "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def render(document: dict[str, Any]) -> str:
    """Returns the page in Markdown."""
    machine, stages = document["machine"], document["stages"]
    parts = [
        f"# {machine['device']}",
        table(("what", "value"), list(machine.items())),
        "## Stages",
        table(
            ("stage", "result", "seconds", "detail"),
            [
                (name, verdict(stage["passed"]), f"{stage['seconds']:.0f}", stage["detail"])
                for name, stage in stages.items()
            ],
        ),
    ]
    counted = {name: stage["counts"] for name, stage in stages.items() if stage.get("counts")}
    if counted:
        kinds = list(next(iter(counted.values())))
        rows = [(name, *map(str, counts.values())) for name, counts in counted.items()]
        parts += ["## Tests", table(("tests", *kinds), rows)]
    for name, stage in stages.items():
        if stage.get("failures"):
            parts += [f"### {name}: not passed", bullets(stage["failures"])]
    for stage in stages.values():
        if stage.get("bench"):
            parts += ["## Optimizer step", bench_tables(stage["bench"])]
            parts += ["## Where lrs_ext is not ahead", not_ahead(stage["bench"])]
    for name, stage in stages.items():
        if stage.get("output"):
            parts += [f"## Output of {name}", f"```text\n{stage['output']}\n```"]
    return "\n\n".join(parts) + "\n"


def bench_tables(bench: dict[str, Any]) -> str:
    """Returns what bench_step.py measured, in Markdown."""
    copy = bench["copy_bytes_per_second"]
    header = ["case", "optimizer", "step", "quartiles", "ratio", "GB/s", "of copy"]
    header += ["host us", "host us, new gradients", "launches"]
    rows = []
    notes = [f"lrs_ext {name}: not run, {why}" for name, why in bench["unavailable"].items()]
    for case in bench["cases"]:
        if case["skipped"] is not None:
            notes.append(f"{case['name']}: not run, {case['skipped']}")
        notes += [f"{case['name']}, {name}: {error}" for name, error in case["errors"].items()]
        for row in case["rows"]:
            step = row["step"]
            rate = row["bytes_per_parameter"] * case["parameters"] / step["median"]
            rows.append(
                [
                    case["name"],
                    row["name"],
                    in_units(step["median"]),
                    f"{in_units(step['lower'])} to {in_units(step['upper'])}",
                    "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
                    f"{rate / 1e9:.1f}",
                    f"{rate / copy:.0%}",
                    microseconds(row["host"]),
                    microseconds(row["host_new_gradients"]),
                    "-" if row["launches"] is None else str(row["launches"]),
                ]
            )
    checks = [
        (check["case"], check["what"], check["measured"], check["target"], verdict(check["passed"]))
        for check in bench["checks"]
    ]
    parts = [
        f"A copy moves {copy / 1e9:.1f} GB/s, read and written. The ratio says how many times "
        f"faster than {bench['baseline']} a step is.",
        table(header, rows),
        *([bullets(notes)] if notes else []),
        table(("case", "check", "measured", "target", "result"), checks),
    ]
    return "\n\n".join(parts)


def not_ahead(bench: dict[str, Any]) -> str:
    """Lists where one of our rows is slower than the best of the others', or does more launches."""
    measures = (
        ("step", lambda row: row["step"]["median"], in_units),
        ("host time", lambda row: row["host"] and row["host"]["median"], in_units),
        ("launches", lambda row: row["launches"], str),
    )
    found, compared = [], 0
    for case in bench["cases"]:
        ours = [row for row in case["rows"] if row["is_ours"]]
        theirs = [row for row in case["rows"] if not row["is_ours"]]
        for what, value, show in measures:
            others = [(value(row), row["name"]) for row in theirs if value(row) is not None]
            for row in ours:
                if not others or value(row) is None:
                    continue
                compared += 1
                best, name = min(others)
                if value(row) > best:
                    found.append(
                        f"{case['name']}, {row['name']}: {what} {show(value(row))}, "
                        f"{name} {show(best)}"
                    )
    if not compared:
        return "Nothing was compared."
    return bullets(found) if found else f"Ahead or level in all {compared} comparisons."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table that is also readable as it is; numbers stand at the right."""
    clean = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [list(header), *clean]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    right = [i > 0 and _is_numeric([line[i] for line in clean]) for i in range(len(header))]

    def join(cells: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        ]
        return f"| {' | '.join(parts)} |"

    rule = [
        "-" * (width - 1) + (":" if is_right else "-")
        for width, is_right in zip(widths, right, strict=True)
    ]
    return "\n".join([join(lines[0]), join(rule), *map(join, lines[1:])])


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell != "-"]
    return bool(filled) and all(cell[:1].isdigit() for cell in filled)


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def verdict(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def in_units(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def microseconds(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['median'] * 1e6:.1f}"
