"""PyramidDrop: drop image tokens at several depths of the decoder, by the last prompt token's attention.

Paper: PyramidDrop, arXiv 2410.17247. At each stop the score is the attention that the last prompt token pays in the
layer about to run, averaged over heads; counts shrink geometrically from stop to stop. Needs that one row. Published
with stops after a quarter, half and three quarters of the layers and ratio lambda = 0.5 (270 of 576 tokens on
average).

Deviation: the schedules behind the published 192, 128 and 64 tokens are not known. Ours solves lambda for the
average; where the published stops cannot reach it they move to a sixteenth, a quarter and half of the depth.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._budget import check_reachable, layer_average, scaled_stops
from apet.methods._select import pruned, top_sorted, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class PyramidDrop(Method):
    """Top tokens by the last token's attention, at several stops.

    Attributes:
        stops: Stops as shares of the depth; used by `plan`.
        early_stops: The same for averages that `stops` cannot reach.
    """

    name = "pyramiddrop"
    paper = "PyramidDrop"
    arxiv = "2410.17247"
    idea = "attention of the last prompt token, geometric drops at three depths"
    stages = ("llm",)
    needs_attention_row = (0,)

    stops: tuple[float, ...] = (0.25, 0.5, 0.75)
    early_stops: tuple[float, ...] = (0.0625, 0.25, 0.5)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the tokens with the largest attention in the layer about to run."""
        scores = wide(context.ask(self, "attention_row", context.layer)).mean(1)
        return pruned(tokens, top_sorted(scores, keep), scores)

    def plan(self, average: float, tokens: int, layers: int) -> dict[str, Any]:
        """Geometric counts N, N lambda, N lambda^2, ... with lambda solved by bisection."""
        if average >= tokens:
            return {}
        stops = scaled_stops(self.stops, layers)
        if layer_average(stops, _counts(tokens, 0, len(stops)), layers) > average:
            stops = scaled_stops(self.early_stops, layers)
        check_reachable(self.name, average, stops, _counts(tokens, 0, len(stops)), layers)
        low, high = 0.0, 1.0
        for _ in range(60):
            ratio = (low + high) / 2
            above = layer_average(stops, _counts(tokens, ratio, len(stops)), layers) > average
            low, high = (low, ratio) if above else (ratio, high)
        counts = _counts(tokens, low, len(stops))[1:]
        return {"layer_list": tuple(stops), "image_token_list": tuple(int(count) for count in counts)}


def _counts(tokens: int, ratio: float, stops: int) -> list[float]:
    return [max(1.0, tokens * ratio**stop) for stop in range(stops + 1)]
