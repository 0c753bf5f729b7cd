"""Cen-Prune: diversity of centred tokens, times how little a token resembles all others.

Paper: Cen-Prune, arXiv 2608.30263. All tokens of an image share a large mean, which hides what tells them apart:
similarity is the cosine of the tokens minus the image's mean, S_ij. What the mean does say is how common a token is:
g_i is the negated mean cosine of token i to all others, uncentred, scaled to 0..1 within the image. Behind DivPrune
the next pick is argmax g_i min_s (1 - S_is) over the picks s; behind a determinantal point process it is the greedy
maximum of log det of diag(r g) S diag(r g), with r the relevance to the question as CDPruner has it, or 1. Features
behind the projector; needs text for r only, and no attention; drops, never merges.

Not known from the formulas: the first pick, here DivPrune's rule (the nearest other token is farthest) times g; and
whether the scaling keeps a small floor, here that of CDPruner (1e-6), so that no token is ruled out. Beyond the rank of
the centred features the determinant is zero, and the search starts anew among the tokens left.
"""

from dataclasses import dataclass

from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._features import outlierness
from apet.methods._greedy import greedy_max_min
from apet.methods._options import check_choice
from apet.methods._select import cosine, pruned, wide
from apet.methods._text import min_max, text_relevance
from apet.methods._volume import greedy_volume
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class CenPrune(Method):
    """Centred diversity with an outlier weight.

    Attributes:
        form: What it is put on: "divprune" or "dpp".
        relevance: Relevance r in the form "dpp": "none", "clip" or "embeddings" (`cdpruner`).
    """

    name = "cenprune"
    paper = "Cen-Prune"
    arxiv = "2608.30263"
    idea = "greedy max-min distance of centred tokens times an outlier weight"
    features = "post_projector"

    form: str = "divprune"
    relevance: str = "none"

    def __post_init__(self) -> None:
        check_choice(self, "form", ("divprune", "dpp"))
        check_choice(self, "relevance", ("none", "clip", "embeddings"))
        if self.form == "divprune" and self.relevance != "none":
            raise ValueError(
                f"option relevance={self.relevance!r} of method 'cenprune' needs form='dpp'; choose it, or 'none'"
            )

    def needs(self, stage: str) -> dict[str, tuple[int, ...]]:
        return {"none": {}, "clip": {"clip_relevance": ()}, "embeddings": {"text_embeddings": ()}}[self.relevance]

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the greedy set."""
        x = wide(tokens)
        weight = outlierness(x)
        similarity = cosine(x - x.mean(1, keepdim=True))
        if self.form == "divprune":
            picks = greedy_max_min(1 - similarity, keep, weight)
        else:
            if self.relevance != "none":
                weight = weight * self._relevance(tokens, context)
            kernel = weight.unsqueeze(1) * similarity * weight.unsqueeze(2)
            picks = greedy_volume(kernel, keep, rank=min(x.shape[1] - 1, x.shape[-1])).picks
        return pruned(tokens, picks.sort(dim=-1).values, weight)

    def _relevance(self, tokens: Tensor, context: StageContext) -> Tensor:
        """(B, N) relevance to the question, scaled to (0, 1]."""
        if self.relevance == "clip":
            return min_max(-wide(context.ask(self, "clip_relevance")))
        return min_max(text_relevance(tokens, *context.ask(self, "text_embeddings")))
