"""Calls that a patched model cannot serve, and the masks it understands."""

from typing import Any

import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.prompt_state import PromptState


def refuse_training(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pre-hook of a patched model: raise in training mode and for a loss."""
    if module.training:
        raise ValueError("a patched model is for inference; call model.eval(), or apet.remove_patch(model) to train it")
    if kwargs.get("labels") is not None:
        raise ValueError("labels do not fit a shortened sequence; apet.remove_patch(model) before computing a loss")


def refuse_continuation(given: dict, tokens: Tensor, cache: Any, state: PromptState | None) -> None:
    """Raise where a filled cache is continued in a way that cannot be right; `state` is what the prompt left on it."""
    if host.has_pictures(given):
        raise ValueError(
            "a patched model compresses images in the first forward of a prompt; this cache already holds one. "
            "Start a new cache for a conversation with new images (and leave out prefill_chunk_size)"
        )
    group = state.group_of(0) if state is not None else None
    if group is None or tokens.shape[1] == 1:
        return
    fed = int(host.cached_length(cache)) - group.length + tokens.shape[1]
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        consistent = mask.shape[1] == state.original_length + fed
    elif positions is not None:
        axes = state.original_last.shape[0] if state.original_last.dim() == 3 else 1
        rotary = positions[-axes:] if axes > 1 else positions
        consistent = int(rotary.max()) == int(state.original_last.max()) + fed
    else:
        consistent = True
    if not consistent:
        raise ValueError(
            "this cache holds a compressed prompt, so it is shorter than the conversation and generate() would feed "
            "old tokens again; pass only the new input_ids with an attention_mask for the whole conversation, or start "
            "a new cache"
        )


def valid_columns(mask: Any, cache: Any, visual: Tensor) -> Tensor:
    """(B, L) bool, False on padding, from any mask the text model can be given.

    Raises:
        ValueError: A 4-D mask that `generate` did not make.
    """
    mask = host.full_mask(mask)
    if mask is None:
        return torch.ones_like(visual)
    if mask.dim() == 2:
        return mask[:, : visual.shape[1]].bool()
    if not host.is_static(cache):
        raise ValueError("a patched model takes 2-D attention masks (batch, length); it cannot shorten a 4-D one")
    # generate() builds 4-D masks for static caches; the last query sees exactly the real tokens.
    row = mask[:, 0, -1, : visual.shape[1]]
    return row if row.dtype == torch.bool else row == 0
