"""Results of a comparison as files: JSON, a Markdown report, a picture of the loss curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# the fields that every row of a run shares, in the order of the report
_FACTS = ("model", "data", "settings", "seed", "command", "commit", "versions", "machine", "time")


def write_report(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write results.json, report.md and loss.png and return their paths.

    rows: one a method, with `method`, `trainable_parameters`, `learning_rate`, `seconds_per_step`, `peak_memory_mib`,
        `perplexity_before`, `perplexity_after`, `steps` (each with its `loss`), and the facts of the run
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / name for name in ("results.json", "report.md", "loss.png")]
    paths[0].write_text(json.dumps({"rows": list(rows)}, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(report_text(rows), encoding="utf-8")
    draw_losses(rows, paths[2])
    return paths


def comparison_table(rows: Sequence[Row]) -> str:
    """Return the table of methods in Markdown, aligned, so that it reads on a terminal too."""
    header = ["method", "trainable parameters", "lr", "s/step", "peak MiB", "ppl before", "ppl after"]
    cells = [header, *([_method_cells(row) for row in rows])]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [_table_line(line, widths) for line in cells]
    rule = "|".join("-" * (width + 1) + ":" if column else "-" * (width + 2) for column, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def report_text(rows: Sequence[Row]) -> str:
    """Return the report in Markdown: what was compared, the table, the curves, and how to read them."""
    facts = rows[0]
    lines = ["# Comparison of methods", "", comparison_table(rows), "", "![training loss](loss.png)", ""]
    lines += [
        "Perplexity (ppl) is weighted by tokens, over held-out documents. Every method starts from the same weights, "
        "adapts the same layers and sees the same batches in the same order. s/step: the median. Peak MiB: the largest "
        "resident size of the method's own process while it trains (without training: while it evaluates), or the peak "
        "of the GPU's allocator. One run is one sample: differences between methods need several seeds.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {_fact(facts[name])} |" for name in _FACTS if name in facts]
    return "\n".join(lines) + "\n"


def draw_losses(rows: Sequence[Row], path: Path) -> None:
    """Draw the training loss of every trained method by step: a faint line, and a bold one of its running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(row for row in rows if row["steps"]):
        steps = [step["step"] for step in row["steps"]]
        losses = [step["loss"] for step in row["steps"]]
        axes.plot(steps, losses, color=f"C{number}", alpha=0.25)
        # methods often lie on each other: through a dashed line the one below shows
        style = ("-", "--", "-.", ":")[number % 4]
        axes.plot(steps, running_mean(losses), style, color=f"C{number}", linewidth=2, label=row["method"])
    axes.set(
        xlabel="step", ylabel="training loss (nats a token)", title=f"{rows[0]['model']}, {rows[0]['data']['name']}"
    )
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=120)


def running_mean(values: Sequence[float], memory: float = 0.85) -> list[float]:
    """Return each value's mean with those before it, every earlier one weighing `memory` times its successor."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        means.append(total / weight)
    return means


def _method_cells(row: Row) -> list[str]:
    return [
        row["method"],
        f"{row['trainable_parameters']:,}",
        _number(row["learning_rate"], "g"),
        _number(row["seconds_per_step"], ".2f"),
        _number(row["peak_memory_mib"], ",.0f"),
        _number(row["perplexity_before"], ".3f"),
        _number(row["perplexity_after"], ".3f"),
    ]


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _table_line(line: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        text.rjust(width) if column else text.ljust(width)
        for column, (text, width) in enumerate(zip(line, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return str(value)
