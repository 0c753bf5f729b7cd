"""Let a merged token count for as many as it stands for: the logarithm of its size on its attention logits.

Log-size calibration after RESTORE, arXiv 2606.01711, and ERA, arXiv 2606.31982.
"""

from typing import Any

from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.attention import Exchanged, biased, plain
from apet.adapters.base import Adapter
from apet.adapters.hooks import InFlight, Removable

# Sizes above it count as this much: a background of hundreds of tokens must not drown the rest.
LARGEST = 16
_PREFIX = "apet_log_size_"


class SizeBias:
    """Puts the bias on every layer of a decoder that is called with `host.SIZES`.

    Args:
        adapter: The family.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def attach(self) -> list[Removable]:
        """Exchange the attention function; returns the handles."""
        modules = [host.attention_of(layer) for layer in self._adapter.layers]
        return Exchanged(self._adapter.text_model.config, modules, _PREFIX, _attend, InFlight()).attach()


def _attend(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention function `base`, with the bias where the layer has one."""
    attend = host.attention_function(base, module)
    module, bias = plain(module).module, kwargs.pop(host.SIZES, None)
    if bias is None:
        return attend(module, query, key, value, mask, *args, **kwargs)
    bias = nn.functional.pad(bias, (0, key.shape[2] - bias.shape[1]))  # generated tokens count as one
    return biased(attend, module, query, key, value, bias, mask, *args, **kwargs)
