"""Results of a comparison as files: JSON, a Markdown report, the same as one HTML page, and pictures."""

from __future__ import annotations

import base64
import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .statistics import Difference, paired_difference
from .tables import markdown_table

Row = Mapping[str, Any]
Searches = Mapping[str, Mapping[float, float]]
Cells = list[list[str]]

# the facts that every row of a run shares, in the order of the report
_FACTS = ("model", "data", "settings", "command", "commit", "versions", "machine", "time")
# methods often lie on each other: through a dashed line the one below shows
_LINES = ("-", "--", "-.", ":")
_MEANING = (
    "Every method starts from the same weights, adapts the same layers and, with the same seed, sees the same batches "
    "in the same order. s/step: the median. Peak MiB: the largest resident size of the method's own process while it "
    "trains (without training: while it evaluates), or the peak of the GPU's allocator. Gain: how much lower "
    "perplexity (ppl) is than before training. Parameters per 1 %: trained parameters divided by the gain."
)
_DIFFERENCES = (
    "Difference: the change of perplexity against {reference}, below 0 where the method is better, out of the mean "
    "difference of the losses. Over windows: 95 % bootstrap interval over the held-out windows, each with its mean "
    "over the seeds; it says how far other text could change the difference. Over seeds: the same over the seeds, each "
    "with its mean over the windows; it says how far other initial values and orders could. Few seeds make it too "
    "narrow: from three it is hardly more than their range. A method is called better or worse only where neither "
    "interval holds 0."
)
_PERPLEXITY = {
    "tokens": "Perplexity is weighted by tokens, over held-out documents.",
    "author": "Perplexity is the mean of each held-out line's own, in which short lines weigh as much as long ones.",
}


