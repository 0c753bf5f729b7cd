"""Qwen2.5-VL in vLLM: tokens are chosen behind the patch merger; the kept ones have their M-RoPE positions."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from apet.serving.counts import image_tokens, video_blocks
from apet.serving.mrope import KeepsPositions, with_positions
from apet.serving.positions import extent, grid_positions
from apet.serving.processing import KeyedProcessor, QwenInfo
from apet.serving.settings import served


class Info(QwenInfo, Qwen2_5_VLProcessingInfo):
    """Knows the settings."""

    whole = Qwen2_5_VLProcessingInfo


class Processor(KeyedProcessor, Qwen2_5_VLMultiModalProcessor):
    """Fewer placeholders per picture, settings in the cache keys."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> list:
        config, hf_config = self.info.apet_config, self.info.get_hf_config()
        preset, merge = served(ApetQwen2_5_VL.__name__).preset, hf_config.vision_config.spatial_merge_size**2
        ids = {"image": hf_config.image_token_id, "video": hf_config.video_token_id}

        def placeholders(modality: str, item: int) -> list[int]:
            steps, height, width = out_mm_kwargs[modality][item][f"{modality}_grid_thw"].data.tolist()
            if modality == "image":
                return [ids[modality]] * image_tokens(config, steps * height * width // merge)
            blocks, _, keep = video_blocks(config, preset, steps, height * width // merge)
            return [ids[modality]] * (blocks * keep)

        return [
            PromptReplacement(modality, [token], lambda item, modality=modality: placeholders(modality, item))
            for modality, token in ids.items()
        ]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class ApetQwen2_5_VL(KeepsPositions, Qwen2_5_VLForConditionalGeneration):  # noqa: N801 - the family's name
    """Qwen2.5-VL with compressed images and videos."""

    def picture_spans(self, features: Sequence[Any]) -> tuple[list[tuple[int, int]], list[int]]:
        spans = [(feature.mm_position.offset, feature.mm_position.length) for feature in features]
        return spans, [extent(grid, tempo) for _, *grid, tempo in self.iter_mm_grid_thw(features)]

    def _postprocess_video_embeds_evs(self, video_embeds_split: Sequence[Tensor], video_input: Any) -> tuple:
        grids = video_input["video_grid_thw"].tolist()
        seconds = video_input.get("second_per_grid_ts")
        seconds = [1.0] * len(grids) if seconds is None else seconds.flatten().tolist()
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        output = []
        for rows, patches, second in zip(video_embeds_split, grids, seconds, strict=True):
            grid = self.grid(patches)
            kept, places = self.choose(rows, grid, video=True)
            output.append(with_positions(kept, grid_positions(grid, second * per_second), places))
        return tuple(output)
