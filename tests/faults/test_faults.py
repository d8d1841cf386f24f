"""Every fault leaves the old state intact and says what is wrong; docs/faults.md is what was seen."""

import os

import pytest

if not hasattr(os, "fork"):
    pytest.skip("needs a system that forks", allow_module_level=True)

from tests.faults.scenarios import SCENARIOS, SLOW, run
from tests.faults.table import HEAD, PAGE, row

# a forked process has none of its parent's threads
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SCENARIOS]
)
def test_the_page_says_what_a_fault_does(name):
    assert row(name, run(name)) in PAGE.read_text(encoding="utf-8"), "run python -m tests.faults.table"


def test_the_page_has_no_other_rows():
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(HEAD) and page.count("\n| ") == HEAD.count("\n| ") + len(SCENARIOS)
