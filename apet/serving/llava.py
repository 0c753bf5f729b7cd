"""LLaVA-1.5 in vLLM: tokens are chosen in front of the projector, which maps the kept ones alone."""

from typing import Any

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaImageEmbeddingInputs,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from apet.adapters.vision import ImageRecord, VisionStage
from apet.serving.counts import image_tokens
from apet.serving.plugin import settings_of
from apet.serving.processing import KeyedProcessor, MeasuredInfo
from apet.serving.settings import image_selector, served


def attach_vision_stage(model: Any) -> VisionStage:
    """The vision stage of the transformers patch around the projector of a vLLM model."""
    config = settings_of(model.config)
    select = image_selector(config, served(type(model).__name__))
    stage = VisionStage(
        model.multi_modal_projector, config.stage_budgets[0], select, per_image=config.budget_per == "image"
    )
    stage.attach()
    return stage


class Info(MeasuredInfo, LlavaProcessingInfo):
    """An image of fewer tokens."""

    whole = LlavaProcessingInfo

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        total = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return image_tokens(self.apet_config, total)


class Processor(KeyedProcessor, LlavaMultiModalProcessor):
    """Settings in the cache keys."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class ApetLlava(LlavaForConditionalGeneration):
    """LLaVA-1.5 with compressed images; images given as embeddings stay as they are."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._vision_stage = attach_vision_stage(self)

    def _process_image_input(self, image_input: Any) -> Any:
        if isinstance(image_input, LlavaImageEmbeddingInputs):
            return super()._process_image_input(image_input)
        with self._vision_stage.encoding() as encoding:
            features = super()._process_image_input(image_input)
        return tuple(map(_kept, features, encoding.records))


def _kept(rows: torch.Tensor, record: ImageRecord) -> torch.Tensor:
    """The kept rows of an image of one crop."""
    return rows if record.kept is None else rows[record.kept[0]]
