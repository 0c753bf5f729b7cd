"""Let a merged token count for as many as it stands for: the logarithm of its size on its attention logits.

An additive mask would take FlashAttention away. One more dimension does the same: queries hold a constant there and
keys the logarithm, so their product adds it (log-size calibration after RESTORE, arXiv 2606.01711, and ERA, arXiv
2606.31982). Heads are filled up with zeros to a multiple of eight, which the kernels like.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.base import Adapter, InstanceAttribute, Removable

# Sizes above it count as this much: a background of hundreds of tokens must not drown the rest.
LARGEST = 16
_PREFIX, _SOURCE = "apet_log_size_", "apet_size_source"

LogSizes = Callable[[int, int], Tensor | None]


@dataclass(frozen=True)
class _Source:
    """What the attention function of a layer needs.

    Attributes:
        log_sizes: As in `SizeBias`.
        plain: The attention module with the configuration it had: FlashAttention reads there which kernels to load.
    """

    log_sizes: LogSizes
    plain: nn.Module


class SizeBias:
    """Puts the bias on every layer of a decoder.

    Args:
        adapter: The family.
        log_sizes: (B, keys) log sizes of the keys of a layer (0-based), given their number; None where all are one.
    """

    def __init__(self, adapter: Adapter, log_sizes: LogSizes) -> None:
        self._adapter, self._log_sizes = adapter, log_sizes
        self._config = adapter.text_model.config
        self._before = host.attention_name(self._config)

    def attach(self) -> list[Removable]:
        """Exchange the attention function; returns the handles."""
        name = _PREFIX + self._before
        host.register_attention(name, functools.partial(_attend, self._before), masks_of=self._before)
        handles: list[Removable] = [self]
        for layer in self._adapter.layers:
            attention = host.attention_of(layer)
            plain = copy.copy(attention)  # shares the weights
            plain.config = copy.copy(plain.config)
            setattr(attention, _SOURCE, _Source(self._log_sizes, plain))
            handles.append(InstanceAttribute(attention, _SOURCE))
        host.set_attention_name(self._config, name)
        return handles

    def remove(self) -> None:
        """Put the model's attention function back."""
        host.set_attention_name(self._config, self._before)


def _attend(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention function `base`, with the bias where the layer has one."""
    attend = host.attention_function(base, module)
    source: _Source = getattr(module, _SOURCE)
    module, bias = source.plain, source.log_sizes(host.layer_number(module), key.shape[2])
    if bias is None:
        return attend(module, query, key, value, mask, *args, **kwargs)
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
