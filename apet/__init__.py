"""ApET: approximation-error guided compression of visual tokens for vision-language models."""

from apet.compressor import compress
from apet.core.types import CompressedTokens

__all__ = ["CompressedTokens", "compress"]
