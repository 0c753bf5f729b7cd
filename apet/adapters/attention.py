"""Exchange the attention function that modules look up for one of ours that calls it, and take it back.

The kernels of every implementation (eager, SDPA, FlashAttention) stay in use: an addition to the logits goes through
one more dimension of queries and keys, not through a mask.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.hooks import Attribute, InFlight, Removable

_PLAIN = "apet_plain"


@dataclass(frozen=True)
class Plain:
    """What an exchanged function finds on its module.

    Attributes:
        module: The module with the configuration it had: FlashAttention reads there which kernels to load.
        extras: What this thread adds to the call in flight, where it does not travel with the call.
    """

    module: nn.Module
    extras: InFlight


class Exchanged:
    """The attention function of some modules, exchanged.

    Args:
        config: Configuration in which the modules look up the name of their implementation.
        modules: The attention modules.
        prefix: Name of ours, in front of that of the implementation.
        attend: Ours, a function of a module: its first argument is the name of the implementation.
        extras: For `Plain`.
    """

    def __init__(
        self, config: Any, modules: Sequence[nn.Module], prefix: str, attend: Callable, extras: InFlight
    ) -> None:
        self._config, self._modules, self._prefix, self._attend, self._extras = config, modules, prefix, attend, extras
        self._before = host.attention_name(config)

    def attach(self) -> list[Removable]:
        """Exchange it; returns the handles."""
        handles: list[Removable] = [self]
        for module in self._modules:
            plain = copy.copy(module)  # shares the weights
            plain.config = copy.copy(plain.config)
            handles.append(Attribute(module, _PLAIN, Plain(plain, self._extras)))
        host.set_attention_name(self._config, self._register())
        return handles

    def _register(self) -> str:
        """Make the function known to transformers; returns its name."""
        name = self._prefix + self._before
        host.register_attention(name, functools.partial(self._attend, self._before), masks_of=self._before)
        return name

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self._register()  # a process that loads a patched model does not know the function yet

    def remove(self) -> None:
        """Put the modules' attention function back."""
        host.set_attention_name(self._config, self._before)


def plain(module: nn.Module) -> Plain:
    """What `Exchanged` left on a module."""
    return getattr(module, _PLAIN)


def biased(
    attend: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *args, **kwargs
) -> tuple[Tensor, Any]:
    """An attention function with `bias` (B, L) added to the logits of the L keys.

    An additive mask would take FlashAttention away. One more dimension does the same: queries hold a constant there and
    keys the bias, so their product adds it. Heads are filled up with zeros to a multiple of eight, which the kernels
    like. `args` and `kwargs` go on to `attend`, the mask first.
    """
    dim = query.shape[-1]
    scale = kwargs.pop("scaling", None) or dim**-0.5
    extra = 8 - dim % 8
    constant = query.new_zeros(*query.shape[:-1], extra)
    constant[..., 0] = 1 / scale
    added = key.new_zeros(*key.shape[:-1], extra)
    added[..., 0] = bias.to(key.dtype).unsqueeze(1)
    output, weights = attend(
        module,
        torch.cat([query, constant], -1),
        torch.cat([key, added], -1),
        nn.functional.pad(value, (0, extra)),
        *args,
        scaling=scale,
        **kwargs,
    )
    return output[..., : value.shape[-1]], weights
