"""Tables in Markdown, aligned, so that they read on a terminal too."""

from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return the table of lines of cells, without a newline at its end; the first line is the header.

    The first column is aligned on the left, the others, of numbers mostly, on the right.

    Raises:
        ValueError: the lines differ in their number of cells.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        sized = enumerate(zip(cells, widths, strict=True))
        padded = [text.rjust(width) if i else text.ljust(width) for i, (text, width) in sized]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + ":" if i else "-" * (width + 2) for i, width in enumerate(widths))
    return "\n".join([line(lines[0]), f"|{rule}|", *map(line, lines[1:])])
