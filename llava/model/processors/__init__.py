"""Prompts and pixels of the Hugging Face families, from the checkpoint's tokenizer, chat template and image processor.

The chat template is applied by transformers; what its processors do next (`AutoProcessor`: expand placeholders, lay out
tiles and videos) is done here, on PIL pictures. Without torchvision transformers (5.24) builds no processor of these
families, not even for images, so without this package nothing could be asked there, and with it answers do not depend
on whether torchvision is there. tests/llava/test_processors_needed.py shows that it is needed,
tests/llava/test_processors_match.py that prompts and pixels are transformers'.
"""

from typing import Any

from llava.model.processors.base import FamilyProcessor, Inputs, Limits
from llava.model.processors.internvl import InternVLProcessor
from llava.model.processors.llava_onevision import LlavaOnevisionProcessor
from llava.model.processors.qwen_vl import Qwen3VLProcessor, Qwen25VLProcessor, QwenVLProcessor
from llava.model.processors.video_llava import VideoLlavaProcessor

__all__ = ["FamilyProcessor", "Inputs", "Limits", "family_types", "load_processor"]

_PROCESSORS: dict[str, type[FamilyProcessor]] = {
    "qwen2_vl": QwenVLProcessor,
    "qwen2_5_vl": Qwen25VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "video_llava": VideoLlavaProcessor,
    "llava_onevision": LlavaOnevisionProcessor,
    "internvl": InternVLProcessor,
}


def family_types() -> tuple[str, ...]:
    """`config.model_type` values with a processor here."""
    return tuple(_PROCESSORS)


def load_processor(path: str, config: Any, limits: Limits) -> FamilyProcessor:
    """The processor of a checkpoint.

    Args:
        path: Checkpoint folder or hub id.
        config: Its transformers config.
        limits: Smallest and largest picture, for families that see pictures in their own size.

    Raises:
        FileNotFoundError: Tokenizer or image processor files are missing.
        ValueError: Limits for a family of one picture size, or a tokenizer without a needed token or chat template.
    """
    return _PROCESSORS[config.model_type].from_pretrained(path, config, limits)
