"""DART: keep the tokens least like a few pivots, so that duplicates go.

Paper: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494.
Before layer K = 2: pivots are the 4 image and 4 text tokens with the largest L1 norm of cached keys (heads together).
Each pivot in turn takes the image tokens not yet selected that are least cosine-similar to it, on the last layer's
output through the final norm. Needs the cached keys of the layer before and the text's hidden states, no attention.

Deviations: the budget is met exactly: the first pivots take one token more where the rest does not divide by the
number of pivots (the published code keeps 8 floor(T / 8) + 4), and `plan` states it as a layer average. Pivots take
turns image tokens first, each kind by falling norm. Where a sample has fewer text tokens than pivots, the first ones
serve again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods._budget import single_stop
from apet.methods._options import check_range
from apet.methods._select import marked, pruned, top, unit, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class Dart(Method):
    """Least duplicated tokens with respect to pivots.

    Attributes:
        image_pivots: Pivots among the image's tokens; they are kept.
        text_pivots: Pivots among the text.
        stop: Layers K that run on all tokens; used by `plan`.
    """

    name = "dart"
    paper = "DART"
    arxiv = "2502.11494"
    idea = "tokens least similar to a few pivots of large key norm, after decoder layer 2"
    stages = ("llm",)
    needs_keys = (-1,)
    needs_text_keys = (-1,)
    needs_text_embeddings = True
    needs_text_hidden = True
    needs_final_norm = True

    image_pivots: int = 4
    text_pivots: int = 4
    stop: int = 2

    def __post_init__(self) -> None:
        check_range(self, ("image_pivots", "stop"), 1)
        check_range(self, ("text_pivots",), 0)

    def needs(self, stage: str) -> dict[str, tuple[int, ...]]:
        declared = super().needs(stage)
        return declared if self.text_pivots else {name: declared[name] for name in ("keys", "final_norm")}

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the image pivots and what the pivots take in turn."""
        norms = _key_norms(context.ask(self, "keys", context.layer - 1))
        images = top(norms, min(self.image_pivots, keep))
        states = context.ask(self, "final_norm", tokens)
        pivots = gather_rows(states, images)
        if self.text_pivots and images.shape[1] < keep:
            pivots = torch.cat([pivots, self._text_pivots(context).to(pivots.dtype)], 1)
        similarity = unit(pivots) @ unit(states).transpose(1, 2)
        taken = marked(images, tokens.shape[1])
        each, more = divmod(keep - images.shape[1], pivots.shape[1])
        for number in range(pivots.shape[1]):
            free = -similarity[:, number].masked_fill(taken, torch.inf)
            taken = taken.scatter(1, top(free, each + (number < more)), True)
        indices = taken.long().sort(dim=-1, descending=True, stable=True).indices[:, :keep]
        return pruned(tokens, indices, norms)

    def _text_pivots(self, context: StageContext) -> Tensor:
        """Normed hidden states (B, p, D) of the text tokens with the largest keys."""
        _, mask = context.ask(self, "text_embeddings")
        norms = _key_norms(context.ask(self, "text_keys", context.layer - 1)).masked_fill(~mask, -torch.inf)
        count = self.text_pivots if mask.shape[1] else 0
        turn = torch.arange(count, device=mask.device) % mask.sum(-1, keepdim=True).clamp(min=1)
        positions = top(norms, min(count, mask.shape[1])).gather(1, turn)
        return context.ask(self, "final_norm", gather_rows(context.ask(self, "text_hidden"), positions))

    def plan(self, average: float, tokens: int, layers: int) -> dict[str, Any]:
        """One cut after `stop` layers."""
        return single_stop(self.name, average, tokens, layers, self.stop)


def _key_norms(keys: Tensor) -> Tensor:
    """L1 norm (B, N) of every token's keys (B, heads, N, d), heads together."""
    return wide(keys).abs().sum((1, 3))
