"""StackTok: cover the question as soon as the image is covered well enough.

Paper: StackTok (2026). Relevance R and coverage C of a set of tokens are facility locations: over every question
token, and over every image token, the sum of the largest softmaxed cosine to the set. With beta the mean normalised
entropy of the question tokens' rows, a step whose set covers the image at least beta times as well as equally many
picks of a coverage-only greedy takes the largest gain of R, any other step the largest gain of C. A sharp question
(small beta) therefore takes relevant tokens early. Needs text, no
attention; features behind the projector; drops, never merges.

Not known from the formulas: the temperatures, here those of MMTok; the bounds of beta's clipping, here 0 and 1; which
step of the coverage-only greedy is compared, here the one with as many picks. The swap refinement behind the greedy and
the budget shared by the crops of an image are not described in enough detail and left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._greedy import greedy_in_turn
from apet.methods._options import check_range
from apet.methods._select import cosine, pruned
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class StackTok(Method):
    """Relevance and coverage in turn.

    Attributes:
        text_temperature: Of the softmax of question tokens over image tokens.
        image_temperature: Of that of image tokens.
    """

    name = "stacktok"
    paper = "StackTok"
    idea = "greedy coverage of the image, and of the text where the image is covered well enough"
    stages = ("vision",)
    features = "post_projector"
    needs_text_embeddings = True

    text_temperature: float = 0.02
    image_temperature: float = 0.2

    def __post_init__(self) -> None:
        check_range(self, ("text_temperature", "image_temperature"), 1e-3)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the greedy set."""
        text, mask = context.ask(self, "text_embeddings")
        coverage = (cosine(tokens) / self.image_temperature).softmax(-1)
        rows = (cosine(text, tokens) / self.text_temperature).softmax(-1)
        entropy = -torch.special.xlogy(rows, rows).sum(-1) / torch.tensor(float(tokens.shape[1])).log().item()
        beta = ((entropy * mask).sum(-1) / mask.sum(-1).clamp(min=1)).clamp(0, 1)
        picks = greedy_in_turn(rows * mask.unsqueeze(-1), coverage, beta, keep)
        return pruned(tokens, picks.sort(dim=-1).values)
