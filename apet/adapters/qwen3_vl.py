"""Qwen3-VL: as Qwen2.5-VL, but frames stand apart between time stamps, and the first layers add visual features."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from apet.adapters.base import register
from apet.adapters.layout import Item, Layout, to_device
from apet.adapters.qwen2_vl import Qwen2VL


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
