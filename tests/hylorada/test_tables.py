"""Tables in Markdown."""

import pytest

from hylorada.tables import markdown_table


def test_names_stand_on_the_left_and_numbers_on_the_right():
    assert markdown_table([["method", "x, ms"], ["a", "10.5"], ["much longer", ""]]).splitlines() == [
        "| method      | x, ms |",
        "|-------------|------:|",
        "| a           |  10.5 |",
        "| much longer |       |",
    ]


def test_lines_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        markdown_table([["a", "b"], ["1"]])
