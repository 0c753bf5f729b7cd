"""The picture: what the model sees and what it answered, then a row per method and stage.

A row shows the kept patches and, where the method has them, the groups that patches were merged into and the error map.
Error maps of one stage have one scale for all methods; stages see other features, so each has its own.
"""

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apet.vis.trace import MethodTrace, StageTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
_FADED, _TINT = 0.85, 0.35
_PANEL, _LINE = 3.0, 0.45  # inches
_DPI = 110


def check_output(path: Path) -> None:
    """Asked before anything is answered.

    Raises:
        ValueError: The picture has no format that can be written, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {str(path)!r} must end in one of {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib: pip install matplotlib")


def draw(image: np.ndarray, grid: tuple[int, int], traces: Sequence[MethodTrace], question: str) -> "Figure":
    """All methods below each other, the picture as the model sees it on top.

    Args:
        image: (H, W, 3) uint8.
        grid: (rows, columns) of the image's tokens.
        traces: What the methods did.
        question: What was asked.
    """
    from matplotlib.figure import Figure  # optional: see check_output

    rows = [(one, stage) for one in traces for stage in one.stages]
    size = (3 * _PANEL + 0.7, (len(rows) + 1) * (_PANEL + _LINE))
    figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
    # The colour bar takes its part of the last column.
    axes = figure.add_gridspec(len(rows) + 1, 3, width_ratios=[1, 1, 1.2])
    _show(figure.add_subplot(axes[0, 0]), image, "what the model sees")
    _write_answers(figure.add_subplot(axes[0, 1:]), traces, question)
    scales = _scales(rows)
    for row, (one, stage) in enumerate(rows, start=1):
        kept, merged = len(stage.kept), int((stage.groups >= 0).sum())
        where = "vision stage" if stage.name == "vision" else f"after {stage.name}"
        _show(
            figure.add_subplot(axes[row, 0]),
            kept_picture(image, grid, stage.kept),
            f"{_short(one.method)}\n{where}: {kept} kept",
        )
        if merged > kept:
            groups = group_picture(image, grid, stage.groups, stage.kept)
            _show(figure.add_subplot(axes[row, 1]), groups, f"{merged} patches in {kept} tokens")
        if stage.errors is not None:
            _show_errors(figure, figure.add_subplot(axes[row, 2]), stage.errors.reshape(grid), scales[stage.name])
    return figure


def kept_picture(image: np.ndarray, grid: tuple[int, int], kept: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 with all patches faded but the kept ones."""
    share = np.full(grid[0] * grid[1], _FADED)
    share[kept] = 0
    return _blend(image, _enlarge(share, grid, image.shape[:2]), _fading(image))


def group_picture(image: np.ndarray, grid: tuple[int, int], groups: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: a tint per group over the photograph, the kept patches framed, patches alone as they are.

    Dropped patches are faded.
    """
    sizes = np.bincount(groups[groups >= 0], minlength=len(kept))
    alone = (groups >= 0) & (sizes[groups.clip(min=0)] == 1)
    share = np.where(groups < 0, _FADED, np.where(alone, 0.0, _TINT))
    colour = np.where((groups >= 0)[:, None], _tints(len(kept))[groups.clip(min=0)], _fading(image))
    shape = image.shape[:2]
    picture = _blend(image, _enlarge(share, grid, shape), _enlarge(colour, grid, shape))
    framed = np.zeros(len(groups), dtype=bool)
    framed[kept] = True
    picture[_frames(grid, shape) & _enlarge(framed & ~alone, grid, shape)] = 255
    return picture


def _scales(rows: Sequence[tuple[MethodTrace, StageTrace]]) -> dict[str, tuple[float, float]]:
    """Smallest and largest error of every stage, over all methods."""
    found: dict[str, list[np.ndarray]] = {}
    for _, stage in rows:
        if stage.errors is not None:
            found.setdefault(stage.name, []).append(stage.errors[np.isfinite(stage.errors)])
    return {name: (float(min(one.min() for one in all_)), float(max(one.max() for one in all_)))
            for name, all_ in found.items()}  # fmt: skip


def _show(axes: Any, picture: np.ndarray, label: str) -> None:
    axes.imshow(picture, interpolation="none")
    axes.set_title(label, fontsize=13)
    axes.set_axis_off()


def _show_errors(figure: "Figure", axes: Any, errors: np.ndarray, scale: tuple[float, float]) -> None:
    """The map with its colour bar; grey where no token entered."""
    from matplotlib import colormaps

    colours = colormaps["magma"].with_extremes(bad="#9a9a9a")
    shown = axes.imshow(np.ma.masked_invalid(errors), cmap=colours, vmin=scale[0], vmax=scale[1], interpolation="none")
    axes.set_title("error", fontsize=13)
    axes.set_axis_off()
    axes.set_anchor("W")
    bar = figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=11)


def _write_answers(axes: Any, traces: Sequence[MethodTrace], question: str) -> None:
    """The question, and a line per method."""
    lines = ["\n".join(textwrap.wrap(f"Q: {question}", 44, max_lines=4, placeholder=" ...")), ""]
    for one in traces:
        answer = textwrap.shorten(one.answer, 30, placeholder=" ...")
        lines.append(f"{_short(one.method)}: {answer}\n   {one.tokens:.1f} tokens per layer")
    axes.text(
        0.02, 0.97, "\n".join(lines), fontsize=13, va="top", ha="left", transform=axes.transAxes, parse_math=False
    )
    axes.set_axis_off()


def _short(method: str) -> str:
    return textwrap.shorten(method, 28, placeholder="...")


def _fading(image: np.ndarray) -> np.ndarray:
    """(3,) what dropped patches fade to: white on a dark picture, black on a bright one."""
    return np.full(3, 255.0 if image.mean() < 110 else 0.0)


def _blend(image: np.ndarray, share: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return (image * (1 - share[..., None]) + colour * share[..., None]).round().astype(np.uint8)


def _enlarge(values: np.ndarray, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Values (N, ...) of the patches at every pixel, (H, W, ...)."""
    rows, columns = (np.arange(size) * count // size for size, count in zip(shape, grid, strict=True))
    return values[rows[:, None] * grid[1] + columns]


def _frames(grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool, the first row and column of pixels of every patch and the last."""
    edges = []
    for size, count in zip(shape, grid, strict=True):
        patch = np.arange(size) * count // size
        edges.append(np.diff(patch, prepend=-1).astype(bool) | np.diff(patch, append=count).astype(bool))
    return edges[0][:, None] | edges[1]


def _tints(count: int) -> np.ndarray:
    """(count, 3) quiet colours, neighbours far apart: hues in steps of the golden ratio, mixed with grey."""
    hue = (np.arange(max(count, 1)) * 0.618034) % 1
    channels = [np.abs((hue * 6 + shift) % 6 - 3) - 1 for shift in (0, 4, 2)]
    return 140 + 100 * (np.stack(channels, axis=1).clip(0, 1) - 0.5)
