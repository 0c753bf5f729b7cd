"""CDPruner: the most diverse subset, conditioned on the question.

Paper: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, arXiv 2506.10967.
The kernel of a determinantal point process is L = diag(r) S diag(r) with S the cosines behind the projector and r the
relevance of a token to the question; the subset is its greedy maximum of log det. Relevance is the negated cosine in
CLIP's joint space, averaged over the question's chunks, scaled to 0..1. Needs CLIP's text tower beside the model
(`clip_relevance`), no attention.

LLaVA checkpoints ship no text tower: there the need cannot be met and the message says so. ``relevance="embeddings"``
is the paper's variant for models without one: cosine to the question's token embeddings, not negated. Deviations: the
scaling is per image, where the code scales over the batch; a budget beyond the features' width starts the search anew
among the tokens left, because the determinant is zero from there on.
"""

from dataclasses import dataclass

from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._options import check_choice, check_range
from apet.methods._select import cosine, pruned, wide
from apet.methods._text import min_max, text_relevance
from apet.methods._volume import greedy_volume
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class CDPruner(Method):
    """Greedy determinantal point process with a relevance-weighted kernel.

    Attributes:
        relevance: "clip" or "embeddings".
        theta: Balance of relevance and diversity: r becomes exp(theta / (2 (1 - theta)) r); None leaves r as it is.
    """

    name = "cdpruner"
    paper = "CDPruner"
    arxiv = "2506.10967"
    idea = "log-determinant greedy on cosines weighted with relevance to the question"
    stages = ("vision",)
    features = "post_projector"
    needs_clip_relevance = True

    relevance: str = "clip"
    theta: float | None = None

    def __post_init__(self) -> None:
        check_choice(self, "relevance", ("clip", "embeddings"))
        if self.theta is not None:
            check_range(self, ("theta",), 0, 0.99)

    def needs(self, stage: str) -> dict[str, tuple[int, ...]]:
        return super().needs(stage) if self.relevance == "clip" else {"text_embeddings": ()}

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the greedy maximum of log det."""
        if self.relevance == "clip":
            relevance = min_max(-wide(context.ask(self, "clip_relevance")))
        else:
            relevance = min_max(text_relevance(tokens, *context.ask(self, "text_embeddings")))
        weight = relevance if self.theta is None else (self.theta / (2 * (1 - self.theta)) * relevance).exp()
        kernel = weight.unsqueeze(1) * cosine(tokens) * weight.unsqueeze(2)
        picks = greedy_volume(kernel, keep, rank=tokens.shape[-1]).picks
        return pruned(tokens, picks.sort(dim=-1).values, relevance)
