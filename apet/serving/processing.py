"""What the models' multimodal processors share in vLLM: settings, counts of tokens, keys of cached pictures."""

from collections.abc import Mapping
from typing import Any

from apet.config import ApetConfig
from apet.serving import metrics
from apet.serving.counts import image_tokens
from apet.serving.plugin import settings_of
from apet.serving.settings import cache_key


class CompressedInfo:
    """Mix-in for a processing info: knows the settings.

    Attributes:
        whole: vLLM's own info, which counts without compression.
    """

    whole: type

    @property
    def apet_config(self) -> ApetConfig:
        """The settings of the engine."""
        return settings_of(self.ctx.get_hf_config())

    def picture_tokens(self, width: int, height: int) -> tuple[int, int]:
        """Tokens of a picture of so many pixels before and after compression, newlines included."""
        return self.counted(self.whole(self.ctx), width, height), self.counted(self, width, height)

    def counted(self, info: Any, width: int, height: int) -> int:
        """Tokens that a processing info, this or the whole one, gives a picture."""
        return info.get_num_image_tokens(image_width=width, image_height=height)


class MeasuredInfo(CompressedInfo):
    """Mix-in for a processing info that counts compressed tokens; what the encoder makes of a picture stays whole."""

    def get_image_size_with_most_features(self) -> Any:
        return self.whole(self.ctx).get_image_size_with_most_features()

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        """Tokens the encoder makes of the largest picture: vLLM measures its memory with a batch of as many as fit."""
        return {"image": self.whole(self.ctx).get_max_image_tokens()}


class QwenInfo(CompressedInfo):
    """Mix-in for the processing info of a Qwen model, which counts what the encoder makes."""

    def counted(self, info: Any, width: int, height: int) -> int:
        size = {"image_width": width, "image_height": height}
        total = info.get_num_image_tokens(**size, image_processor=info.get_image_processor(), mm_kwargs={})
        return image_tokens(self.apet_config, total) if info is self else total


class KeyedProcessor:
    """Mix-in for a multimodal processor: cached images are told apart by their settings, client-named ones too."""

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        key = cache_key(self.info.apet_config)
        return {
            modality: [f"{one}-apet-{key}" for one in hashes]
            for modality, hashes in super()._get_mm_hashes(inputs).items()
        }

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        output = super().apply(inputs, timing_ctx)
        metrics.count(self.info, inputs.mm_data_items, output["mm_placeholders"])
        return output
