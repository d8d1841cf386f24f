"""Collects the ratios that benchmarks measure and prints their geometric means."""

from collections import defaultdict

import pytest

from benchmarks.paired import geometric_mean

_ratios: dict[tuple[str, str], list[float]] = defaultdict(list)


@pytest.fixture
def record_ratio(benchmark):
    """record_ratio(group, name, value): keep a ratio in the benchmark's JSON and in the closing table."""

    def record(group: str, name: str, value: float) -> None:
        benchmark.extra_info[name] = round(value, 4)
        _ratios[group, name].append(value)

    return record


def pytest_terminal_summary(terminalreporter):
    if _ratios:
        terminalreporter.section("geometric means of paired ratios")
    for (group, name), values in _ratios.items():
        terminalreporter.write_line(f"{group}: {name} = {geometric_mean(values):.3f} over {len(values)} shapes")
