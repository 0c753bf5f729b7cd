"""VisPruner: half of the budget by CLS attention, the other half by pruning near-duplicates among the rest.

Paper: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, arXiv 2412.01818
(v2). Important tokens are the top int(rho T) by CLS attention of vision layer -2. The others are ranked by falling
attention; while too many remain, the ranked list is split into even and odd places, and the even tokens most similar
to an odd one are dropped, at most 8 at a time. Needs one attention row. Cosine is taken on the features in front of
the projector. No merging.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods._options import check_range
from apet.methods._select import pruned, top, unit, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class VisPruner(Method):
    """Important tokens by attention, diverse tokens by repeated bipartite pruning.

    Attributes:
        important: Share rho of the budget that goes to attention.
        step: Most tokens dropped per round.
    """

    name = "vispruner"
    paper = "VisPruner"
    arxiv = "2412.01818"
    idea = "half by CLS attention, half by dropping near-duplicates of the rest"
    stages = ("vision",)
    needs_cls_attention = (-2,)

    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        check_range(self, ("important",), 0, 1)
        check_range(self, ("step",), 1)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep important and diverse tokens, in raster order."""
        scores = wide(context.ask(self, "cls_attention", -2)).mean(1)
        ranked = top(scores, tokens.shape[1])
        first = int(keep * self.important)
        diverse = self._diverse(unit(tokens), ranked[:, first:], keep - first)
        return pruned(tokens, torch.cat([ranked[:, :first], diverse], 1).sort(dim=-1).values, scores)

    def _diverse(self, x: Tensor, ranked: Tensor, count: int) -> Tensor:
        """`count` of the ranked tokens (B, R); the order is kept."""
        if count == 0:
            return ranked[:, :0]
        features = gather_rows(x, ranked)
        similarity = features @ features.transpose(1, 2)
        place = torch.arange(ranked.shape[1], device=x.device).expand_as(ranked)
        while place.shape[1] > count:
            even, odd = place[:, 0::2], place[:, 1::2]
            among = gather_rows(similarity, even).gather(2, odd.unsqueeze(1).expand(-1, even.shape[1], -1))
            drop = min(self.step, place.shape[1] - count, even.shape[1])
            dropped = torch.zeros_like(place, dtype=torch.bool)
            dropped = dropped.scatter(1, 2 * top(among.amax(-1), drop), True)
            left = dropped.long().sort(dim=-1, stable=True).indices[:, : place.shape[1] - drop]
            place = place.gather(1, left)
        return ranked.gather(1, place)
