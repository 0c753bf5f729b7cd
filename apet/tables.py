"""Tables and their cells as text, for everything that prints some."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned Markdown table; every line ends in a newline."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |\n" for line in table
    )


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A number with so many decimals; an empty cell for None."""
    return "" if value is None else f"{value:.{digits}f}{unit}"
