"""Qwen2.5-VL in vLLM: tokens are chosen behind the patch merger; the kept ones have their M-RoPE positions.

vLLM lets a model that prunes videos correct the positions it has laid out: the model appends channels with positions
to its embeddings, and `recompute_mrope_positions` reads them off when the embeddings enter the prompt. The same way
serves images here.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from apet.methods import selector
from apet.methods.base import Selector
from apet.serving.counts import image_tokens, video_blocks
from apet.serving.plugin import settings_of
from apet.serving.positions import (
    CHANNELS,
    extent,
    fill_marks,
    from_channels,
    grid_positions,
    prompt_positions,
    to_channels,
)
from apet.serving.processing import CompressedInfo, KeyedProcessor
from apet.serving.settings import image_selector, served


def _ask_for_positions_on_cpu() -> None:
    """Let vLLM's CPU backend ask for corrected positions, as its GPU backends do when they load a model."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.load_model

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.is_multimodal_pruning_enabled |= isinstance(self.get_model(), ApetQwen2_5_VL)

    CPUModelRunner.load_model = load_model


if current_platform.is_cpu():
    _ask_for_positions_on_cpu()


class Info(CompressedInfo, Qwen2_5_VLProcessingInfo):
    """Knows the settings."""


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
class ApetQwen2_5_VL(Qwen2_5_VLForConditionalGeneration):  # noqa: N801 - the family's name
    """Qwen2.5-VL with compressed images and videos."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        row = served(type(self).__name__)
        self._apet, self._preset = settings_of(self.config), row.preset
        self._select_image = image_selector(self._apet, row)
        self._select_frame = selector(self._apet, "vision", row.preset.frame, available=())

    # vLLM calls these two in place of its own pruning, with one tensor of embeddings (tokens, D) per picture.

    def _postprocess_image_embeds_evs(self, image_embeds_split: Sequence[Tensor], image_input: Any) -> tuple:
        output = []
        for rows, grid in zip(image_embeds_split, image_input["image_grid_thw"].tolist(), strict=True):
            keep = image_tokens(self._apet, len(rows))
            output.append(self._compressed(rows, (1, len(rows), keep), self._select_image, self._merged(grid), 1.0))
        return tuple(output)

    def _postprocess_video_embeds_evs(self, video_embeds_split: Sequence[Tensor], video_input: Any) -> tuple:
        grids = video_input["video_grid_thw"].tolist()
        seconds = video_input.get("second_per_grid_ts")
        seconds = [1.0] * len(grids) if seconds is None else seconds.flatten().tolist()
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        output = []
        for rows, grid, second in zip(video_embeds_split, grids, seconds, strict=True):
            blocks = video_blocks(self._apet, self._preset, grid[0], len(rows) // grid[0])
            select = self._select_image if blocks[0] == 1 else self._select_frame
            output.append(self._compressed(rows, blocks, select, self._merged(grid), second * per_second))
        return tuple(output)

    def _merged(self, grid: Sequence[int]) -> tuple[int, int, int]:
        """(time, height, width) in tokens."""
        merge = self.config.vision_config.spatial_merge_size
        return grid[0], grid[1] // merge, grid[2] // merge

    def _compressed(
        self, rows: Tensor, blocks: tuple[int, int, int], select: Selector, grid: tuple[int, int, int], tempo: float
    ) -> Tensor:
        """Kept rows (K, D) of a picture with the channels of their positions, (K, D + 8)."""
        number, length, keep = blocks
        positions = grid_positions(grid, tempo).to(rows.device)
        if keep < length:
            result = select(rows.view(number, length, -1), keep)
            first = torch.arange(number, device=rows.device).view(-1, 1) * length
            rows, positions = result.tokens.flatten(0, 1), positions[(result.indices + first).flatten()]
        return torch.cat([rows, to_channels(positions).to(rows.dtype)], dim=1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """Positions (3, L) of a prompt: those of text are final, a picture's columns are marked."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        spans = [(feature.mm_position.offset, feature.mm_position.length) for feature in features]
        extents = [extent(grid, tempo) for _, *grid, tempo in self.iter_mm_grid_thw(features)]
        positions, end = prompt_positions(len(input_tokens), spans, extents)
        # The first model runner writes filled positions into this tensor; the second one copies it for every prefill.
        positions.apet_marks = positions.clone()
        return positions, end - len(input_tokens)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Embeddings without their channels, and the positions (3, L) with those of the pictures written in."""
        marks = getattr(mrope_positions, "apet_marks", mrope_positions)
        rows = [one[:, :-CHANNELS] for one in multimodal_embeddings]
        offsets = [from_channels(one[:, -CHANNELS:]).to(marks.device) for one in multimodal_embeddings]
        with gpu_sync_allowed():
            positions, end = fill_marks(mrope_positions, marks, num_computed_tokens, offsets)
        return rows, positions, end - marks.shape[1]
