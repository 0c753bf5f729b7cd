"""Queries and keys of an attention module, without running its attention.

The module's own forward makes them (projections, biases, norms, rotary embeddings, of whatever family) and hands them
to an attention function that only takes them out. So a row of attention costs the projections and one product, and the
model keeps the attention it was loaded with.
"""

import copy
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from apet.adapters import host

_NAME = "apet_probe"


class Projected(NamedTuple):
    """What an attention module would compare.

    Attributes:
        queries: (B, heads, L, d).
        keys: (B, kv_heads, L, d).
        scale: Factor of their products.
    """

    queries: Tensor
    keys: Tensor
    scale: float

    def scores(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scaled products (G, heads, Q, L) of the queries at `columns` (G, Q) of rows (G, 1) with all keys.

        In float32, or float64 for a float64 model.
        """
        heads = self.queries.shape[1]
        queries = _wide(self.queries.transpose(1, 2)[rows, columns].transpose(1, 2)) * self.scale
        keys = _wide(self.keys[rows.flatten()]).repeat_interleave(heads // self.keys.shape[1], 1)
        return queries @ keys.transpose(2, 3)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Taken(Exception):
    def __init__(self, projected: Projected) -> None:
        self.projected = projected


def _take(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
    scale = kwargs.get("scaling")
    raise _Taken(Projected(query, key, query.shape[-1] ** -0.5 if scale is None else scale))


host.register_attention(_NAME, _take)


@torch.no_grad()
def project(call: host.AttentionCall) -> Projected:
    """Queries and keys of an attention module that looks its attention function up, for one input (B, L, D).

    Raises:
        NotImplementedError: The module calls no attention function.
    """
    # A shallow copy shares the weights; its configuration names our function, the model's own stays as it is.
    probe = copy.copy(call.module)
    probe.config = copy.copy(probe.config)
    host.set_attention_name(probe.config, _NAME)
    try:
        probe.forward(call.hidden, **call.kwargs)
    except _Taken as taken:
        return taken.projected
    raise NotImplementedError(f"{type(call.module).__name__} does not look up its attention function")
