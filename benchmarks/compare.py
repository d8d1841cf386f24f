"""Compares two runs of the same benchmarks: how far their ratios lie apart, beside the spread that each stated.

python -m benchmarks.compare results/first results/second
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

SPREAD = "±"


class Difference(NamedTuple):
    """Of one ratio: the table and case, what both runs found, and the larger of their spreads."""

    case: str
    first: float
    second: float
    spread: float

    @property
    def is_within(self) -> bool:
        return abs(self.first - self.second) <= self.spread


def differences(first: Path, second: Path) -> list[Difference]:
    """The ratio that each row states a spread for, of every row that both directories have."""
    found = []
    for path in sorted(first.glob("*.json")):
        if not (second / path.name).is_file():
            continue
        rows, others = (_rows(directory / path.name) for directory in (first, second))
        for case in rows.keys() & others.keys():
            (a, spread), (b, other_spread) = rows[case], others[case]
            found.append(Difference(f"{path.stem}: {case}", a, b, max(spread, other_spread)))
    return sorted(found)


def _rows(path: Path) -> dict[str, tuple[float, float]]:
    """Case -> its ratio and spread. A case is what is neither measured nor a ratio: texts and whole numbers."""
    rows = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if SPREAD in row:
            case = ", ".join(str(value) for value in row.values() if not isinstance(value, float))
            rows[case] = (_stated(row), row[SPREAD])
    return rows


def _stated(row: dict[str, Any]) -> float:
    """The first ratio of a row: its spread is the one that stands in it."""
    return next(value for name, value in row.items() if " / " in name)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each ratio outside of its spread, and how many are within."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 2:
        print("give two directories of results", file=sys.stderr)
        return 2
    found = differences(Path(given[0]), Path(given[1]))
    if not found:
        print("the directories have no ratio in common that has a spread", file=sys.stderr)
        return 1
    for item in found:
        if not item.is_within:
            print(f"{item.case}: {item.first:.3f} and {item.second:.3f}, spread {item.spread:.3f}")
    print(f"{sum(item.is_within for item in found)} of {len(found)} ratios within their spread")
    return 0


if __name__ == "__main__":
    sys.exit(main())
