"""What the models' multimodal processors share in vLLM: settings in the processing info, settings in the cache keys."""

from collections.abc import Mapping
from typing import Any

from apet.config import ApetConfig
from apet.serving.plugin import settings_of
from apet.serving.settings import cache_key


class CompressedInfo:
    """Mix-in for a processing info: knows the settings."""

    @property
    def apet_config(self) -> ApetConfig:
        """The settings of the engine."""
        return settings_of(self.ctx.get_hf_config())


class MeasuredInfo(CompressedInfo):
    """Mix-in for a processing info that counts compressed tokens; what the encoder makes of a picture stays whole.

    Attributes:
        whole: vLLM's own info, which counts without compression.
    """

    whole: type

    def get_image_size_with_most_features(self) -> Any:
        return self.whole(self.ctx).get_image_size_with_most_features()

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        """Tokens the encoder makes of the largest picture: vLLM measures its memory with a batch of as many as fit."""
        return {"image": self.whole(self.ctx).get_max_image_tokens()}


class KeyedProcessor:
    """Mix-in for a multimodal processor: cached images are told apart by their settings, client-named ones too."""

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        key = cache_key(self.info.apet_config)
        return {
            modality: [f"{one}-apet-{key}" for one in hashes]
            for modality, hashes in super()._get_mm_hashes(inputs).items()
        }
