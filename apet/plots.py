"""Curves of scores: panels side by side, one legend for all of them, a method in the same colour everywhere."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.files import replacing

_MARKERS = "os^vDPX*<>p"  # coprime to the 20 colours: no pair of both comes twice
_LEGEND_LINES = 22  # that fit beside a panel


@dataclass(frozen=True)
class Series:
    """The points of one name in one panel.

    Attributes:
        name: In the legend.
        points: (x, y).
        bounds: (lower, upper) ends of the bar of every point; None for no bars.
        reference: Drawn as squares and as dashed lines across the panel, without a curve: uncompressed models.
    """

    name: str
    points: Sequence[tuple[float, float]]
    bounds: Sequence[tuple[float, float]] | None = None
    reference: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes with their curves.

    Attributes:
        title: Above it.
        x_label: Of the horizontal axis.
        y_label: Of the vertical one.
        series: What is drawn.
        ticks: Of the horizontal axis, which then has a logarithmic scale; none for matplotlib's own.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    ticks: Sequence[float] = ()


def check_matplotlib(instead: str) -> None:
    """ValueError if nothing can be drawn; asked before hours are spent. `instead` is what else the user can do."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"the pictures need matplotlib: pip install matplotlib, or {instead}")


def write_png(path: Path, panels: Sequence[Panel], title: str = "") -> None:
    """Draw the panels into a PNG file, whole or not at all; `check_matplotlib` comes first."""
    from matplotlib.figure import Figure

    across = min(2, len(panels))
    down = -(-len(panels) // across)
    names = list(dict.fromkeys(one.name for panel in panels for one in panel.series))
    columns = -(-len(names) // (_LEGEND_LINES * down))
    figure = Figure(figsize=(5.2 * across + 1.9 * columns, 3.9 * down + 0.6), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, names)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside center right", ncols=columns, fontsize=8)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _draw(axis: Any, panel: Panel, names: Sequence[str]) -> None:
    references = [one.name for one in panel.series if one.reference]
    for one in panel.series:
        number = names.index(one.name)
        if one.reference:
            _draw_reference(axis, one, _colour(number) if len(references) > 1 else "black")
        elif one.points:
            # Where methods share a tick, their bars are moved apart so that they can be told.
            _draw_curve(axis, one, number, 1.012 ** (number % 5 - 2) if panel.ticks and one.bounds else 1.0)
    if panel.ticks:
        axis.set_xscale("log", base=2)
        axis.set_xticks(panel.ticks, [f"{tick:.0f}" for tick in panel.ticks])
        axis.minorticks_off()
    axis.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title)
    axis.grid(alpha=0.3)


def _draw_reference(axis: Any, series: Series, colour: Any) -> None:
    for _, height in series.points:
        axis.axhline(height, color=colour, linestyle="--", linewidth=1, zorder=1)
    places, heights = zip(*series.points, strict=True) if series.points else ((), ())
    style = {"marker": "s", "markersize": 5, "color": colour, "linestyle": "none"}
    axis.plot(places, heights, label=series.name, **style)


def _draw_curve(axis: Any, series: Series, number: int, apart: float) -> None:
    bounds = series.bounds or [(height, height) for _, height in series.points]
    ordered = sorted(zip(series.points, bounds, strict=True))
    places, heights = zip(*(point for point, _ in ordered), strict=True)
    below = [max(0.0, height - low) for (_, height), (low, _) in ordered]
    above = [max(0.0, high - height) for (_, height), (_, high) in ordered]
    _, caps, bars = axis.errorbar(
        [place * apart for place in places], heights, yerr=None if series.bounds is None else [below, above],
        label=series.name, color=_colour(number), marker=_MARKERS[number % 11], markersize=5, linewidth=1.4,
        capsize=2, elinewidth=0.8,
    )  # fmt: skip
    for part in (*caps, *bars):
        part.set_alpha(0.6)


def _colour(number: int) -> tuple[float, ...]:
    """The ten strong colours first, then their light ones."""
    from matplotlib import colormaps

    return colormaps["tab20"](number % 20 * 2 if number % 20 < 10 else number % 20 * 2 - 19)