def write_report(
    rows: Sequence[Row], directory: Path, searches: Searches | None = None, reference: str | None = None
) -> list[Path]:
    """Write results.json, report.md, report.html, which needs no other file, and pictures; return their paths.

    rows: one a run, with `method`, `meaning`, `seed`, `trainable_parameters`, `learning_rate`, `seconds_per_step`,
        `peak_memory_mib`, `perplexity_before`, `perplexity_after`, `losses_after` (of each held-out window) and the
        windows' `weights`, `steps` (lists; `loss` among them), and the facts of the run
    searches: validation perplexity by method and learning rate
    reference: the method that others are compared with; default: the first that is trained
    """
    directory.mkdir(parents=True, exist_ok=True)
    drawings = {"loss.png": draw_losses, "perplexity.png": draw_perplexities}
    if differences(rows, reference):
        drawings["differences.png"] = lambda rows, path: draw_differences(rows, path, reference)
    pictures = []
    for name, draw in drawings.items():
        draw(rows, directory / name)
        pictures.append(directory / name)
    paths = [directory / name for name in ("results.json", "report.md", "report.html")]
    # a run a line: long enough already
    lines = ",\n".join(json.dumps(row) for row in rows)
    paths[0].write_text(
        f'{{"searches": {json.dumps(searches_record(searches or {}))},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    paths[1].write_text(report_text(rows, searches, reference), encoding="utf-8")
    paths[2].write_text(report_page(rows, pictures, searches, reference), encoding="utf-8")
    return [*paths, *pictures]


def searches_record(searches: Searches) -> dict[str, dict[str, float | None]]:
    """Return the searches as JSON has them; None: it diverged."""
    return {
        name: {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()}
        for name, losses in searches.items()
    }


def comparison_table(rows: Sequence[Row]) -> str:
    """Return the table of methods in Markdown."""
    return markdown_table(_comparison(rows))


def difference_table(rows: Sequence[Row], reference: str | None = None) -> str:
    """Return the table of differences from the reference in Markdown; empty without two trained methods."""
    cells = _difference_cells(rows, reference)
    return markdown_table(cells) if cells else ""


def differences(rows: Sequence[Row], reference: str | None = None) -> dict[str, tuple[Difference, Difference | None]]:
    """Return each trained method's mean loss less the reference's: with its interval over windows, and over seeds.

    The reference's name is not among them. Only seeds that both have count; over one seed there is no interval.
    """
    trained = {name: runs for name, runs in _by_method(rows).items() if runs[0]["steps"]}
    reference = _reference(trained, reference)
    return {name: _difference(runs, trained[reference]) for name, runs in trained.items() if name != reference}


def report_text(rows: Sequence[Row], searches: Searches | None = None, reference: str | None = None) -> str:
    """Return the report in Markdown: what was compared, the tables, the curves, and how to read them."""
    facts = rows[0]
    lines = ["# Comparison of methods", "", _summary(rows), "", comparison_table(rows), "", _explanation(facts), ""]
    compared = difference_table(rows, reference)
    if compared:
        lines += ["## Differences", "", compared, "", _difference_text(rows, reference), ""]
        lines += ["![differences and their intervals](differences.png)", ""]
    lines += [
        "## Pictures",
        "",
        "![perplexity by method and seed](perplexity.png)",
        "",
        "![training loss](loss.png)",
        "",
    ]
    if searches:
        lines += ["## Learning rates", "", markdown_table(_search_cells(searches)), "", _SEARCH, ""]
    meanings = _meanings(rows)
    if meanings:
        lines += ["## Methods", "", *(f"- **{name}**: {meaning}" for name, meaning in meanings.items()), ""]
    lines += ["## Circumstances", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_fact(facts[name])} |" for name in _FACTS if name in facts]
    return "\n".join(lines) + "\n"


def report_page(
    rows: Sequence[Row], pictures: Sequence[Path], searches: Searches | None = None, reference: str | None = None
) -> str:
    """Return the report as one HTML page that holds its pictures and needs nothing else."""
    facts = rows[0]
    images = {
        path.stem: f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    }
    parts = [f"<h1>Comparison of methods</h1><p class=lead>{html.escape(_summary(rows))}</p>"]
    parts.append(_html_table(_comparison(rows)))
    parts.append(f"<details><summary>How to read it</summary><p>{html.escape(_explanation(facts))}</p></details>")
    cells = _difference_cells(rows, reference)
    if cells:
        parts += ["<h2>Differences</h2>", _html_table(cells), images["differences"]]
        text = html.escape(_difference_text(rows, reference))
        parts.append(f"<details><summary>How to read it</summary><p>{text}</p></details>")
    parts += ["<h2>Perplexity after training</h2>", images["perplexity"], "<h2>Training</h2>", images["loss"]]
    if searches:
        parts += ["<h2>Learning rates</h2>", _html_table(_search_cells(searches)), f"<p>{_SEARCH}</p>"]
    meanings = _meanings(rows)
    if meanings:
        items = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in meanings.items())
        parts.append(f"<h2>Methods</h2><dl>{''.join(items)}</dl>")
    listed = (f"<dt>{name}</dt><dd>{html.escape(_fact(facts[name]))}</dd>" for name in _FACTS if name in facts)
    parts.append(f"<h2>Circumstances</h2><dl>{''.join(listed)}</dl>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><title>Comparison of methods</title>'
        f"<style>{_STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def draw_losses(rows: Sequence[Row], path: Path) -> None:
    """Draw the training loss of every trained method by step: the running mean, over all seeds; one seed's own, faint.

    The spread over seeds is left out: it is the batches', which all methods share, and would hide what sets them apart.
    """
    figure, axes = _figure(4.5)
    trained = {name: runs for name, runs in _by_method(rows).items() if runs[0]["steps"]}
    for number, (name, runs) in enumerate(trained.items()):
        losses = [statistics.fmean(column) for column in zip(*(run["steps"]["loss"] for run in runs), strict=True)]
        steps, color = range(1, len(losses) + 1), f"C{number % 10}"
        if len(runs) == 1:
            axes.plot(steps, losses, color=color, alpha=0.25)
        axes.plot(steps, running_mean(losses), _LINES[number % 4], color=color, lw=2, label=name)
    title = f"{rows[0]['model']}, {rows[0]['data']['name']}"
    axes.set(xlabel="step", ylabel="training loss (nats a token)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if trained:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def draw_perplexities(rows: Sequence[Row], path: Path) -> None:
    """Draw held-out perplexity after training: a dot for each seed, a bar at the mean of each method."""
    grouped = _by_method(rows)
    # far from the others, what is not trained would leave them no room
    shown = {name: runs for name, runs in grouped.items() if runs[0]["steps"]} or grouped
    figure, axes = _figure(1.2 + 0.38 * len(shown))
    for number, runs in enumerate(shown.values()):
        values = [run["perplexity_after"] for run in runs]
        axes.plot(values, [number] * len(values), "o", color=f"C{number % 10}", alpha=0.6, ms=6, mew=0)
        axes.plot([statistics.fmean(values)], [number], "|", color=f"C{number % 10}", ms=18, mew=2.5)
        axes.annotate(
            f"{statistics.fmean(values):.2f}",
            (max(values), number),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="0.35",
        )
    _rows_of(axes, list(shown))
    axes.margins(x=0.12)
    axes.set_xlabel("held-out perplexity after training, lower is better")
    figure.savefig(path, dpi=110)


def draw_differences(rows: Sequence[Row], path: Path, reference: str | None = None) -> None:
    """Draw every difference from the reference with its interval over windows (wide) and over seeds (thin)."""
    found = differences(rows, reference)
    figure, axes = _figure(1.4 + 0.45 * len(found))
    for number, (windows, seeds) in enumerate(found.values()):
        color = {"better": "C2", "worse": "C3"}.get(_verdict(windows, seeds), "0.45")
        for shift, interval, width, label in ((-0.1, windows, 4.0, "windows"), (0.14, seeds, 1.5, "seeds")):
            if interval is not None:
                ends = [_percent(interval.low), _percent(interval.high)]
                mark = f"95 % over {label}" if number == 0 else None
                axes.plot(ends, [number + shift] * 2, "-", color=color, lw=width, solid_capstyle="round", label=mark)
        axes.plot([_percent(windows.mean)], [number], "o", color=color, ms=7, mec="white")
    axes.axvline(0, color="0.2", lw=1)
    _rows_of(axes, list(found))
    name = _reference([row["method"] for row in rows if row["steps"]], reference)
    axes.set_xlabel(f"perplexity against {name}, in %  (left of 0: better)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def running_mean(values: Sequence[float], memory: float = 0.85) -> list[float]:
    """Return each value's mean with those before it, every earlier one weighing `memory` times its successor."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        means.append(total / weight)
    return means


_SEARCH = (
    "Perplexity on validation documents, which are neither trained nor tested on, by learning rate, with the first "
    "seed; with the best rate, marked by a star, the method is then trained. Where the best one is at an end of the "
    "grid, a better one may lie outside."
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5d6778; --line: #d9dee6; --paper: #fff; --stripe: #f5f7fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b5; --line: #39424f; --paper: #171b21; --stripe: #1e242c }
  img { filter: invert(0.9) hue-rotate(180deg) } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; margin: 0 0 .3rem } h2 { margin: 2.4rem 0 .8rem; font-size: 1.25rem }
.lead, summary, dt { color: var(--soft) } img { max-width: 100%; height: auto; border-radius: 6px }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; vertical-align: bottom }
tbody tr:nth-child(even) { background: var(--stripe) }
th:first-child, td:first-child { text-align: left; font-weight: 600 }
.better { color: #1a8f4a; font-weight: 600 } .worse { color: #cf3f3f; font-weight: 600 }
details { margin: .8rem 0; font-size: .93rem } summary { cursor: pointer }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; font-size: .9rem }
dd { margin: 0; overflow-wrap: anywhere }
"""


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["method"], []).append(row)
    return grouped


def _reference(names: Any, reference: str | None) -> str:
    known = list(names)
    if reference in known or not known:
        return reference or ""
    return known[0]


def _difference(runs: Sequence[Row], others: Sequence[Row]) -> tuple[Difference, Difference | None]:
    mine, theirs = ({run["seed"]: run for run in group} for group in (runs, others))
    seeds = [seed for seed in mine if seed in theirs]
    weights = runs[0]["weights"]
    by_window = [
        [statistics.fmean(losses) for losses in zip(*(of[seed]["losses_after"] for seed in seeds), strict=True)]
        for of in (mine, theirs)
    ]
    windows = paired_difference(by_window[0], by_window[1], weights)
    if len(seeds) < 2:
        return windows, None
    by_seed = [[_weighted(of[seed]["losses_after"], weights) for seed in seeds] for of in (mine, theirs)]
    return windows, paired_difference(by_seed[0], by_seed[1])


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _percent(loss_difference: float) -> float:
    return 100 * math.expm1(loss_difference)


def _verdict(windows: Difference, seeds: Difference | None) -> str:
    if seeds is None:
        return "one seed"
    if max(windows.high, seeds.high) < 0:
        return "better"
    return "worse" if min(windows.low, seeds.low) > 0 else "none shown"


def _comparison(rows: Sequence[Row]) -> Cells:
    header = ["method", "trainable parameters", "lr", "s/step", "peak MiB", "ppl before", "ppl after"]
    header += ["sd of seeds", "gain %", "parameters per 1 %"]
    return [header, *(_method_cells(name, runs) for name, runs in _by_method(rows).items())]


def _method_cells(name: str, runs: Sequence[Row]) -> list[str]:
    first, after = runs[0], [run["perplexity_after"] for run in runs]
    mean = statistics.fmean(after)
    gain = 100 * (1 - mean / first["perplexity_before"])
    parameters = first["trainable_parameters"]
    seconds = [run["seconds_per_step"] for run in runs if run["seconds_per_step"] is not None]
    peaks = [run["peak_memory_mib"] for run in runs if run["peak_memory_mib"] is not None]
    return [
        name,
        f"{parameters:,}",
        _number(first["learning_rate"], "g"),
        _number(statistics.median(seconds) if seconds else None, ".2f"),
        _number(max(peaks, default=None), ",.0f"),
        _number(first["perplexity_before"], ".3f"),
        _number(mean, ".3f"),
        _number(statistics.stdev(after) if len(after) > 1 else None, ".3f"),
        _number(gain if first["steps"] else None, ".2f"),
        _number(parameters / gain if first["steps"] and gain > 0 else None, ",.0f"),
    ]


def _difference_cells(rows: Sequence[Row], reference: str | None) -> Cells:
    found = differences(rows, reference)
    if not found:
        return []
    name = _reference([row["method"] for row in rows if row["steps"]], reference)
    header = [f"against {name}", "difference %", "95 % over windows", "95 % over seeds", "difference"]
    return [header, *([method, *_interval_cells(*pair)] for method, pair in found.items())]


def _interval_cells(windows: Difference, seeds: Difference | None) -> list[str]:
    intervals = [
        "-" if interval is None else f"{_percent(interval.low):+.2f} to {_percent(interval.high):+.2f}"
        for interval in (windows, seeds)
    ]
    return [f"{_percent(windows.mean):+.2f}", *intervals, _verdict(windows, seeds)]


def _search_cells(searches: Searches) -> Cells:
    rates = list(dict.fromkeys(rate for losses in searches.values() for rate in losses))
    lines = []
    for name, losses in searches.items():
        best = min(losses.values())
        marks = [
            f"{losses[rate]:.3f}{' *' if losses[rate] == best else ''}" if rate in losses else "-" for rate in rates
        ]
        lines.append([name, *marks])
    return [["validation perplexity", *(f"{rate:g}" for rate in rates)], *lines]


def _summary(rows: Sequence[Row]) -> str:
    facts = rows[0]
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    trained = next((row for row in rows if row["steps"]), None)
    steps = f"{len(trained['steps']['loss'])} steps" if trained else "nothing trained"
    return (
        f"{facts['model']} on {facts['data']['name']}: {steps}, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} "
        f"({', '.join(map(str, seeds))}), {len(rows)} runs."
    )


def _explanation(facts: Row) -> str:
    return f"{_PERPLEXITY[facts['settings'].get('protocol', 'tokens')]} {_MEANING}"


def _difference_text(rows: Sequence[Row], reference: str | None) -> str:
    return _DIFFERENCES.format(reference=_reference([row["method"] for row in rows if row["steps"]], reference))


def _meanings(rows: Sequence[Row]) -> dict[str, str]:
    return {row["method"]: row["meaning"] for row in rows if row.get("meaning")}


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _rows_of(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _html_table(cells: Cells) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in cells[0])
    body = "".join(f"<tr>{''.join(map(_html_cell, line))}</tr>\n" for line in cells[1:])
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _html_cell(cell: str) -> str:
    mark = f" class={cell}" if cell in ("better", "worse") else ""
    return f"<td{mark}>{html.escape(cell)}</td>"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return str(value)
