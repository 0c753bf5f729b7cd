"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size, M-RoPE positions, compressed behind the merger.

In Qwen3-VL frames stand apart between time stamps, and the first layers add visual features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.base import Adapter, UsualImage, register
from apet.adapters.layout import Item, Layout, to_device

_USUAL_SIDE = 1008


@register
class Qwen2VL(Adapter):
    """`Qwen2VLForConditionalGeneration`. A video is one run of placeholders, frame pair after frame pair."""

    family = "qwen2_vl"
    model_types = ("qwen2_vl",)
    classes = ("Qwen2VLForConditionalGeneration",)
    videos = "one block; a frame is a pair of pictures"
    proof = ("tests/test_patch_families.py",)
    position_axes = 3
    tower_modes = ("merge", "restore", "lossless")

    @property
    def reducible_towers(self) -> list[nn.Module]:
        """The vision model; all its layers are read."""
        return [self.base_model.visual]

    @property
    def tower_depth(self) -> int:
        """All of them."""
        return len(host.packed_layers(self.base_model.visual))

    @property
    def usual_image(self) -> UsualImage:
        """A photograph of about a million pixels."""
        vision = self.model.config.vision_config
        merged = vision.spatial_merge_size
        tokens = _USUAL_SIDE // (vision.patch_size * merged)
        side = tokens * merged * vision.patch_size
        grid = (tokens * merged, tokens * merged)
        return UsualImage(f"one image of {side} x {side} pixels", tokens**2, grid=grid)

    def image_items(self, features: Sequence[Tensor], given: Mapping[str, Any]) -> list[Item]:
        """One raster of merged patches each."""
        grids = self._grids(given["image_grid_thw"])
        return [Item((len(one),), grid=grid) for one, grid in zip(features, grids, strict=True)]

    def video_items(self, features: Sequence[Tensor], given: Mapping[str, Any], per_frame: bool) -> list[Item]:
        """Frames are the steps of the video's grid in time."""
        frames = given["video_grid_thw"][:, 0].tolist()
        steps = frames if per_frame else [1] * len(features)
        grids = self._grids(given["video_grid_thw"])
        return [
            Item((len(one) // step,) * step, video=True, grid=grid, crops=count)
            for one, step, grid, count in zip(features, steps, grids, frames, strict=True)
        ]

    def _grids(self, patches: Tensor) -> list[tuple[int, int]]:
        """Rows and columns of the tokens of pictures whose patches are counted (time, rows, columns)."""
        merged = self.model.config.vision_config.spatial_merge_size
        return [(rows // merged, columns // merged) for _, rows, columns in patches.tolist()]


@register
class Qwen2_5_VL(Qwen2VL):  # noqa: N801 - the name transformers gives it
    """`Qwen2_5_VLForConditionalGeneration`: for the patch the same as Qwen2-VL."""

    family = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    classes = ("Qwen2_5_VLForConditionalGeneration",)


@register
class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration`.

    The features that the first layers add ("deepstack") are cut with the tokens of the vision stage. They are given for
    all tokens that enter the decoder, so no stage may run between the layers that add them.
    """

    family = "qwen3_vl"
    model_types = ("qwen3_vl",)
    classes = ("Qwen3VLForConditionalGeneration",)
    videos = "one block per frame; a frame is a pair of pictures"
    tower_modes = ()

    @property
    def first_stage_layer(self) -> int:
        """Behind the layers that add features."""
        return max(1, len(self.model.config.vision_config.deepstack_visual_indexes))

    def video_items(self, features: Sequence[Tensor], given: Mapping[str, Any], per_frame: bool) -> list[Item]:
        """Frames are apart in any case."""
        return super().video_items(features, given, True)

    def shorten_inputs(self, kwargs: dict, before: Layout, after: Layout, source: Tensor) -> dict:
        """Cut the features to add, which come in the order of rows and columns."""
        added = kwargs.get("deepstack_visual_embeds")
        if added is None:
            return kwargs
        visual = after.items >= 0
        rows, columns = (to_device(places, source.device) for places in np.nonzero(visual))
        was_visual = before.items >= 0
        numbers = to_device(np.cumsum(was_visual).reshape(was_visual.shape) - 1, source.device)
        kept = numbers[rows, source[rows, columns]]
        return kwargs | {
            "visual_pos_masks": to_device(visual, source.device),
            "deepstack_visual_embeds": [features[kept.to(features.device)] for features in added],
        }
