"""What decoding must know about a compressed prompt, on its cache; and a static cache as long as what was kept.

`PromptCache`: the prefill runs as with a dynamic cache, on sequences of their own length in every layer. Each layer
then copies its keys and values into a buffer that is a little longer, of a length from a coarse grid: prompts of
similar length share buffers, and with them the compiled decoding step and its CUDA graph.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, CompileConfig
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from apet.adapters import host

_STATE = "_apet_state"
_GRID = 128  # buffers end at multiples of this


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
        for group in reversed(self.groups):
            if group.first <= layer:
                return group
        return None


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


class PromptCache(Cache):
    """Cache of one prompt (batch) at a time; `reset` before the next one.

    Handed to ``model.generate`` together with ``compile_config=apet.compile_config()``, it lets the decoding step
    compile; on a GPU that replays CUDA graphs. Beams and assisted decoding need a dynamic cache.

    Args:
        model: A model with a decoder of full-attention layers, patched or not.
        new_tokens: Most tokens of an answer.
    """

    def __init__(self, model: nn.Module, new_tokens: int) -> None:
        count = model.config.get_text_config().num_hidden_layers
        super().__init__(layers=[_PromptLayer(new_tokens) for _ in range(count)])

    def reset(self) -> None:
        """Forget the prompt; buffers stay for the next one."""
        super().reset()
        forget_prompt(self)


def compile_config() -> CompileConfig:
    """A `compile_config` for `generate` that compiles the decoding step on any device, once per length of the buffers.

    transformers on its own compiles on GPUs only; torch on its own gives up after eight lengths and batch sizes.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return host.compile_everywhere()


class _PromptLayer(CacheLayerMixin):
    """The prompt as the decoder layer computed it, then one of several static layers to decode on."""

    is_compileable = True
    is_sliding = False

    def __init__(self, new_tokens: int) -> None:
        super().__init__()
        self._new_tokens = new_tokens
        self._static: dict[tuple[int, int], StaticLayer] = {}
        self._used: StaticLayer | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, _, length, _ = key_states.shape
        room = -(-(length + self._new_tokens) // _GRID) * _GRID
        if (batch, room) not in self._static:
            self._static[batch, room] = StaticLayer(max_cache_len=room)
        self._used = self._static[batch, room]
        self._used.reset()
        self._used.update(key_states, value_states)
        self.keys, self.values = self._used.keys, self._used.values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            return self._used.update(key_states, value_states, *args, **kwargs)
        self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._used.get_mask_sizes(query_length) if self.is_initialized else (query_length, 0)

    def get_seq_length(self) -> Any:
        return self._used.get_seq_length() if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self._used.get_max_length() if self.is_initialized else -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("beams need a dynamic cache; leave PromptCache out, or set num_beams=1")

    def reset(self) -> None:
        self.keys = self.values = self._used = None
        self.is_initialized = False
