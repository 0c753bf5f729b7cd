"""Rows as curves: score against layer-averaged tokens, or time to the first token; bars are 95 % intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apet import plots
from apet.compare.plan import UNCOMPRESSED
from apet.compare.rows import AVERAGE, Row


@dataclass(frozen=True)
class Abscissa:
    """What scores are drawn against.

    Attributes:
        label: Of the axis.
        value: Of a row; None where the row is not drawn.
        tick: Where a row's tick stands, None for matplotlib's own ticks on an even scale.
    """

    label: str
    value: Callable[[Row], float | None]
    tick: Callable[[Row], float] | None = None


def write_png(path: Path, tables: Mapping[str, Sequence[Row]], title: str, against: Abscissa) -> None:
    """Draw the tables; the dashed line is the uncompressed model."""
    plots.write_png(path, [_panel(name, rows, against) for name, rows in tables.items()], title)


def _panel(name: str, rows: Sequence[Row], against: Abscissa) -> plots.Panel:
    percent = name == AVERAGE
    full = next(row for row in rows if row.method == UNCOMPRESSED)
    series = [_series("uncompressed", [full], percent, against)]
    methods = dict.fromkeys(row.method for row in rows if row.budget is not None)
    series += [_series(method, [row for row in rows if row.method == method], percent, against) for method in methods]
    unit = "%" if full.maximum == 100 else "points"
    return plots.Panel(
        "mean of the benchmarks" if percent else name, against.label,
        "% of uncompressed" if percent else f"{full.metric}, {unit}", series,
        () if against.tick is None else sorted({against.tick(row) for row in rows}),
    )  # fmt: skip


def _series(name: str, rows: Sequence[Row], percent: bool, against: Abscissa) -> plots.Series:
    points, bounds = [], []
    for row in rows:
        place, height = against.value(row), row.percent if percent else row.score
        if place is not None and height is not None:
            points.append((place, height))
            bounds.append((row.percent_interval if percent else row.score_interval) or (height, height))
    return plots.Series(name, points, bounds, reference=name == "uncompressed")


def _place(row: Row) -> float:
    """Where the tick stands: the budget asked for, of which the measured tokens differ by rounding."""
    return float(row.budget) if row.budget is not None else _measured(row)


def _measured(row: Row) -> float:
    return row.tokens if row.tokens is not None else float(row.budget or 1)


TOKENS = Abscissa("visual tokens, averaged over layers", _measured, _place)
TIME = Abscissa("time to first token, ms", lambda row: row.cost.first_token.median if row.cost else None)
