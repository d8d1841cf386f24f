"""Draws a table of ratios: bars by case, or lines over what a benchmark varies."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw(title: str, rows: list[Row], keys: list[str], over: str | None, path: Path) -> bool:
    """Write a PNG; False where there is nothing to draw. `over`: the key of the horizontal axis, or None for bars."""
    ratios = list(dict.fromkeys(name for row in rows for name in row if " / " in name))
    if over is None and not ratios:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.28 * len(rows)) if over is None else (7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if over is None:
        _bars(axes, rows, keys, ratios)
    else:
        _lines(axes, rows, keys, over)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    # beside the bars, which fill the picture
    figure.legend(fontsize="small", loc="outside right upper") if over is None else axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return True


def _bars(axes: Any, rows: list[Row], keys: list[str], ratios: list[str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    height = 0.8 / len(ratios)
    for number, ratio in enumerate(ratios):
        given = [(i, row[ratio]) for i, row in enumerate(rows) if ratio in row]
        places = [i + number * height for i, _ in given]
        axes.barh(places, [value - 1 for _, value in given], left=1, height=height, label=ratio)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [_label(row, keys) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("ratio of times")
    values = [row[ratio] for row in rows for ratio in ratios if ratio in row]
    # small differences need an axis of plain numbers, large ones one where twice and half are as long
    if max(values) > 2 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.ticklabel_format(axis="x", useOffset=False)


def _lines(axes: Any, rows: list[Row], keys: list[str], over: str) -> None:
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        case = _label(row, [key for key in keys if key != over])
        for name, value in row.items():
            if name.endswith(", ms"):
                curves[f"{name.removesuffix(', ms')} {case}"].append((row[over], value))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel=over, ylabel="ms", xscale="log", yscale="log")


def _label(row: Row, keys: list[str]) -> str:
    return ", ".join(str(row[key]) for key in keys)
