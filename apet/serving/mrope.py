"""What the Qwen models share in vLLM: embeddings that bring their M-RoPE positions into the prompt.

vLLM lets a model that prunes videos correct the positions it has laid out: the model appends channels with positions
to its embeddings, and `recompute_mrope_positions` reads them off when the embeddings enter the prompt. The same way
serves images here. Positions are those of the whole prompt ("keep").
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from apet.serving.chooser import Chooser
from apet.serving.positions import CHANNELS, fill_marks, from_channels, grid_positions, prompt_positions, to_channels


class KeepsPositions:
    """Mix-in for a model: its images are compressed, and kept tokens have their original positions."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._chooser = Chooser(self)

    def picture_spans(self, features: Sequence[Any]) -> tuple[list[tuple[int, int]], list[int]]:
        """(first column, columns) and positions taken of a prompt's pictures, in order."""
        raise NotImplementedError

    def grid(self, patches: Sequence[int]) -> tuple[int, int, int]:
        """(time, height, width) in tokens of a picture's patches."""
        merge = self.config.vision_config.spatial_merge_size
        return patches[0], patches[1] // merge, patches[2] // merge

    # vLLM calls this in place of its own pruning, with one tensor of embeddings (tokens, D) per picture.
    def _postprocess_image_embeds_evs(self, image_embeds_split: Sequence[Tensor], image_input: Any) -> tuple:
        output = []
        for rows, patches in zip(image_embeds_split, image_input["image_grid_thw"].tolist(), strict=True):
            grid = self.grid(patches)
            kept, places = self.choose(rows, grid, video=False)
            output.append(with_positions(kept, grid_positions(grid, 1.0), places))
        return tuple(output)

    def choose(self, rows: Tensor, grid: tuple[int, int, int], video: bool) -> tuple[Tensor, Tensor]:
        """Kept rows (K, D) of a picture (tokens, D), and their numbers (K,)."""
        return self._chooser.video(rows, grid) if video else self._chooser.image(rows, grid[1:])

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """Positions (3, L) of a prompt: those of text are final, a picture's columns are marked."""
        spans, extents = self.picture_spans(sorted(mm_features, key=lambda feature: feature.mm_position.offset))
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


def with_positions(rows: Tensor, positions: Tensor, places: Tensor) -> Tensor:
    """Rows (K, D) and the channels of their positions, those at `places` (K,) of (tokens, 3), as (K, D + CHANNELS)."""
    return torch.cat([rows, to_channels(positions).to(rows)[places]], dim=1)


def _ask_for_positions_on_cpu() -> None:
    """Let vLLM's CPU backend ask for corrected positions, as its GPU backends do when they load a model."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.load_model

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.is_multimodal_pruning_enabled |= isinstance(self.get_model(), KeepsPositions)

    CPUModelRunner.load_model = load_model


if current_platform.is_cpu():
    _ask_for_positions_on_cpu()
