"""Video-LLaVA: images of 256 tokens, and videos as frames of a class token and 256 patches, one after the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from apet.adapters.base import Adapter, UsualImage, register
from apet.adapters.layout import Item, square

_CLASS_TOKEN = -2
_USUAL_FRAMES = 8


@register
class VideoLlava(Adapter):
    """`VideoLlavaForConditionalGeneration`. The class token of a frame stays as long as one of its patches does."""

    family = "video_llava"
    model_types = ("video_llava",)
    classes = ("VideoLlavaForConditionalGeneration",)
    videos = "frames in one block, each with its class token"
    proof = ("tests/test_patch_families.py",)
    tower_modes = ("merge", "restore", "lossless")

    @property
    def towers(self) -> list[nn.Module]:
        """One for images, one for the frames of videos."""
        return [self.base_model.image_tower, self.base_model.video_tower]

    @property
    def row_projector(self) -> nn.Module:
        """The projector of images and frames."""
        return self.base_model.multi_modal_projector

    @property
    def usual_image(self) -> UsualImage:
        """A clip of eight frames, each with its class token."""
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return UsualImage(f"a clip of {_USUAL_FRAMES} frames", _USUAL_FRAMES * patches, _USUAL_FRAMES, _USUAL_FRAMES)

    def image_items(self, features: Sequence[Tensor], given: Mapping[str, Any]) -> list[Item]:
        """With the strategy "full" images have a class token too."""
        strategy = given.get("vision_feature_select_strategy") or self.model.config.vision_feature_select_strategy
        lines = _frame_lines(1, features.shape[1]) if strategy == "full" else None
        grid = square(features.shape[1] - (lines is not None))
        return [Item((len(one),), lines, grid=grid) for one in features]

    def video_items(self, features: Sequence[Tensor], given: Mapping[str, Any], per_frame: bool) -> list[Item]:
        """Frames are the rows of the features, those of one video after those of the other."""
        frames = given["pixel_values_videos"].shape[1]
        length = features.shape[1]
        segments = (length,) * frames if per_frame else (length * frames,)
        item = Item(segments, _frame_lines(frames, length), True, square(length - 1), frames)
        return [item] * (len(features) // frames)


def _frame_lines(frames: int, length: int) -> np.ndarray:
    """Lines of frames whose first token is the class token, as `Layout.lines` codes them."""
    lines = np.repeat(np.arange(frames), length)
    lines[::length] = _CLASS_TOKEN - np.arange(frames)
    return lines
