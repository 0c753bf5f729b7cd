"""MMBench's question table: a TSV with one image per row, read with the standard library.

Cells are kept as written: "1" is not turned into a number. What counts as an empty cell is what the published scripts'
table reader takes for one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from apet.eval.benchmarks.files import PathLike, read_text, shown

LETTERS = "ABCD"
_LONGEST_INDEX = 18  # digits
_EMPTY = frozenset(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null|".split("|")
)


def read_table(path: PathLike, columns: Sequence[str]) -> dict[int, dict[str, str]]:
    """Rows of the TSV by index, cells as strings, empty cells as "".

    Raises:
        ValueError: A missing column, an index that is no number or repeats, a row of the wrong width, no row.
    """
    rows: dict[int, dict[str, str]] = {}
    for line, row in _iterate_table(path, ("index", *columns)):
        where = f"{path} line {line}"
        if None in row or None in row.values():
            raise ValueError(f"{where}: the row has another number of cells than the header")
        if not (row["index"].isdecimal() and len(row["index"]) <= _LONGEST_INDEX):
            raise ValueError(f"{where}: index {row['index']!r} is not a number")
        if int(row["index"]) in rows:
            raise ValueError(f"{where}: index {row['index']} is there twice")
        rows[int(row["index"])] = {key: "" if value in _EMPTY else value for key, value in row.items()}
    if not rows:
        raise ValueError(f"{path} is empty: it has no row below the header")
    return rows


def _iterate_table(path: PathLike, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    limit = csv.field_size_limit(2**31 - 1)  # an image is one cell; the default stops at 128 KiB
    try:
        missing = [column for column in required if column not in (reader.fieldnames or [])]
        if missing:
            there = ", ".join(map(shown, reader.fieldnames or [])) or "none"
            raise ValueError(f"{path} has no column {', '.join(missing)} (columns: {there})")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def options_of(row: Mapping[str, str]) -> dict[str, str]:
    """Letter -> option text, up to the first missing option."""
    options: dict[str, str] = {}
    for letter in LETTERS:
        if not row[letter] or row[letter].lower() in ("nan", "none"):
            break
        options[letter] = row[letter]
    return options
