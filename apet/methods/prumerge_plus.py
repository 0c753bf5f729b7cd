"""PruMerge+: tokens CLS attends to and evenly spaced ones, enriched with their neighbours.

Paper: LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, arXiv 2403.15388. The attention
is that of the last vision block with all heads as one: softmax(q k^T / sqrt(C)). Every kept token i becomes x_i + sum
a_j x_j over the 32 other tokens with the most similar keys; one more row holds sum a_j x_j over all tokens not kept.
Needs the CLS row and the keys of vision layer -1.

Deviations: the published count follows from the image (outliers of the attention); here it is fixed: one row is the
extra one, half of the others (rounded up) are the top by attention, the rest evenly spaced over what is left. The
full-width attention is rebuilt exactly from the per-head rows (`_full_width`). The extra row carries the index of the
last token that is not kept and stands there; `legacy_order` puts it last. A budget of one token has no extra row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods._grid import even_positions, shared_positions
from apet.methods._options import check_range
from apet.methods._select import cosine, in_raster_order, others, packed, top, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class PruMergePlus(Method):
    """Attention and spatial samples, each with its key neighbours added.

    Attributes:
        neighbours: Tokens added to each kept one.
        legacy_order: Put the extra row last; `indices` are then not ascending.
    """

    name = "prumerge_plus"
    paper = "LLaVA-PruMerge"
    arxiv = "2403.15388"
    idea = "top CLS attention plus evenly spaced tokens, each with its key neighbours added"
    stages = ("vision",)
    needs_cls_attention = (-1,)
    needs_vision_keys = (-1,)

    neighbours: int = 32
    legacy_order: bool = False

    def __post_init__(self) -> None:
        check_range(self, ("neighbours",), 0)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Sample, enrich, and add what was left out as one row."""
        batch, n = tokens.shape[:2]
        x = wide(tokens)
        scores = _full_width(wide(context.ask(self, "cls_attention", -1)))
        keys = wide(context.ask(self, "vision_keys", -1)).transpose(1, 2).flatten(2)
        own = max(1, keep - 1)
        kept = _sample(scores, own)
        near = cosine(gather_rows(keys, kept), keys).scatter(2, kept.unsqueeze(-1), -torch.inf)
        near = near.sort(dim=-1, descending=True, stable=True).indices[:, :, : min(self.neighbours, n - 1)]
        weight = torch.zeros(batch, own, n, dtype=x.dtype, device=x.device).scatter(2, near, 1.0)
        features = gather_rows(x, kept) + (weight * scores.unsqueeze(1)) @ x
        rest = others(kept, n)
        extra = (scores.gather(1, rest).unsqueeze(1) @ gather_rows(x, rest))[:, : keep - own]
        indices = torch.cat([kept, rest[:, n - own - (keep - own) :]], 1)
        rows = torch.arange(own, device=x.device).expand(batch, own)
        sources = torch.full((batch, n), own if keep > own else -1, device=x.device).scatter(1, kept, rows)
        build = packed if self.legacy_order else in_raster_order
        return build(tokens, torch.cat([features, extra], 1), indices, sources, scores)


def _sample(scores: Tensor, count: int) -> Tensor:
    """Ascending positions (B, count): half by score, half evenly spaced over the others."""
    batch, n = scores.shape
    best = top(scores, (count + 1) // 2)
    rest = others(best, n)
    spaced = shared_positions(even_positions(rest.shape[1], count // 2), batch, scores.device)
    return torch.cat([best, rest.gather(1, spaced)], 1).sort(dim=-1).values


def _full_width(attention: Tensor) -> Tensor:
    """Attention (B, N) of CLS with all heads as one, from the per-head rows (B, H, N).

    The logarithm of a head's row is its logit up to a constant, and the full-width logit q.k / sqrt(C) is the sum of
    the heads' logits over sqrt(H). CLS's own share of a head is what its row lacks to 1.
    """
    own = (1 - attention.sum(-1, keepdim=True)).clamp(min=0)
    tiny = torch.finfo(attention.dtype).tiny
    logits = torch.cat([own, attention], -1).clamp(min=tiny).log().sum(1) / attention.shape[1] ** 0.5
    return logits.softmax(-1)[:, 1:]
