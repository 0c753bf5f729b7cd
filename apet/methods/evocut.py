"""EvoCut: keep the tokens that change in ways of their own while the vision tower works on them.

Paper: EvoCut: Multi-Layer Evolution-Aware Visual Token Compression, arXiv 2606.01756. From the middle of the tower on
(layer 12 of CLIP's 24, 16 of Qwen's 32), the change of every token from one layer to the next is normalised and the
changes of all tokens are put into 8 clusters by k-means; a token scores 1 minus its largest cosine to a centre. Scores
of the layers are averaged exponentially with factor 0.95, and the highest stay. Needs the tower's hidden states,
neither text nor attention; drops, never merges.

Not known from the formulas: how k-means starts and stops, here from the farthest-first tokens with ten updates of unit
centres; how the average begins, here with the first layer's score; what becomes of dropped tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._greedy import greedy_max_min
from apet.methods._options import check_range
from apet.methods._select import cosine, pool, pruned, top_sorted, unit, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class EvoCut(Method):
    """Unusual evolution through the tower.

    Attributes:
        clusters: Clusters of changes.
        decay: Factor of the exponential average.
        updates: Updates of the centres.
    """

    name = "evocut"
    paper = "EvoCut"
    arxiv = "2606.01756"
    idea = "changes between tower layers that resemble no cluster of changes"
    stages = ("vision",)
    needs_vision_states = True

    clusters: int = 8
    decay: float = 0.95
    updates: int = 10

    def __post_init__(self) -> None:
        check_range(self, ("clusters",), 1)
        check_range(self, ("decay",), 0, 1)
        check_range(self, ("updates",), 0)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the highest scores."""
        states = wide(context.ask(self, "vision_states"))
        if states.shape[1] < 2:
            raise ValueError("method 'evocut' looks at changes between tower layers; a tower of one layer has none")
        scores = None
        for change in states.diff(dim=1).unbind(1):
            unusual = self._unusual(unit(change))
            scores = unusual if scores is None else self.decay * scores + (1 - self.decay) * unusual
        return pruned(tokens, top_sorted(scores, keep), scores)

    def _unusual(self, changes: Tensor) -> Tensor:
        """(B, N) 1 minus the largest cosine of unit rows (B, N, D) to a centre of their clusters."""
        count = min(self.clusters, changes.shape[1])
        starts = greedy_max_min(1 - cosine(changes), count)
        centres = changes.gather(1, starts.unsqueeze(-1).expand(-1, -1, changes.shape[-1]))
        for _ in range(self.updates):
            nearest = (changes @ centres.transpose(1, 2)).argmax(-1)
            moved = unit(pool(changes, nearest, count))
            empty = (nearest.unsqueeze(1) != torch.arange(count, device=changes.device).view(1, -1, 1)).all(-1)
            centres = torch.where(empty.unsqueeze(-1), centres, moved)
        unusual = 1 - (changes @ centres.transpose(1, 2)).amax(-1)
        # A change that lies on its centre leaves rounding noise: it counts as zero, so that ties are ties.
        return torch.where(unusual > 16 * torch.finfo(unusual.dtype).eps, unusual, 0)
