"""LLaVA-OneVision in vLLM: tokens are chosen behind the projector, from the picture that vLLM makes of the tiles.

A budget is for the whole image. Newlines are no candidates and all stay, as in LLaVA-NeXT.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageEmbeddingInputs,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from apet.serving.chooser import Chooser
from apet.serving.counts import image_tokens, video_blocks
from apet.serving.processing import KeyedProcessor, MeasuredInfo
from apet.serving.settings import served
from apet.serving.tiles import NEWLINE, arranged

_merge = partial(LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings, image_newline=NEWLINE)


def newlines(config: Any, height: int, width: int) -> np.ndarray:
    """(T,) bool: which tokens of an image of this size are newlines.

    Args:
        config: The checkpoint's config.
        height: Pixels.
        width: Pixels.
    """
    return arranged(_merge, config, height, width)[1] < 0


class Info(MeasuredInfo, LlavaOnevisionProcessingInfo):
    """Images and videos of fewer tokens."""

    whole = LlavaOnevisionProcessingInfo

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        lines = newlines(self.get_hf_config(), image_height, image_width)
        return image_tokens(self.apet_config, int((~lines).sum())) + int(lines.sum())

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        video = self.whole(self.ctx).get_max_video_tokens(seq_len, mm_counts)
        return super().get_mm_max_tokens_per_item(seq_len, mm_counts) | {"video": video}

    def get_num_frames_with_most_features(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        # A clip of any length may take as many tokens as its budget.
        return self.whole(self.ctx).get_num_frames_with_most_features(seq_len, mm_counts)

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        per_frame = self._get_num_frame_tokens(image_width=image_width, image_height=image_height)
        preset = served(ApetLlavaOnevision.__name__).preset
        blocks, _, keep = video_blocks(self.apet_config, preset, num_frames, per_frame)
        return blocks * keep + 1


class Processor(KeyedProcessor, LlavaOnevisionMultiModalProcessor):
    """Settings in the cache keys."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaOnevisionDummyInputsBuilder)
class ApetLlavaOnevision(LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with compressed images and videos; images given as embeddings stay as they are."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._chooser = Chooser(self)

    def _process_image_input(self, image_input: Any) -> Any:
        features = super()._process_image_input(image_input)
        if isinstance(image_input, LlavaOnevisionImageEmbeddingInputs):
            return features
        sizes = image_input["image_sizes"].tolist()
        return [self._kept_image(rows, size) for rows, size in zip(features, sizes, strict=True)]

    def _process_video_pixels(self, inputs: Any) -> Any:
        videos = super()._process_video_pixels(inputs)
        frames = [len(video) for video in inputs["pixel_values_videos"]]
        return [self._kept_video(rows, steps) for rows, steps in zip(videos, frames, strict=True)]

    def _kept_image(self, rows: torch.Tensor, size: list[int]) -> torch.Tensor:
        """The kept rows of an image (T, D) and all its newlines, in their order."""
        lines = torch.from_numpy(newlines(self.config, *size)).to(rows.device)
        tokens, places = (~lines).nonzero().flatten(), lines.nonzero().flatten()
        raster = None
        if len(places) == 1:  # one tile
            raster = [self.config.vision_config.image_size // self.config.vision_config.patch_size] * 2
        kept, numbers = self._chooser.image(rows[tokens], raster)
        order = torch.cat([tokens[numbers], places]).argsort()
        return torch.cat([kept, rows[places]])[order]

    def _kept_video(self, rows: torch.Tensor, frames: int) -> torch.Tensor:
        """The kept rows of a video (1, T, D) or (T, D), and the newline at its end."""
        rows = rows.flatten(0, -2)
        side = round(((len(rows) - 1) // frames) ** 0.5)
        kept, _ = self._chooser.video(rows[:-1], (frames, side, side))
        return torch.cat([kept, rows[-1:]])
