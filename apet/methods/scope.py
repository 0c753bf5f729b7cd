"""SCOPE: greedy coverage of the image, weighted with CLS attention.

Paper: SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs, arXiv 2510.24214. Every token is
covered by its largest cosine to the selected set; the next pick has the largest coverage gain times its CLS attention
(vision layer -2, summed over heads) to the power alpha. Needs that row; with ``alpha=0`` it is plain facility
location and needs nothing. Features in front of the projector; drops, never merges.
"""

from dataclasses import dataclass

from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._greedy import greedy_coverage
from apet.methods._options import check_range
from apet.methods._select import cosine, pruned, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class Scope(Method):
    """Facility location with a CLS prior.

    Attributes:
        alpha: Exponent of the attention; 0 leaves coverage alone.
    """

    name = "scope"
    paper = "SCOPE"
    arxiv = "2510.24214"
    idea = "greedy cosine coverage times CLS attention"
    stages = ("vision",)
    needs_cls_attention = (-2,)

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, ("alpha",), 0)

    def needs(self, stage: str) -> dict[str, tuple[int, ...]]:
        return super().needs(stage) if self.alpha else {}

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the greedy covering set."""
        weight = wide(context.ask(self, "cls_attention", -2)).sum(1) ** self.alpha if self.alpha else None
        picks = greedy_coverage(cosine(tokens), keep, weight)
        return pruned(tokens, picks.sort(dim=-1).values, weight)
