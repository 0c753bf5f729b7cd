"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures in their own size, as patches that are merged two by two."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from apet import ApetConfig
from apet.config import FAMILY_PRESETS
from apet.serving.counts import video_blocks
from llava.model.processors.base import Clip, Encoded, FamilyProcessor, Limits, kept_counts

# Visual tokens of an image in the published evaluation, and of what its image loader lets through to that.
TOKENS = (256, 2048)
_LOADED_TOKENS = (4, 16384)
# Visual tokens of a frame pair (Qwen3-VL: of two frames) where the checkpoint does not say.
_FRAME_TOKENS = (128, 768)


class QwenVLProcessor(FamilyProcessor):
    """Qwen2-VL. Images are resized twice, as in the published evaluation: when loaded, and by the image processor."""

    image_processor_class = Qwen2VLImageProcessorPil
    typed, sized = True, True
    timed: ClassVar[bool] = False

    @property
    def factor(self) -> int:
        """Pixels along the side of the square that a visual token stands for."""
        return self.image_processor.patch_size * self.image_processor.merge_size

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest image, in pixels."""
        return self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]

    def limit(self, limits: Limits) -> None:
        """Set the smallest and the largest image; where nothing is asked for, they have 256 and 2048 visual tokens."""
        low, high = (count * self.factor**2 for count in TOKENS)
        low, high = limits.min_pixels or min(low, limits.max_pixels or low), limits.max_pixels or high
        self.image_processor.size = {"shortest_edge": low, "longest_edge": max(low, high)}

    @property
    def fewest_tokens(self) -> int:
        """Visual tokens of the smallest image."""
        return math.ceil(self.limits[0] / self.factor**2)

    def encode_images(self, images: Sequence[Image.Image]) -> Encoded:
        """Each marker becomes a run of placeholders, one for each merged patch of its image."""
        low, high = (count * self.factor**2 for count in _LOADED_TOKENS)
        loaded = [_resized(image, smart_resize(image.height, image.width, self.factor, low, high)) for image in images]
        given = self.image_processor(images=loaded, return_tensors="pt")
        grid = given["image_grid_thw"]
        runs = [self.placeholder(False) * count for count in self._merged(grid)]
        return Encoded(runs, {"pixel_values": given["pixel_values"], "image_grid_thw": grid})

    def encode_clip(self, clip: Clip) -> Encoded:
        """Frames are laid out two by two; the last one is repeated where their number is odd."""
        frames = [*clip.frames, *clip.frames[-1:] * (len(clip.frames) % 2)]
        size = self.frame_size(len(frames), frames[0].height, frames[0].width)
        given = self.image_processor(
            images=[_resized(frame, size) for frame in frames], do_resize=False, return_tensors="pt"
        )
        _, rows, columns = given["image_grid_thw"][0].tolist()
        # The image processor shows every picture twice in a patch; a video shows two frames.
        patches = given["pixel_values"].unflatten(0, (len(frames) // 2, 2, rows * columns))
        patches = patches.unflatten(-1, (3, 2, self.image_processor.patch_size**2))
        pairs = torch.stack([patches[:, 0, :, :, 0], patches[:, 1, :, :, 1]], dim=3)
        grid = torch.tensor([[len(frames) // 2, rows, columns]])
        tensors = {"pixel_values_videos": pairs.flatten(2).flatten(0, 1), "video_grid_thw": grid}
        if self.timed:
            tensors["second_per_grid_ts"] = torch.tensor([2 * clip.seconds / len(clip.frames)])
        return Encoded([self.clip_text(clip, self._merged(grid)[0])], tensors)

    def decoder_tokens(self, compression: ApetConfig, visual: Sequence[int], frames: int | None) -> int:
        """Tokens are counted, not positions: M-RoPE counts the side of a picture, not its area."""
        if frames is None:
            return sum(kept_counts(compression, visual))
        steps = -(-frames // 2)
        preset = FAMILY_PRESETS[self.config.model_type]
        blocks, _, kept = video_blocks(compression, preset, steps, sum(visual) // steps)
        return blocks * kept

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which frames are resized, between the limits of the checkpoint's video processor."""
        low, high = self.video_limits
        return smart_resize(height, width, self.factor, low, high)

    def clip_text(self, clip: Clip, tokens: int) -> str:
        """What replaces the marker of a video."""
        return self.placeholder(True) * tokens

    @property
    def video_limits(self) -> tuple[int, int]:
        """Smallest and largest frame in pixels, as the checkpoint has them."""
        given = self.files.get("video_preprocessor_config.json")
        if given is None:
            given = self.files.get("processor_config.json", {}).get("video_processor", {})
        size = given.get("size") or {}
        names = (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
        known = [size.get(edge) or given.get(pixels) for edge, pixels in names]
        low, high = (one or count * self.factor**2 for one, count in zip(known, _FRAME_TOKENS, strict=True))
        return low, high

    def settings(self) -> dict[str, Any]:
        """What can change an answer, the limits of images and frames among it."""
        return super().settings() | {"image_pixels": list(self.limits), "frame_pixels": list(self.video_limits)}

    def _merged(self, grid: torch.Tensor) -> list[int]:
        """Visual tokens of each row of a grid."""
        return (grid.prod(1) // self.image_processor.merge_size**2).tolist()


class Qwen25VLProcessor(QwenVLProcessor):
    """Qwen2.5-VL: the positions of a video's tokens follow its time."""

    timed = True


class Qwen3VLProcessor(QwenVLProcessor):
    """Qwen3-VL: the time of every pair of frames stands in the text, and limits of videos are for all frames.

    As at the model's release the times replace the marker with its brackets (transformers 5.23 leaves a second pair of
    brackets around them).
    """

    def marker(self, video: bool) -> str:
        """What stands for a picture in a rendered prompt; the marker of a video includes the brackets around it."""
        alone = super().marker(video)
        return f"{self._start}{alone}{self._end}" if video else alone

    def clip_text(self, clip: Clip, tokens: int) -> str:
        """What replaces the marker of a video: for every pair of frames, its time and its placeholders."""
        times = [*clip.times, *clip.times[-1:] * (len(clip.times) % 2)]
        pairs = [(first + second) / 2 for first, second in zip(times[::2], times[1::2], strict=True)]
        shown = self.placeholder(True) * (tokens // len(pairs))
        return "".join(f"<{seconds:.1f} seconds>{self._start}{shown}{self._end}" for seconds in pairs)

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which frames are resized; the limits are for the pixels of all frames together."""
        low, high = self.video_limits
        scale = max(1.0, self.factor / height, self.factor / width)
        height, width = int(height * scale), int(width * scale)
        return smart_resize(height, width, self.factor, math.ceil(low / frames), high // frames)

    @property
    def _start(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.config.vision_start_token_id)

    @property
    def _end(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.config.vision_end_token_id)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in (height, width)."""
    return image.resize(size[::-1], Image.Resampling.BICUBIC)
