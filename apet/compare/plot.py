"""Score against layer-averaged tokens, or time to the first token: a panel per benchmark, a line per method."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apet.compare.plan import UNCOMPRESSED
from apet.compare.results import AVERAGE, Row
from apet.eval.benchmarks.files import replacing


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


_MARKERS = "os^vDPX*<>p"  # coprime to the 20 colours: no pair of both comes twice


def check_matplotlib() -> None:
    """ValueError if the picture cannot be drawn; asked before hours are spent on answers."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the pictures need matplotlib: pip install matplotlib, or leave them out with --no_png")


def write_png(path: Path, tables: Mapping[str, Sequence[Row]], title: str, against: Abscissa) -> None:
    """Draw the tables; bars are 95 % intervals, the dashed line is the uncompressed model."""
    from matplotlib.figure import Figure  # optional: see check_matplotlib

    methods = list(dict.fromkeys(row.method for rows in tables.values() for row in rows if row.budget is not None))
    across = min(2, len(tables))
    down = -(-len(tables) // across)
    columns = -(-(len(methods) + 1) // (22 * down))
    figure = Figure(figsize=(5.2 * across + 1.9 * columns, 3.9 * down + 0.6), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, (name, rows) in zip(axes, tables.items(), strict=False):
        _panel(axis, name, rows, methods, against)
    for axis in axes[len(tables) :]:
        axis.set_axis_off()
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside center right", ncols=columns, fontsize=8)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _panel(axis: Any, name: str, rows: Sequence[Row], methods: Sequence[str], against: Abscissa) -> None:
    percent = name == AVERAGE
    full = next(row for row in rows if row.method == UNCOMPRESSED)
    height = full.percent if percent else full.score
    if height is not None:
        axis.axhline(height, color="black", linestyle="--", linewidth=1, label="uncompressed", zorder=1)
        axis.plot(against.value(full), height, marker="s", markersize=5, color="black")
    for number, method in enumerate(methods):
        points = sorted((row for row in rows if row.method == method), key=_place)
        points = [row for row in points if not percent or row.percent is not None]
        points = [row for row in points if against.value(row) is not None]
        if points:
            _line(axis, points, percent, number, method, against)
    if against.tick is not None:
        ticks = sorted({against.tick(row) for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axis.minorticks_off()
    axis.set(xlabel=against.label, title="mean of the benchmarks" if percent else name)
    axis.set_ylabel("% of uncompressed" if percent else f"{full.metric}, {'%' if full.maximum == 100 else 'points'}")
    axis.grid(alpha=0.3)


def _line(axis: Any, points: Sequence[Row], percent: bool, number: int, method: str, against: Abscissa) -> None:
    """Points of a method with intervals; where methods share a tick, moved apart so that their bars can be told."""
    apart = 1.0 if against.tick is None else 1.012 ** (number % 5 - 2)
    places = [against.value(row) * apart for row in points]
    heights = [row.percent if percent else row.score for row in points]
    bounds = [_bounds(row, percent) or (height, height) for row, height in zip(points, heights, strict=True)]
    below = [max(0.0, height - low) for height, (low, _) in zip(heights, bounds, strict=True)]
    above = [max(0.0, high - height) for height, (_, high) in zip(heights, bounds, strict=True)]
    _, caps, bars = axis.errorbar(
        places, heights, yerr=[below, above], label=method, color=_colour(number), marker=_MARKERS[number % 11],
        markersize=5, linewidth=1.4, capsize=2, elinewidth=0.8,
    )  # fmt: skip
    for part in (*caps, *bars):
        part.set_alpha(0.6)


def _colour(number: int) -> tuple[float, ...]:
    """The ten strong colours first, then their light ones."""
    from matplotlib import colormaps

    return colormaps["tab20"](number % 20 * 2 if number % 20 < 10 else number % 20 * 2 - 19)


def _bounds(row: Row, percent: bool) -> tuple[float, float] | None:
    return row.percent_interval if percent else row.score_interval


def _place(row: Row) -> float:
    """Where the tick stands: the budget asked for, of which the measured tokens differ by rounding."""
    return float(row.budget) if row.budget is not None else _measured(row)


def _measured(row: Row) -> float:
    return row.tokens if row.tokens is not None else float(row.budget or 1)


TOKENS = Abscissa("visual tokens, averaged over layers", _measured, _place)
TIME = Abscissa("time to first token, ms", lambda row: row.cost.first_token.median if row.cost else None)
