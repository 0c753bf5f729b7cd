"""Qwen2-VL and Qwen2.5-VL: images and videos of any size, M-RoPE positions, compressed behind the patch merger."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from apet.adapters.base import Adapter, register
from apet.adapters.layout import Item


@register
class Qwen2VL(Adapter):
    """`Qwen2VLForConditionalGeneration`. A video is one run of placeholders, frame pair after frame pair."""

    family = "qwen2_vl"
    model_types = ("qwen2_vl",)
    classes = ("Qwen2VLForConditionalGeneration",)
    videos = "one block; a frame is a pair of pictures"
    proof = ("tests/test_patch_families.py",)
    position_axes = 3

    def image_items(self, features: Sequence[Tensor], given: Mapping[str, Any]) -> list[Item]:
        """One raster of merged patches each."""
        grids = self._grids(given["image_grid_thw"])
        return [Item((len(one),), grid=grid) for one, grid in zip(features, grids, strict=True)]

    def video_items(self, features: Sequence[Tensor], given: Mapping[str, Any], per_frame: bool) -> list[Item]:
        """Frames are the steps of the video's grid in time."""
        steps = given["video_grid_thw"][:, 0].tolist() if per_frame else [1] * len(features)
        grids = self._grids(given["video_grid_thw"])
        return [
            Item((len(one) // step,) * step, video=True, grid=grid)
            for one, step, grid in zip(features, steps, grids, strict=True)
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
