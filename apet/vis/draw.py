"""The picture: one row per method, three panels per stage (kept patches, merge groups, error map)."""

import bisect
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apet.vis.trace import MethodTrace, StageTrace

_PANEL, _GAP, _LINE = 288, 8, 20
_FADED = 0.85
_RAMP = np.array([[13, 8, 60], [120, 28, 110], [215, 70, 70], [250, 160, 50], [252, 250, 170]], dtype=float)


def draw(image: np.ndarray, grid: tuple[int, int], traces: Sequence[MethodTrace], question: str) -> Image.Image:
    """All methods below each other, the picture as the model sees it in front.

    Args:
        image: (H, W, 3) uint8.
        grid: (rows, columns) of the image's tokens.
        traces: What the methods did.
        question: What was asked.
    """
    columns = 1 + 3 * max(len(one.stages) for one in traces)
    height = _PANEL + 2 * _LINE + _GAP
    canvas = Image.new("RGB", (columns * (_PANEL + _GAP) + _GAP, _LINE + _GAP + len(traces) * height), "white")
    pen = ImageDraw.Draw(canvas)
    _text(pen, (_GAP, 4), f"question: {question}", canvas.width - 2 * _GAP)
    for row, one in enumerate(traces):
        top = _LINE + _GAP + row * height
        title = f"{one.method}: {one.tokens:.1f} tokens per layer on average; answer: {one.answer}"
        _text(pen, (_GAP, top), title, canvas.width - 2 * _GAP)
        panels = [
            ("what the model sees", image),
            *(panel for stage in one.stages for panel in _panels(image, grid, stage)),
        ]
        for column, (label, picture) in enumerate(panels):
            left = _GAP + column * (_PANEL + _GAP)
            _text(pen, (left, top + _LINE), label, _PANEL)
            canvas.paste(Image.fromarray(picture).resize((_PANEL, _PANEL)), (left, top + 2 * _LINE))
    return canvas


def kept_picture(image: np.ndarray, grid: tuple[int, int], kept: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 with all patches faded but the kept ones."""
    share = np.full(grid[0] * grid[1], _FADED)
    share[kept] = 0
    return _blend(image, _enlarge(share, grid, image.shape[:2]), _fading(image))


def group_picture(image: np.ndarray, grid: tuple[int, int], groups: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: patches of one group in one colour, the kept ones framed, patches alone as they are.

    Dropped patches are faded.
    """
    sizes = np.bincount(groups[groups >= 0], minlength=len(kept))
    alone = (groups >= 0) & (sizes[groups.clip(min=0)] == 1)
    share = np.where(groups < 0, _FADED, np.where(alone, 0.0, 0.6))
    colour = np.where((groups >= 0)[:, None], _hues(len(kept))[groups.clip(min=0)], _fading(image))
    shape = image.shape[:2]
    picture = _blend(image, _enlarge(share, grid, shape), _enlarge(colour, grid, shape))
    framed = np.zeros(len(groups), dtype=bool)
    framed[kept] = True
    picture[_frames(grid, shape) & _enlarge(framed & ~alone, grid, shape)] = 255
    return picture


def error_picture(image: np.ndarray, grid: tuple[int, int], errors: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: from the smallest error (dark) to the largest (light); grey where no token entered."""
    known = np.isfinite(errors)
    low, high = (errors[known].min(), errors[known].max()) if known.any() else (0.0, 1.0)
    level = np.where(known, errors - low, 0) / max(high - low, 1e-12) * (len(_RAMP) - 1)
    colour = np.stack([np.interp(level, range(len(_RAMP)), _RAMP[:, channel]) for channel in range(3)], axis=1)
    colour[~known] = 90
    return _enlarge(colour, grid, image.shape[:2]).round().astype(np.uint8)


def _panels(image: np.ndarray, grid: tuple[int, int], stage: StageTrace) -> list[tuple[str, np.ndarray]]:
    merged = int((stage.groups >= 0).sum())
    errors = np.full(len(stage.groups), np.nan) if stage.errors is None else stage.errors
    known = errors[np.isfinite(errors)]
    scale = f"error {known.min():.3g} .. {known.max():.3g}" if len(known) else "no error"
    return [
        (f"{stage.name}: {len(stage.kept)} kept", kept_picture(image, grid, stage.kept)),
        (f"{stage.name}: {merged} patches in {len(stage.kept)}", group_picture(image, grid, stage.groups, stage.kept)),
        (f"{stage.name}: {scale}", error_picture(image, grid, errors)),
    ]


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


def _hues(count: int) -> np.ndarray:
    """(count, 3) colours, neighbours far apart: hues in steps of the golden ratio."""
    hue = (np.arange(max(count, 1)) * 0.618034) % 1
    value = 0.75 + 0.25 * (np.arange(max(count, 1)) % 2)
    channels = [np.abs((hue * 6 + shift) % 6 - 3) - 1 for shift in (0, 4, 2)]
    return np.stack(channels, axis=1).clip(0, 1) * 255 * value[:, None]


def _text(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """One line, cut where the width ends."""
    font = ImageFont.load_default(14)
    text = " ".join(text.split())
    if pen.textlength(text, font) > width:
        longer = bisect.bisect_right(range(len(text)), width, key=lambda end: pen.textlength(text[:end] + "...", font))
        text = text[: max(longer - 1, 0)].rstrip() + "..."
    pen.text(place, text, "black", font)
