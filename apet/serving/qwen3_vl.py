"""Qwen3-VL in vLLM: as Qwen2.5-VL, with the features that the first layers add, and frames between time stamps.

The features ("deepstack") are columns of the embeddings behind those of the token. They are no part of the choice, and
go or stay with their token. A video's frames are chosen from together, so how many tokens a frame keeps is known when
it is encoded; the engine is only told how many the video keeps. Time stamps and marks of the frames are therefore rows
of the embeddings too, as in vLLM's own pruning.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from apet.serving.counts import image_tokens, video_blocks
from apet.serving.mrope import KeepsPositions
from apet.serving.positions import extent, framed_extent, framed_positions, to_channels
from apet.serving.processing import KeyedProcessor, QwenInfo
from apet.serving.settings import served


class Info(QwenInfo, Qwen3VLProcessingInfo):
    """Knows the settings."""

    whole = Qwen3VLProcessingInfo


class Processor(KeyedProcessor, Qwen3VLMultiModalProcessor):
    """Fewer placeholders per picture, settings in the cache keys."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> list:
        config, hf_config = self.info.apet_config, self.info.get_hf_config()
        preset, merge = served(ApetQwen3VL.__name__).preset, hf_config.vision_config.spatial_merge_size**2

        def image(item: int) -> list[int]:
            grid = out_mm_kwargs["image"][item]["image_grid_thw"].data
            return [hf_config.image_token_id] * image_tokens(config, int(grid.prod()) // merge)

        def video(item: int) -> Any:
            fields = out_mm_kwargs["video"][item]
            steps, height, width = fields["video_grid_thw"].data.tolist()
            blocks, _, keep = video_blocks(config, preset, steps, height * width // merge)
            # All in the first frame: which frames they are from is known later, and so are the ids.
            return self.get_video_repl(
                tokens_per_frame=[blocks * keep] + [0] * (steps - 1),
                timestamps=fields["timestamps"].data,
                tokenizer=self.info.get_tokenizer(),
                vision_start_token_id=hf_config.vision_start_token_id,
                vision_end_token_id=hf_config.vision_end_token_id,
                video_token_id=hf_config.video_token_id,
            )

        _, videos = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [
            PromptReplacement("image", [hf_config.image_token_id], image),
            PromptReplacement("video", videos.target, video),
        ]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class ApetQwen3VL(KeepsPositions, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with compressed images and videos."""

    def choose(self, rows: Tensor, grid: tuple[int, int, int], video: bool) -> tuple[Tensor, Tensor]:
        kept, places = super().choose(rows[:, : self.visual_dim], grid, video)
        return torch.cat([kept, rows[places, self.visual_dim :]], dim=1), places

    def picture_spans(self, features: Sequence[Any]) -> tuple[list[tuple[int, int]], list[int]]:
        spans, extents = [], []
        for feature in features:
            spans.append((feature.mm_position.offset, feature.mm_position.length))
            grid = self.grid(feature.data[f"{feature.modality}_grid_thw"].data.tolist())
            if feature.modality == "image":
                extents.append(extent(grid, 1.0))
            else:
                extents.append(framed_extent(self._stamps(feature.data["timestamps"].data), grid[1:]))
        return spans, extents

    def _stamps(self, timestamps: Sequence[float]) -> list[int]:
        """Text tokens in front of the tokens of every frame: its time stamp, and the mark that a picture starts."""
        return [
            len(self._tokenizer.encode(f"<{stamp:.1f} seconds>", add_special_tokens=False)) + 1 for stamp in timestamps
        ]

    def _postprocess_video_embeds_evs(self, video_embeds_split: Sequence[Tensor], video_input: Any) -> tuple:
        output = []
        grids = map(self.grid, video_input["video_grid_thw"].tolist())
        for rows, grid, timestamps in zip(video_embeds_split, grids, video_input["timestamps"], strict=True):
            kept, places = self.choose(rows, grid, video=True)
            raster = grid[1] * grid[2]
            frames = [places[places // raster == frame] % raster for frame in range(grid[0])]
            positions = framed_positions(self._stamps(timestamps), grid[1:], [one.tolist() for one in frames])
            output.append(
                self._create_final_video_embeddings(
                    video_embeddings=kept,
                    num_tokens_per_frame=[len(one) for one in frames],
                    timestamps=timestamps,
                    video_grid_thw=grid,
                    retention_mask=positions,
                )
            )
        return tuple(output)

    def _get_expanded_positions(self, device: Any, retention_mask: Tensor, **kwargs: Any) -> Tensor:
        """The channels of a video's rows: vLLM appends what this returns."""
        return to_channels(retention_mask).to(device)
