"""The rate of an optimizer step over that of a copy, by size and dtype."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"lrs_ext": "#0b6bcb", "torch": "#495057"}
OTHER_COLOR = "#d9480f"
MARKERS = {"float32": "o", "bfloat16": "s"}


def can_plot(bench: dict[str, Any]) -> bool:
    has_points = any(case["in_plot"] and case["rows"] for case in bench["cases"])
    return has_points and importlib.util.find_spec("matplotlib") is not None


def lines(bench: dict[str, Any]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Returns points (parameters, share of the copy's rate) by optimizer and dtype."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for case in bench["cases"]:
        for row in case["rows"] if case["in_plot"] else ():
            rate = row["bytes_per_parameter"] * case["parameters"] / row["step"]["median"]
            point = (case["parameters"], rate / bench["copy_bytes_per_second"])
            found.setdefault((row["name"], row["param_dtype"]), []).append(point)
    return {key: sorted(points) for key, points in found.items()}


def plot(bench: dict[str, Any]) -> Figure:
    """Returns a figure: the share of a copy's rate by parameters in one tensor, a line a dtype."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for (name, dtype), points in lines(bench).items():
            sizes, shares = zip(*points, strict=True)
            axes.plot(
                sizes,
                [100 * share for share in shares],
                color=COLORS.get(name.split()[0], OTHER_COLOR),
                marker=MARKERS[dtype],
                linestyle="-" if dtype == "float32" else "--",
                label=f"{name}, {dtype} parameters",
            )
        axes.axhline(100, color="#868e96", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("parameters in one tensor")
        axes.set_ylabel("% of a large copy's bytes per second")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return figure
