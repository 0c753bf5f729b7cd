"""What a compressed prompt leaves behind for decoding; it travels on the prompt's cache object."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from apet.adapters import host

_STATE = "_apet_state"


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that see the same tokens.

    Attributes:
        first: 0-based first layer.
        length: Prompt columns, padding included.
        mask: (B, length) bool, or None without padding; behind the prefill on a static cache as wide as its layers.
        offset: (..., B, 1) int64 what the position of a new token is ahead of the columns cached before it.
        log_sizes: (B, length) logarithm of the image tokens behind every column, where it is asked for; as wide as
            `mask` can be.
    """

    first: int
    length: int
    mask: Tensor | None
    offset: Tensor
    log_sizes: Tensor | None = None


@dataclass
class PromptState:
    """What decoding must know about a compressed prompt.

    Attributes:
        groups: Layer groups whose inputs differ from what the text model believes, by first layer.
        original_length: Columns of the prompt before compression.
        original_last: (..., B, 1) position of the last prompt token before compression.
    """

    original_length: int
    original_last: Tensor
    groups: list[LayerGroup] = field(default_factory=list)

    def group_of(self, layer: int) -> LayerGroup | None:
        """The group that holds `layer`, None where the text model's own values are right."""
        return next((group for group in reversed(self.groups) if group.first <= layer), None)


def state_of(cache: Any) -> PromptState | None:
    """What the prompt in a cache left behind; None for a cache (or none) that holds no compressed prompt."""
    return getattr(cache, _STATE, None)


def keep_state(cache: Any, state: PromptState) -> None:
    """Let a cache carry the state of its prompt."""
    setattr(cache, _STATE, state)


def widened(group: LayerGroup, cache: Any) -> LayerGroup:
    """The group as decoding on its cache needs it.

    On a static cache its tensors have one shape for all prompts, and its numbers are never read: a compiled decoding
    step serves every prompt.
    """
    if not host.is_static(cache, group.first):
        return group
    missing = (0, host.key_length(cache, group.first, 1) - group.length)
    mask, sizes = group.mask, group.log_sizes
    return replace(
        group,
        mask=None if mask is None else nn.functional.pad(mask, missing, value=True),
        log_sizes=None if sizes is None else nn.functional.pad(sizes, missing),
    )


def forget_prompt(cache: Any) -> None:
    """Take the state of a compressed prompt off a cache that is empty again."""
    if getattr(cache, _STATE, None) is not None:
        delattr(cache, _STATE)
