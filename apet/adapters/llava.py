"""LLaVA-1.5 and LLaVA-NeXT (1.6), compressed before the projector.

LLaVA-1.5 shows one CLIP image of constant length per run of placeholders; in LLaVA-NeXT an image is an overview and
tiles, arranged as one picture with a newline token per row.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from apet.adapters import host
from apet.adapters.base import Adapter, UsualImage, register
from apet.adapters.vision import ImageLayout


@register
class Llava(Adapter):
    """`LlavaForConditionalGeneration` and its subclasses."""

    family = "llava"
    model_types = ("llava",)
    classes = ("LlavaForConditionalGeneration",)
    proof = ("tests/test_patch_reference.py",)
    tower_modes = ("merge", "restore", "lossless")

    @property
    def projector(self) -> nn.Module:
        """The two-layer projector: rows are mapped one by one, so only kept rows need to pass through it."""
        return self.base_model.multi_modal_projector

    @property
    def towers(self) -> list[nn.Module]:
        """CLIP, or whatever the checkpoint has instead."""
        return [self.base_model.vision_tower]

    @property
    def crop_tokens(self) -> int:
        """The tower's patches, and its class token with the strategy "full"."""
        config = self.model.config
        vision = config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")

    @property
    def single_crop(self) -> bool:
        """Original 1.6 checkpoints are loaded into this class too; their images are several crops."""
        return getattr(self.model.config, "image_aspect_ratio", None) != "anyres"

    @property
    def usual_image(self) -> UsualImage:
        """The tower's size; four tiles and the overview, with a newline per row of patches, where there are crops."""
        vision, count = self.model.config.vision_config, self.crop_tokens
        if self.single_crop:
            return UsualImage(f"one image of {vision.image_size} x {vision.image_size} pixels", count)
        side, lines = 2 * vision.image_size, 2 * (vision.image_size // vision.patch_size)
        return UsualImage(f"one image of {side} x {side} pixels in 5 crops", 5 * count, 5, lines)


@register
class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration`."""

    family = "llava_next"
    model_types = ("llava_next",)
    classes = ("LlavaNextForConditionalGeneration",)
    proof = ("tests/test_patch_llava_next.py",)
    single_crop = False

    def crop_layouts(self, given: Mapping[str, Any]) -> list[ImageLayout]:
        """Layout of every image, read off by letting the host arrange the numbers of the rows (newline: -1)."""
        config, rows = self.model.config, self.crop_tokens
        strategy = config.vision_feature_select_strategy
        layouts = []
        for size in torch.as_tensor(given["image_sizes"]).tolist():
            crops = host.crops_of(size, config.image_grid_pinpoints, config.vision_config.image_size)
            numbers = torch.arange(crops * rows, dtype=torch.float64).view(crops, rows, 1)
            newline = torch.tensor([-1.0], dtype=torch.float64)
            columns = host.packed(self.base_model, numbers, size, newline, vision_feature_select_strategy=strategy)
            layouts.append(ImageLayout(crops, rows, columns.flatten().long().numpy()))
        return layouts
