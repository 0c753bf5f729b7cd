"""How vLLM arranges the tiles of a picture: its own function does it, with numbers in place of features."""

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from apet.adapters import host

NEWLINE = torch.tensor([-1.0], dtype=torch.float64)


def arranged(merge: Callable, config: Any, height: int, width: int) -> tuple[int, np.ndarray]:
    """Tiles of a picture of this size, and (T,) float64 the numbers of their rows as they stand in the prompt.

    A newline is negative. Where vLLM interpolates rows, so it does their numbers.

    Args:
        merge: `_merge_image_patch_embeddings` of vLLM's class, unbound; what it gave is kept.
        config: The checkpoint's config.
        height: Pixels.
        width: Pixels.
    """
    pinpoints = tuple(map(tuple, config.image_grid_pinpoints))
    return _arranged(merge, height, width, pinpoints, config.vision_config.image_size, config.vision_config.patch_size)


@lru_cache(maxsize=4096)
def _arranged(
    merge: Callable, height: int, width: int, pinpoints: tuple, image_size: int, patch_size: int
) -> tuple[int, np.ndarray]:
    """As `arranged`, of plain numbers."""
    pairs, rows = [list(pair) for pair in pinpoints], (image_size // patch_size) ** 2
    tiles = host.crops_of((height, width), pairs, image_size)
    vision = SimpleNamespace(image_size=image_size, patch_size=patch_size)
    model = SimpleNamespace(
        config=SimpleNamespace(image_grid_pinpoints=pairs, vision_config=vision), image_newline=NEWLINE
    )
    numbers = torch.arange(tiles * rows, dtype=torch.float64).view(tiles, rows, 1)
    return tiles, merge(model, torch.tensor([height, width]), numbers, strategy="spatial_unpad").flatten().numpy()
