"""How long prompts are before a model sees them: tokens of pictures before and after compression, and the context.

Everything follows from sizes, so that a prompt that does not fit is found while questions are prepared, one by one.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import apet
from apet.adapters.stages import budget_for
from apet.config import FAMILY_PRESETS
from apet.eval.prompts import Context
from apet.methods import keeps_positions
from llava.mm_utils import get_anyres_image_grid_shape, unpad_bounds

# Rotary scalings whose max_position_embeddings counts the longer context already.
_SCALED_ALREADY = ("llama3", "longrope", "su")


def context_of(config: Any) -> Context:
    """What a model's config says about the length of prompts."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    rotary = getattr(text, "rope_parameters", None) or {}
    kind, factor = rotary.get("rope_type", "default"), rotary.get("factor")
    if positions is not None and factor and kind not in _SCALED_ALREADY:
        positions = int((rotary.get("original_max_position_embeddings") or positions) * factor)
    return Context(positions, getattr(config, "tokenizer_model_max_length", None))


def crops_of(pixels: Tensor) -> int:
    """Crops of one image's pixels (3, H, W) or (crops, 3, H, W)."""
    return len(pixels) if pixels.dim() > 3 else 1


def crop_length(config: Any) -> int:
    """Visual tokens of one crop of a LLaVA model."""
    vision = config.vision_config
    rows = (vision.image_size // vision.patch_size) ** 2
    return rows + (getattr(config, "mm_vision_select_feature", "patch") == "cls_patch")


def image_lengths(config: Any, size: tuple[int, int], crops: int) -> tuple[int, int]:
    """Visual tokens of one image in a LLaVA prompt, newline tokens included, and how many of them are newlines.

    Args:
        config: Of a LLaVA model.
        size: Original (width, height); used for several crops only.
        crops: Crops the image is encoded as.
    """
    rows, vision = crop_length(config), config.vision_config
    side = vision.image_size // vision.patch_size
    kind = getattr(config, "mm_patch_merge_type", None) or "flat"
    if "unpad" not in kind:
        return crops * rows, 0
    if crops == 1:
        return rows + 1, 1
    wide, high = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
    bounds = unpad_bounds(high * side, wide * side, size)
    lines, columns = max(0, bounds.bottom - bounds.top), max(0, bounds.right - bounds.left)
    return rows + lines * (columns + 1), lines


def kept_of_image(
    config: Any, compression: apet.ApetConfig, size: tuple[int, int], crops: int, item: int = 0, images: int = 1
) -> int:
    """The most tokens of an image that enter the decoder; for one crop and a method of fixed budgets, exactly those.

    Args:
        config: Of a LLaVA model.
        compression: The compression.
        size: Original (width, height).
        crops: Crops the image is encoded as.
        item: Number of the image in the prompt.
        images: Images of the prompt.
    """
    length, newlines = image_lengths(config, size, crops)
    if keeps_positions(compression, FAMILY_PRESETS["llava"].position_mode):
        return length  # what is left has the positions of the whole
    budget, real = compression.stage_budgets[0], length - newlines
    if compression.budget_per == "image":
        return newlines + max(budget_for(budget, real, item, images), min(crops, real))
    return newlines + min(real, crops * budget_for(budget, crop_length(config), item, images))


def room_of_prompt(
    context: Context,
    config: Any,
    compression: apet.ApetConfig,
    ids: Sequence[int] | Tensor,
    images: Sequence[tuple[tuple[int, int], int]],
) -> int | None:
    """Tokens that a LLaVA model's context leaves for the answer; None if it does not say how many it takes.

    Args:
        context: Of the model.
        config: Its config.
        compression: What shortens the prompt.
        ids: (L,) of the prompt, one per image.
        images: Original (width, height) and number of crops of every image in it.

    Raises:
        PromptError: The prompt is too long.
    """
    visual, kept = 0, 0
    for item, (size, crops) in enumerate(images):
        visual += image_lengths(config, size, crops)[0]
        kept += kept_of_image(config, compression, size, crops, item, len(images))
    return context.room(len(ids) - len(images), visual, kept)
