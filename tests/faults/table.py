"""docs/faults.md, made of what the scenarios do: python -m tests.faults.table"""

from pathlib import Path

import torch

from tests.faults.scenarios import SCENARIOS, run

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
HEAD = """# Faults

What happens when a save, a load or a training run goes wrong. After each of these the old state is intact: the
tests check every byte of the folder, and that a base model was not changed. Written by
`python -m tests.faults.table`; `tests/faults` holds the page to it.

| fault | result |
|---|---|
"""


def row(name: str, result: str) -> str:
    return f"| {name} | {result.replace('|', '/')} |\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(HEAD + "".join(row(name, run(name)) for name in SCENARIOS), encoding="utf-8")
