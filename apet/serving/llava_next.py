"""LLaVA-NeXT in vLLM: crops are compressed one by one, and vLLM arranges them as it always does."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextImageEmbeddingInputs,
    LlavaNextImagePixelInputs,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from apet.adapters.vision import ImageLayout, ImageRecord
from apet.serving.counts import tiled_image_tokens
from apet.serving.llava import attach_vision_stage
from apet.serving.processing import KeyedProcessor, MeasuredInfo
from apet.serving.tiles import arranged


def image_layout(config: Any, height: int, width: int) -> ImageLayout:
    """How vLLM arranges the crops of an image of this size.

    Args:
        config: The checkpoint's config.
        height: Pixels.
        width: Pixels.
    """
    merge = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
    crops, columns = arranged(merge, config, height, width)
    rows = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return ImageLayout(crops, rows, columns.astype(np.int64))


class Info(MeasuredInfo, LlavaNextProcessingInfo):
    """An image of fewer tokens."""

    whole = LlavaNextProcessingInfo

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return tiled_image_tokens(self.apet_config, image_layout(self.get_hf_config(), image_height, image_width))


class Processor(KeyedProcessor, LlavaNextMultiModalProcessor):
    """Settings in the cache keys."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class ApetLlavaNext(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with compressed images; images given as embeddings stay as they are."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._vision_stage = attach_vision_stage(self)

    def _process_image_input(self, image_input: Any) -> Any:
        if isinstance(image_input, LlavaNextImageEmbeddingInputs):
            return super()._process_image_input(image_input)
        sizes = image_input["image_sizes"].tolist()
        layouts = [image_layout(self.config, height, width) for height, width in sizes]
        # Images processed together are padded to equally many crops; the empty ones are left out.
        pixels = [one[: layout.crops] for one, layout in zip(image_input["pixel_values"], layouts, strict=True)]
        trimmed = LlavaNextImagePixelInputs(
            type="pixel_values", pixel_values=pixels, image_sizes=image_input["image_sizes"]
        )
        with self._vision_stage.encoding(layouts) as encoding:
            features = super()._process_image_input(trimmed)
        return tuple(map(_kept, features, encoding.records))


def _kept(rows: torch.Tensor, record: ImageRecord) -> torch.Tensor:
    """The kept rows of an image and all its newlines."""
    columns = replace(record, all_newlines=True).kept_columns()
    return rows[torch.from_numpy(columns).to(rows.device)]
