"""A static cache as long as the shortened prompt, so that decoding compiles and still reads no dropped token.

The prefill runs as with a dynamic cache, on sequences of their own length in every layer. Each layer then copies its
keys and values into a buffer that is a little longer, of a length from a coarse grid: prompts of similar length share
buffers, and with them the compiled decoding step and its CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig
from transformers.cache_utils import Cache, StaticLayer

from apet.adapters.prompt_state import forget_prompt

_GRID = 128  # buffers end at multiples of this


class PromptCache(Cache):
    """Cache of one prompt (batch) at a time; `reset` before the next one.

    ``model.generate(..., past_key_values=cache, compile_config=apet.compile_config())`` compiles the decoding step; on
    a GPU it replays CUDA graphs. Beams and assisted decoding need a dynamic cache.

    Args:
        model: A model with a decoder of full-attention layers, patched or not.
        new_tokens: Most tokens of an answer.
    """

    def __init__(self, model: nn.Module, new_tokens: int) -> None:
        count = model.config.get_text_config().num_hidden_layers
        super().__init__(layers=[_PromptLayer(new_tokens) for _ in range(count)])

    def reset(self) -> None:
        """Forget the prompt; buffers stay for the next one."""
        for layer in self.layers:
            layer.filled = False
        forget_prompt(self)


def compile_config() -> CompileConfig:
    """A `compile_config` for `generate` that compiles the decoding step on any device, once per length of the buffers.

    transformers on its own compiles on GPUs only; torch on its own gives up after eight lengths and batch sizes.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    config = CompileConfig(dynamic=False)
    config._compile_all_devices = True
    return config


class _PromptLayer(StaticLayer):
    def __init__(self, new_tokens: int) -> None:
        super().__init__(max_cache_len=0)
        self.filled = False
        self._new_tokens = new_tokens
        self._buffers: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.filled:
            return super().update(key_states, value_states, *args, **kwargs)
        batch, _, length, _ = key_states.shape
        self.max_cache_len = -(-(length + self._new_tokens) // _GRID) * _GRID
        if (batch, self.max_cache_len) not in self._buffers:
            self.cumulative_length = torch.zeros((), dtype=torch.int64, device=key_states.device)
            self.lazy_initialization(key_states, value_states)
            self._buffers[batch, self.max_cache_len] = self.keys, self.values, self.cumulative_length
        self.keys, self.values, self.cumulative_length = self._buffers[batch, self.max_cache_len]
        self.batch_size = batch
        self.keys[:, :, :length] = key_states
        self.values[:, :, :length] = value_states
        self.cumulative_length.fill_(length)
        self.filled = True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_cache_len, 0) if self.filled else (query_length, 0)

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.filled else 0
