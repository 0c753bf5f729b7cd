"""LLaVA-NeXT (1.6): an image is an overview and tiles, arranged as one picture with a newline token per row."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apet.adapters import host
from apet.adapters.base import InstanceAttribute, Removable, register
from apet.adapters.llava import Llava
from apet.adapters.vision import ImageLayout, VisionStage


@register
class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration`. Its `get_image_features` is wrapped: only it sees the image sizes."""

    family = "llava_next"
    model_types = ("llava_next",)
    classes = ("LlavaNextForConditionalGeneration",)
    proof = ("tests/test_patch_llava_next.py",)
    single_crop = False

    def attach_encoder(self, vision: VisionStage) -> list[Removable]:
        """Tell the vision stage, before each encoding, how the crops will be arranged."""
        base = self.base_model
        original = base.get_image_features

        # generate() reads the signature to decide which inputs to hand over.
        @functools.wraps(original)
        def announced(pixel_values: Tensor, image_sizes: Tensor, *args: Any, **kwargs: Any) -> Any:
            with vision.expecting(self._layouts(image_sizes)):
                return original(pixel_values, image_sizes, *args, **kwargs)

        base.get_image_features = announced
        return [InstanceAttribute(base, "get_image_features")]

    def _layouts(self, image_sizes: Tensor | Sequence[Sequence[int]]) -> list[ImageLayout]:
        """Layout of every image, read off by letting the host arrange the numbers of the rows (newline: -1)."""
        config = self.model.config
        vision = config.vision_config
        rows = (vision.image_size // vision.patch_size) ** 2
        strategy = config.vision_feature_select_strategy
        rows += strategy == "full"
        layouts = []
        for size in torch.as_tensor(image_sizes).tolist():
            crops = host.crops_of(size, config.image_grid_pinpoints, vision.image_size)
            numbers = torch.arange(crops * rows, dtype=torch.float64).view(crops, rows, 1)
            newline = torch.tensor([-1.0], dtype=torch.float64)
            columns = host.packed(self.base_model, numbers, size, newline, vision_feature_select_strategy=strategy)
            layouts.append(ImageLayout(crops, rows, columns.flatten().long().numpy()))
        return layouts
