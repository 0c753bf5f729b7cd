"""FastV: after a few decoder layers keep the image tokens that the last prompt token attends to.

Paper: An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764. Before layer K the score of a token is the
attention of the last prompt token in layer K - 1, averaged over heads. Needs that one row, recomputed from queries
and keys, where the published code reads a full eager attention map. Published with K = 2 and half of the tokens
dropped.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._budget import single_stop
from apet.methods._options import check_range
from apet.methods._select import pruned, top_sorted, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class FastV(Method):
    """Top tokens by the last token's attention.

    Attributes:
        stop: Layers K that run on all tokens; used by `plan`.
    """

    name = "fastv"
    paper = "FastV"
    arxiv = "2403.06764"
    idea = "attention of the last prompt token in decoder layer 2"
    stages = ("llm",)
    needs_attention_row = (-1,)

    stop: int = 2

    def __post_init__(self) -> None:
        check_range(self, ("stop",), 1)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the tokens with the largest attention in the layer before the stage."""
        scores = wide(context.ask(self, "attention_row", context.layer - 1)).mean(1)
        return pruned(tokens, top_sorted(scores, keep), scores)

    def plan(self, average: float, tokens: int, layers: int) -> dict[str, Any]:
        """One cut after `stop` layers."""
        return single_stop(self.name, average, tokens, layers, self.stop)
