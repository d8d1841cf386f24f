"""Facts that stand in several files of the project agree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_release_of_ruff_is_pinned():
    pins = re.findall(r"ruff==[\d.]+", read("pyproject.toml") + read(".pre-commit-config.yaml"))
    assert len(pins) == 3 and len(set(pins)) == 1, pins


def test_every_mutant_is_an_edit_of_the_code_as_it_is():
    # the interpreted kernels' own mutants are among them
    pytest.importorskip("triton")
    from tests.mutants import MUTANTS

    absent = [mutant.name for mutant in MUTANTS if mutant.text not in (ROOT / mutant.file).read_text(encoding="utf-8")]
    assert len(MUTANTS) >= 30 and absent == []
