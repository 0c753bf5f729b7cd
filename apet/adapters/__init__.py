"""Model families: where their visual tokens are; and the one patch that shortens them."""

from apet.adapters import llava, llava_next, qwen2_vl, video_llava
from apet.adapters.base import Adapter, adapter_for, register, registered

__all__ = ["Adapter", "adapter_for", "llava", "llava_next", "qwen2_vl", "register", "registered", "video_llava"]
