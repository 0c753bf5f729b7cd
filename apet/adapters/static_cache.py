"""A static cache as long as the shortened prompt, so that decoding compiles and still reads no dropped token.

The prefill runs as with a dynamic cache, on sequences of their own length in every layer. Each layer then copies its
keys and values into a buffer that is a little longer, of a length from a coarse grid: prompts of similar length share
buffers, and with them the compiled decoding step and its CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, CompileConfig
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from apet.adapters import host
from apet.adapters.prompt_state import forget_prompt

_GRID = 128  # buffers end at multiples of this


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
