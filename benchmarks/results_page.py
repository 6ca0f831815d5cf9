"""Results as files: one JSON and one readable page a device, from what the benchmarks measured.

A document is plain data: ``machine`` (facts by name, the first is the device) and ``stages`` by
name. A stage has ``passed``, ``seconds``, ``detail`` (one line) and what it measured: ``counts``
and ``failures`` of tests, ``output`` (the end of what a failed command printed), or ``bench``, the
data of bench_step.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import step_plot

FOLDER = Path(__file__).resolve().parent / "results"
PLOT_PLACE = "## Optimizer step"
LEAST_SHARE = 0.9  # of the speed that a storage type's bytes allow


def write(document: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes `name`.json, `name`.md and, if there is one to draw, `name`.png; returns their paths.

    The plot needs matplotlib; without it there is none.
    """
    paths = [write_json(document, folder, name), folder / f"{name}.md"]
    benches = [stage["bench"] for stage in document["stages"].values() if stage.get("bench")]
    figures = [step_plot.plot(bench) for bench in benches if step_plot.can_plot(bench)]
    page = render(document)
    if figures:
        paths.append(folder / f"{name}.png")
        figures[0].savefig(paths[-1], dpi=130)
        page = page.replace(PLOT_PLACE, f"{PLOT_PLACE}\n\n![Share of the copy rate]({name}.png)")
    paths[1].write_text(page, encoding="utf-8")
    return paths


def write_json(document: dict[str, Any], folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_whole(path, json.dumps(document, indent=1) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Writes beside `path`, then renames: who is killed meanwhile leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def slug(device: str) -> str:
    """Returns a device's name as a file's: "NVIDIA H100 80GB HBM3" is "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def cpu_page(machine: dict[str, str]) -> str:
    """Returns the name of a CPU's page: models that are called alike differ by instruction set."""
    return f"cpu-{slug(machine['device'])}-{slug(machine['CPU instruction set'])}"


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
            parts += [PLOT_PLACE, bench_tables(stage["bench"])]
            parts += ["## Where lrs_ext is not ahead", not_ahead(stage["bench"])]
    for name, stage in stages.items():
        if stage.get("output"):
            parts += [f"## Output of {name}", f"```text\n{stage['output']}\n```"]
    return "\n\n".join(parts) + "\n"


def bench_tables(bench: dict[str, Any]) -> str:
    """Returns what bench_step.py measured, in Markdown."""
    copy = bench["copy_bytes_per_second"]
    header = ["case", "optimizer", "step", "quartiles", "ratio", "B/param", "GB/s", "of copy"]
    header += ["host us", "host us, new gradients", "launches"]
    rows = []
    notes = [f"lrs_ext {name}: not run, {why}" for name, why in bench["unavailable"].items()]
    notes += [f"{name}: not run, {why}" for name, why in bench["missing_peers"].items()]
    for case in bench["cases"]:
        if case["skipped"] is not None:
            notes.append(f"{case['name']}: not run, {case['skipped']}")
        notes += [f"{case['name']}, {name}: {error}" for name, error in case["errors"].items()]
        if case["compares_storage"]:
            continue
        for row in case["rows"]:
            step = row["step"]
            rows.append(
                [
                    case["name"],
                    row["name"],
                    in_units(step["median"]) + (", host" if step.get("has_waited") else ""),
                    f"{in_units(step['lower'])} to {in_units(step['upper'])}",
                    "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
                    f"{row['bytes_per_parameter']:g}",
                    f"{bytes_per_second(case, row) / 1e9:.1f}",
                    f"{bytes_per_second(case, row) / copy:.0%}",
                    microseconds(row["host"]),
                    microseconds(row["host_new_gradients"]),
                    "-" if row["launches"] is None else str(row["launches"]),
                ]
            )
    checks = [
        (check["case"], check["what"], check["measured"], check["target"], verdict(check["passed"]))
        for check in bench["checks"]
    ]
    waits = any(row["step"].get("has_waited") for case in bench["cases"] for row in case["rows"])
    parts = [
        f"A copy moves {copy / 1e9:.1f} GB/s, read and written. The ratio says how many times "
        "faster than its case's first optimizer a step is.",
        *(["Where it says host, the GPU waited for the host within the step."] if waits else []),
        table(header, rows),
        *([bullets(notes)] if notes else []),
        *(storage_table(case) for case in bench["cases"] if case["compares_storage"]),
        table(("case", "check", "measured", "target", "result"), checks),
    ]
    return "\n\n".join(parts)


def storage_table(case: dict[str, Any]) -> str:
    """Returns the storage types of one case: bytes, speed and what float32's GB/s would allow."""
    header = ["optimizer", "B/param held", "moved", "step", "quartiles", "ratio", "GB/s"]
    rows = []
    for row in case["rows"]:
        step, share = row["step"], share_of_float32(case, row)
        cells = [row["name"], f"{row['bytes_held']:.4g}", f"{row['bytes_per_parameter']:.4g}"]
        cells += [in_units(step["median"])]
        cells += [f"{in_units(step['lower'])} to {in_units(step['upper'])}"]
        cells += ["-" if row["ratio"] is None else f"{row['ratio']:.2f}"]
        cells += [f"{bytes_per_second(case, row) / 1e9:.1f}"]
        rows.append([*cells, "-" if share is None else f"{share:.0%}"])
    introduction = (
        f"{case['name']}, {case['algorithm']}: the last column is the share of the speed that the "
        "bytes of a storage type allow at float32's GB/s, of the same backend."
    )
    return f"{introduction}\n\n{table([*header, 'of allowed'], rows)}"


def bytes_per_second(case: dict[str, Any], row: dict[str, Any]) -> float:
    return row["bytes_per_parameter"] * case["parameters"] / row["step"]["median"]


def share_of_float32(case: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Returns a row's rate over that of float32 storage with the same backend, None if unknown."""
    if row["kind"] is None:
        return None
    backend = row["name"].partition(",")[0]
    for other in case["rows"]:
        if other["kind"] == "float32" and other["name"].partition(",")[0] == backend:
            return bytes_per_second(case, row) / bytes_per_second(case, other)
    return None


def not_ahead(bench: dict[str, Any]) -> str:
    """Lists where a row of ours is slower than the best of the others', does more launches, or has
    a storage type whose bytes would allow more speed.
    """
    measures = (
        ("step", lambda row: row["step"]["median"], in_units),
        ("host time", lambda row: row["host"] and row["host"]["median"], in_units),
        ("launches", lambda row: row["launches"], str),
    )
    found, compared = [], 0
    for case in bench["cases"]:
        ours = [row for row in case["rows"] if row["is_ours"]]
        for what, value, show in measures:
            for row in ours:
                others = [
                    (value(other), other["name"])
                    for other in case["rows"]
                    if not other["is_ours"]
                    and other["param_dtype"] == row["param_dtype"]
                    and value(other) is not None
                ]
                if not others or value(row) is None:
                    continue
                compared += 1
                best, name = min(others)
                if value(row) > best:
                    found.append(
                        f"{case['name']}, {row['name']}: {what} {show(value(row))}, "
                        f"{name} {show(best)}"
                    )
        for row in ours if case["compares_storage"] else ():
            share = share_of_float32(case, row)
            if share is not None and share < LEAST_SHARE:
                found.append(f"{case['name']}, {row['name']}: {share:.0%} of the speed allowed")
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
