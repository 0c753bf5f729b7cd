"""Let a merged token count for as many as it stands for: the logarithm of its size on its attention logits.

An additive mask would take FlashAttention away. One more dimension does the same: queries hold a constant there and
keys the logarithm, so their product adds it (log-size calibration after RESTORE, arXiv 2606.01711, and ERA, arXiv
2606.31982). Heads are filled up with zeros to a multiple of eight, which the kernels like.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.base import Adapter
from apet.adapters.hooks import Attribute, Removable

# Sizes above it count as this much: a background of hundreds of tokens must not drown the rest.
LARGEST = 16
_PREFIX, _PLAIN = "apet_log_size_", "apet_plain"


@dataclass(frozen=True)
class _Plain:
    """An attention module with the configuration it had: FlashAttention reads there which kernels to load."""

    module: nn.Module


class SizeBias:
    """Puts the bias on every layer of a decoder that is called with `host.SIZES`.

    Args:
        adapter: The family.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._config = adapter.text_model.config
        self._before = host.attention_name(self._config)

    def attach(self) -> list[Removable]:
        """Exchange the attention function; returns the handles."""
        handles: list[Removable] = [self]
        for layer in self._adapter.layers:
            attention = host.attention_of(layer)
            plain = copy.copy(attention)  # shares the weights
            plain.config = copy.copy(plain.config)
            handles.append(Attribute(attention, _PLAIN, _Plain(plain)))
        host.set_attention_name(self._config, _register(self._before))
        return handles

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        _register(self._before)  # a process that loads a patched model does not know the function yet

    def remove(self) -> None:
        """Put the model's attention function back."""
        host.set_attention_name(self._config, self._before)


def _register(base: str) -> str:
    """Make the attention function `base` with the bias known to transformers; returns its name."""
    name = _PREFIX + base
    host.register_attention(name, functools.partial(_attend, base), masks_of=base)
    return name


def _attend(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention function `base`, with the bias where the layer has one."""
    attend = host.attention_function(base, module)
    module, bias = getattr(module, _PLAIN).module, kwargs.pop(host.SIZES, None)
    if bias is None:
        return attend(module, query, key, value, mask, *args, **kwargs)
    bias = nn.functional.pad(bias, (0, key.shape[2] - bias.shape[1]))  # generated tokens count as one
    dim = query.shape[-1]
    scale = kwargs.pop("scaling", None) or dim**-0.5
    extra = 8 - dim % 8
    constant = query.new_zeros(*query.shape[:-1], extra)
    constant[..., 0] = 1 / scale
    sizes = key.new_zeros(*key.shape[:-1], extra)
    sizes[..., 0] = bias.to(key.dtype).unsqueeze(1)
    output, weights = attend(
        module,
        torch.cat([query, constant], -1),
        torch.cat([key, sizes], -1),
        nn.functional.pad(value, (0, extra)),
        mask,
        *args,
        scaling=scale,
        **kwargs,
    )
    return output[..., : value.shape[-1]], weights
