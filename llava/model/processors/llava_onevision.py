"""LLaVA-OneVision: one image as an overview and tiles, several images and the frames of videos as a tile each."""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaOnevisionImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from llava.model.processors.base import Clip, Encoded, FamilyProcessor, Inputs


class LlavaOnevisionProcessor(FamilyProcessor):
    """Prompts by the checkpoint's chat template."""

    image_processor_class = LlavaOnevisionImageProcessorPil

    @property
    def fewest_tokens(self) -> int:
        """Visual tokens of the overview, the least that an image has."""
        return self._side**2

    def encode_images(self, images: Sequence[Image.Image]) -> Encoded:
        """Each marker becomes placeholders for the overview and unpadded tiles, whose lines end in newline tokens."""
        given = self.image_processor(images=[list(images)], return_tensors="pt")
        sizes = given["image_sizes"].tolist()
        counts = [self._tiled(*size) for size in sizes] if len(images) == 1 else [self._side**2 + 1] * len(images)
        strip = self.config.vision_feature_select_strategy == "default"
        runs = [self.placeholder(False) * (count - strip) for count in counts]
        return Encoded(runs, {"pixel_values": given["pixel_values"], "image_sizes": given["image_sizes"]})

    def encode_clip(self, clip: Clip) -> Encoded:
        """Frames are squeezed into the square of a tile, and their tokens are pooled two by two."""
        side = self.config.vision_config.image_size
        frames = [frame.resize((side, side), Image.Resampling.BICUBIC) for frame in clip.frames]
        pixels = self.image_processor(images=[frames], return_tensors="pt")["pixel_values"][:, 0]
        pooled = math.ceil(self._side / 2) ** 2
        run = self.placeholder(True) * (len(frames) * pooled + 1)
        return Encoded([run], {"pixel_values_videos": pixels[None]})

    def join(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """Images of fewer tiles are filled up; the model knows their number from `image_sizes`."""
        if name != "pixel_values":
            return super().join(name, values)
        tiles = max(value.shape[1] for value in values)
        blank = [value.new_zeros(len(value), tiles - value.shape[1], *value.shape[2:]) for value in values]
        return torch.cat([torch.cat(pair, dim=1) for pair in zip(values, blank, strict=True)])

    def batch_inputs(self, rows: Sequence[Inputs]) -> dict[str, Tensor]:
        """How many images each prompt shows."""
        counts = [row.pictures if "image_sizes" in row.tensors else 0 for row in rows]
        return {"batch_num_images": torch.tensor(counts)} if any(counts) else {}

    @property
    def _side(self) -> int:
        """Tokens along the side of a tile."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def _tiled(self, height: int, width: int) -> int:
        """Tokens of a single image of this size."""
        pixels = self.config.vision_config.image_size
        best = select_best_resolution((height, width), self.image_processor.image_grid_pinpoints)
        rows, columns = (length // pixels * self._side for length in best)
        if width / height > columns / rows:  # padded above and below
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self._side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return self._side**2 + rows * (columns + 1)
