"""InternVL (its Hugging Face classes) in vLLM: an image is a run of tiles, and every tile keeps as many tokens.

A video is a frame per tile.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from apet.serving.chooser import Chooser
from apet.serving.counts import image_tokens
from apet.serving.processing import KeyedProcessor, MeasuredInfo


class Info(MeasuredInfo, InternS1ProcessingInfo):
    """Tiles of fewer tokens."""

    whole = InternS1ProcessingInfo

    def get_hf_processor(self, **kwargs: object) -> Any:
        # The processor is shared, and so is everything else about it.
        processor = copy.copy(super().get_hf_processor(**kwargs))
        processor.image_seq_length = image_tokens(self.apet_config, processor.image_seq_length)
        return processor

    def counted(self, info: Any, width: int, height: int) -> int:
        return info.get_num_image_tokens(
            image_width=width, image_height=height, processor=info.get_hf_processor(), mm_kwargs={}
        )

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        whole = self.whole(self.ctx)
        frames = whole.get_num_frames_with_most_features(seq_len, mm_counts)
        per_frame = whole.get_hf_processor().image_seq_length
        return super().get_mm_max_tokens_per_item(seq_len, mm_counts) | {"video": frames * per_frame}


class Processor(KeyedProcessor, InternS1MultiModalProcessor):
    """Settings in the cache keys."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=InternS1DummyInputsBuilder)
class ApetInternVL(InternS1ForConditionalGeneration):
    """InternVL with compressed tiles; pictures given as embeddings stay as they are."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._chooser = Chooser(self)

    def _process_vision_input(self, image_input: Any) -> tuple[torch.Tensor, ...]:
        features = super()._process_vision_input(image_input)
        if image_input["type"].endswith("_embeds"):
            return features
        output = []
        for rows, tiles in zip(features, image_input["num_patches"].tolist(), strict=True):
            side = round((len(rows) // tiles) ** 0.5)
            output.append(self._chooser.image(rows, (side, side), tiles)[0])
        return tuple(output)
