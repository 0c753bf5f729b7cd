"""LLaVA-OneVision: an overview and tiles with a newline per row, scaled down if large; videos end in one newline."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.base import Adapter, UsualImage, register
from apet.adapters.layout import NEWLINE, Item, square
from apet.adapters.vision import ImageLayout


@register
class LlavaOnevision(Adapter):
    """`LlavaOnevisionForConditionalGeneration`. Tiles are scaled as one picture, so a budget is for the whole image."""

    family = "llava_onevision"
    model_types = ("llava_onevision",)
    classes = ("LlavaOnevisionForConditionalGeneration",)
    videos = "frames in one block, one newline at its end"
    proof = ("tests/test_patch_families.py",)
    tower_modes = ("restore",)

    @property
    def towers(self) -> list[nn.Module]:
        """SigLIP."""
        return [self.base_model.vision_tower]

    @property
    def usual_image(self) -> UsualImage:
        """Four tiles and the overview, with a newline per row."""
        config, vision = self.model.config, self.model.config.vision_config
        side = vision.image_size
        crops = host.crops_of((2 * side, 2 * side), config.image_grid_pinpoints, side)
        rows = (side // vision.patch_size) ** 2
        columns = self._columns(crops, rows, (2 * side, 2 * side), config.vision_aspect_ratio)
        lines = int((columns == NEWLINE).sum())
        what = f"one image of {2 * side} x {2 * side} pixels in {crops} crops"
        return UsualImage(what, len(columns) - lines, crops, lines)

    def image_items(self, features: Sequence[Tensor], given: Mapping[str, Any]) -> list[Item]:
        """The host arranges zeros with a newline of one: the ones are the newlines."""
        config = self.model.config
        side = config.vision_config.image_size
        ratio = given.get("vision_aspect_ratio") or config.vision_aspect_ratio
        counts = given.get("batch_num_images")
        sizes = torch.as_tensor(given["image_sizes"]).tolist()
        tiled = [True] * len(sizes) if counts is None else [count == 1 for count in counts for _ in range(count)]
        items = []
        for one, size, tiles in zip(features, sizes, tiled, strict=True):
            crops = host.crops_of(size, config.image_grid_pinpoints, side) if tiles else 1
            rows = (side // config.vision_config.patch_size) ** 2 if crops > 1 else len(one) - 1
            columns = self._columns(crops, rows, size, ratio)
            grid = square(rows) if crops == 1 else None
            items.append(Item((len(one),), ImageLayout(crops, rows, columns).lines, grid=grid, crops=crops))
        return items

    def video_items(self, features: Sequence[Tensor], given: Mapping[str, Any], per_frame: bool) -> list[Item]:
        """The newline belongs to the last frame's segment and to the whole video's line."""
        # transformers 5.17 calls the argument pixel_values, and adds the newline later than 5.23.
        frames = given.get("pixel_values_videos", given.get("pixel_values")).shape[1]
        vision = self.model.config.vision_config
        size = math.ceil(vision.image_size // vision.patch_size / 2) ** 2
        lines = np.zeros(frames * size + 1, dtype=np.int64)
        lines[-1] = -2
        segments = (size,) * (frames - 1) + (size + 1,) if per_frame else (len(lines),)
        return [Item(segments, lines, True, square(size), frames)] * len(features)

    def _columns(self, crops: int, rows: int, size: Sequence[int], ratio: str) -> np.ndarray:
        """(T,) NEWLINE for the newlines of an image's tokens, as the host arranges its crops of `rows` patches."""
        blank = torch.zeros(crops, rows, 1)
        marks = host.packed(self.base_model, blank, size, torch.ones(1), vision_aspect_ratio=ratio)
        return np.where(marks.flatten().numpy() == 1, NEWLINE, np.arange(len(marks)))
