"""Model families: where their visual tokens are; and the one patch that shortens them."""

from apet.adapters import internvl, llava, llava_next, llava_onevision, qwen2_vl, qwen3_vl, video_llava
from apet.adapters.base import Adapter, adapter_for, register, registered

__all__ = [
    "Adapter",
    "adapter_for",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen3_vl",
    "register",
    "registered",
    "video_llava",
]
