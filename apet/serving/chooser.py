"""The vision stage of models whose tokens are chosen behind the projector."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apet.methods import selector
from apet.methods.base import Selector
from apet.serving.counts import image_tokens, video_blocks
from apet.serving.plugin import settings_of
from apet.serving.settings import image_selector, served


class Chooser:
    """Keeps as many rows of a picture as `apet.serving.counts` says.

    Args:
        model: One of our model classes, with its checkpoint's config.
    """

    def __init__(self, model: Any) -> None:
        row = served(type(model).__name__)
        self._config, self._preset = settings_of(model.config), row.preset
        self._image = image_selector(self._config, row)
        self._frame = selector(self._config, "vision", row.preset.frame, available=())

    def image(self, rows: Tensor, raster: Sequence[int] | None, tiles: int = 1) -> tuple[Tensor, Tensor]:
        """Kept rows (K, D) of an image (N, D), and their numbers (K,) among its rows.

        Args:
            rows: Tokens of the image, newlines left out.
            raster: (rows, columns) of a tile; None where the tokens are none.
            tiles: Equal parts of the image, each with a budget of its own.
        """
        length = len(rows) // tiles
        return _kept(rows, (tiles, length, image_tokens(self._config, length)), self._image, raster)

    def video(self, rows: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same for a video of a grid (time, rows, columns), frame by frame or as a clip."""
        blocks = video_blocks(self._config, self._preset, grid[0], len(rows) // grid[0])
        return _kept(rows, blocks, self._image if blocks[0] == 1 else self._frame, grid[1:])


def _kept(
    rows: Tensor, blocks: tuple[int, int, int], select: Selector, raster: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """`blocks` are (number of blocks, rows of each, rows kept of each)."""
    number, length, keep = blocks
    if keep >= length:
        return rows, torch.arange(len(rows), device=rows.device)
    whole = raster is not None and raster[0] * raster[1] == length
    result = select(rows.view(number, length, -1), keep, grid=tuple(raster) if whole else None)
    first = torch.arange(number, device=rows.device).view(-1, 1) * length
    return result.tokens.flatten(0, 1), (result.indices + first).flatten()
