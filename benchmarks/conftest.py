"""Collects what the benchmarks measure into tables, prints them at the end and writes them with --results."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paired import geometric_mean, paired_times
from benchmarks.plots import draw
from hylorada.provenance import provenance
from hylorada.tables import markdown_table

Row = dict[str, Any]
_tables: dict[str, list[Row]] = defaultdict(list)
_groups: dict[str, list[str]] = {}
_keys: dict[str, list[str]] = {}
_over: dict[str, str | None] = {}


def pytest_addoption(parser):
    parser.addoption(
        "--results", type=Path, metavar="DIRECTORY", help="write every table there, as JSON, Markdown, PNG"
    )
    parser.addoption("--pace", type=float, default=1.0, metavar="SHARE", help="of the usual seconds, for each case")


@pytest.fixture
def record(benchmark):
    """record(table, case, values): keep a row. Values whose names have a " / " are ratios: they get geometric means.

    The last entry of `case` tells apart the rows that a mean is taken over. `over` names the entry of `case` that the
    picture draws times (", ms") over; without it the picture shows the ratios as bars.
    """

    def record(table: str, case: Row, values: dict[str, float], over: str | None = None) -> None:
        values = {name: round(value, 4) for name, value in values.items()}
        benchmark.extra_info.update(values)
        _tables[table].append({**case, **values})
        _groups[table] = list(case)[:-1]
        _keys[table], _over[table] = list(case), over

    return record


@pytest.fixture
def paired(benchmark, request):
    """paired(contenders, seconds): `paired_times`; a single round where the benchmarks are only tried out."""

    def paired(contenders, seconds: float, **bounds):
        if benchmark.disabled:
            seconds, bounds = 0, bounds | {"fewest": 1, "warmup": 1}
        seconds *= request.config.getoption("--pace")
        return paired_times(contenders, seconds=seconds, **bounds)

    return paired


def pytest_terminal_summary(terminalreporter, config):
    directory = config.getoption("--results")
    for table, rows in _tables.items():
        means = _geometric_means(rows, _groups[table])
        text = _markdown(rows + means)
        terminalreporter.section(table)
        terminalreporter.write(text)
        if directory is not None:
            _write(directory, table, rows, means, text)


def _geometric_means(rows: list[Row], keys: list[str]) -> list[Row]:
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    means = []
    for values, members in groups.items():
        # of what every row has: a mean over some of them would stand for others than its neighbours
        shared = [name for name in members[0] if " / " in name and all(name in row for row in members)]
        ratios = {name: [row[name] for row in members] for name in shared}
        if ratios and len(members) > 1:
            mean = {name: round(geometric_mean(column), 4) for name, column in ratios.items()}
            means.append(dict(zip(keys, values, strict=True)) | {"geometric mean of": len(members)} | mean)
    return means


def _markdown(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[_cell(row[name]) if name in row else "" for name in names] for row in rows]
    return markdown_table([names, *lines]) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _write(directory: Path, table: str, rows: list[Row], means: list[Row], text: str) -> None:
    facts = provenance()
    machine, versions = facts["machine"], facts["versions"]
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    origin = f"{machine['cpu']}, {machine['threads']} threads; {used}; commit {facts['commit']}; `{facts['command']}`"
    directory.mkdir(parents=True, exist_ok=True)
    name = table.replace(" ", "_").replace(",", "")
    content = {**facts, "rows": rows, "geometric means": means}
    (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if draw(table, rows, _keys[table], _over[table], directory / f"{name}.png"):
        text += f"\n![{table}]({name}.png)\n"
    (directory / f"{name}.md").write_text(f"# {table}\n\n{origin}\n\n{text}", encoding="utf-8")
