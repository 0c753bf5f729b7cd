"""LLaVA-NeXT in vLLM: crops are compressed one by one, and vLLM arranges them as it always does."""

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

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

from apet.adapters import host
from apet.adapters.vision import ImageLayout, ImageRecord
from apet.serving.counts import tiled_image_tokens
from apet.serving.llava import attach_vision_stage
from apet.serving.processing import KeyedProcessor, MeasuredInfo


@lru_cache(maxsize=4096)
def _layout(height: int, width: int, pinpoints: tuple, image_size: int, patch_size: int) -> ImageLayout:
    """As `image_layout`, of plain numbers."""
    rows = (image_size // patch_size) ** 2
    crops = host.crops_of((height, width), [list(pair) for pair in pinpoints], image_size)
    # vLLM's own function arranges the numbers of the rows; the newline is -1.
    vision = SimpleNamespace(image_size=image_size, patch_size=patch_size)
    config = SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in pinpoints], vision_config=vision)
    base = SimpleNamespace(config=config, image_newline=torch.tensor([-1.0], dtype=torch.float64))
    numbers = torch.arange(crops * rows, dtype=torch.float64).view(crops, rows, 1)
    merge = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
    columns = merge(base, torch.tensor([height, width]), numbers, strategy="spatial_unpad")
    return ImageLayout(crops, rows, columns.flatten().long().numpy())


def image_layout(config: Any, height: int, width: int) -> ImageLayout:
    """How vLLM arranges the crops of an image of this size.

    Args:
        config: The checkpoint's config.
        height: Pixels.
        width: Pixels.
    """
    pinpoints = tuple(map(tuple, config.image_grid_pinpoints))
    return _layout(height, width, pinpoints, config.vision_config.image_size, config.vision_config.patch_size)


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
