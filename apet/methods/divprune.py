"""DivPrune: the subset whose tokens are farthest apart.

Paper: DivPrune: Diversity-based Visual Token Pruning, arXiv 2503.02175. Distance is 1 - cosine of the embeddings
behind the projector; the first token is the one whose nearest neighbour is farthest, each further one maximises the
distance to its nearest selected token. Needs neither text nor attention; drops, never merges.

Deviation from the published code: the budget is a count; an image's tokens are selected for themselves, not together
with newline tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._greedy import greedy_max_min
from apet.methods._select import cosine, pruned
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min diversity."""

    name = "divprune"
    paper = "DivPrune"
    arxiv = "2503.02175"
    idea = "greedy max-min cosine distance"
    features = "post_projector"

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the max-min greedy set."""
        picks = greedy_max_min(1 - cosine(tokens), keep)
        return pruned(tokens, picks.sort(dim=-1).values)
