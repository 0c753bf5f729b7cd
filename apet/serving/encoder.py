"""The encoder's budget, counted in what the encoder does.

vLLM bounds the pictures that it encodes in one step by their tokens in the prompt. Compressed pictures take few there
and cost the encoder as much as ever, so a step could encode any number of them. This manager of the encoder cache
counts the tokens that the encoder makes before compression, and lets as many pass in a step as vLLM would without ApET
(`max_num_batched_tokens`; one picture at least).
"""

import math
from typing import Any

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

PIXELS = "pixel_values"


class EncoderBudget(EncoderCacheManager):
    """`ec_manager_config.encoder_cache_manager_cls`: says no to a picture that is too much for this step's encoder."""

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: Any) -> "EncoderBudget":
        manager = cls(cache_size)
        manager._limit = vllm_config.scheduler_config.max_num_encoder_input_tokens
        manager._token = values_per_token(vllm_config.model_config.hf_config)
        return manager

    def __init__(self, cache_size: int) -> None:
        super().__init__(cache_size)
        # Tokens of pictures that this step encodes, and of those of the request under consideration.
        self._spent = self._asked = 0

    def can_allocate(
        self, request: Any, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        if num_embeds_to_schedule == 0:  # the first one of a request
            self._asked = 0
        work, before = self._work(request.mm_features[input_id]), self._spent + self._asked
        if before and before + work > self._limit:
            return False
        if not super().can_allocate(request, input_id, encoder_compute_budget, num_embeds_to_schedule):
            return False
        self._asked += work
        return True

    def allocate(self, request: Any, input_id: int) -> None:
        super().allocate(request, input_id)
        self._spent += self._work(request.mm_features[input_id])

    def get_freed_mm_hashes(self) -> list[str]:
        """Called once, when a step is complete."""
        self._spent = self._asked = 0
        return super().get_freed_mm_hashes()

    def reset(self) -> None:
        super().reset()
        self._spent = self._asked = 0

    def _work(self, feature: Any) -> int:
        """Tokens that the encoder makes of a picture or video."""
        fields = feature.data or {}
        pixels = [_numel(one.data) for name, one in fields.items() if name.startswith(PIXELS)]
        if pixels:
            return math.ceil(sum(pixels) / self._token)
        # Embeddings cost nothing. What lies in shared memory is not seen here: such a picture gets a step of its own.
        return 0 if any(name.endswith("_embeds") for name in fields) else self._limit


def values_per_token(hf_config: Any) -> int:
    """Pixel values behind one token of a checkpoint's encoder: channels x patch x frames x merged patches."""
    vision = hf_config.vision_config
    patch = vision.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    merged = getattr(vision, "spatial_merge_size", 1) ** 2 / getattr(hf_config, "downsample_ratio", 1) ** 2
    channels = getattr(vision, "in_channels", getattr(vision, "num_channels", 3))
    return round(channels * height * width * getattr(vision, "temporal_patch_size", 1) * merged)


def _numel(pixels: Any) -> int:
    """Values of a tensor, or of a list of tensors."""
    return pixels.numel() if hasattr(pixels, "numel") else sum(map(_numel, pixels))
