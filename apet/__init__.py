"""ApET: approximation-error guided compression of visual tokens for vision-language models.

The public names are imported when they are first used: scoring an answers file needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apet.adapters.cache import PromptCache, compile_config
    from apet.adapters.vision import ImageLayout
    from apet.api import Description, compress_model, compressed, config_for, describe, restore
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
    "Description",
    "ImageLayout",
    "PromptCache",
    "StageResult",
    "active_config",
    "apply_patch",
    "compile_config",
    "compress",
    "compress_model",
    "compressed",
    "config_for",
    "describe",
    "expecting_images",
    "last_result",
    "patched",
    "preset_config",
    "remove_patch",
    "restore",
]

_HOMES = {
    "ApetConfig": "apet.config",
    "CompressedTokens": "apet.core.types",
    "CompressionResult": "apet.result",
    "Description": "apet.api",
    "ImageLayout": "apet.adapters.vision",
    "PromptCache": "apet.adapters.cache",
    "StageResult": "apet.result",
    "compile_config": "apet.adapters.cache",
    "compress": "apet.compressor",
    "compress_model": "apet.api",
    "compressed": "apet.api",
    "config_for": "apet.api",
    "describe": "apet.api",
    "restore": "apet.api",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'apet' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_HOMES.get(name, "apet.patch")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
