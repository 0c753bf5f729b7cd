"""ApET: approximation-error guided compression of visual tokens for vision-language models."""

from apet.adapters.vision import ImageLayout
from apet.compressor import compress
from apet.config import ApetConfig
from apet.core.types import CompressedTokens
from apet.patch import (
    active_config,
    apply_patch,
    expecting_images,
    last_result,
    patched,
    preset_config,
    remove_patch,
)
from apet.result import CompressionResult, StageResult

__version__ = "0.1.0"

__all__ = [
    "ApetConfig",
    "CompressedTokens",
    "CompressionResult",
    "ImageLayout",
    "StageResult",
    "active_config",
    "apply_patch",
    "compress",
    "expecting_images",
    "last_result",
    "patched",
    "preset_config",
    "remove_patch",
]
