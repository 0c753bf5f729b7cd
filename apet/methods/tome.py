"""ToMe at the encoder's output: pair alternate tokens by cosine, merge the most similar pairs, repeat.

Paper: Token Merging: Your ViT But Faster, arXiv 2210.09461. Needs nothing beyond the tokens. Of a sequence of t
tokens the even positions A each find their most similar odd token B; the r = min(t - T, floor(t / 2)) most similar of
A are averaged into it, weighted by the number of tokens behind each; the unmerged of A, then all of B, are the next
sequence.

Deviation from the paper: it merges in every encoder block, with attention keys as metric and proportional attention;
here the output features are merged repeatedly until T are left, with themselves as metric. A row carries the index of
the odd token it grew from; `apet.core.types.token_sizes` gives the sizes for a log-size bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods._select import cosine, in_raster_order, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class ToMe(Method):
    """Bipartite soft matching, applied to the output."""

    name = "tome"
    paper = "ToMe"
    arxiv = "2210.09461"
    idea = "merge the most similar of alternate tokens until the budget is met"
    reads_sizes = True

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Merge in rounds until `keep` rows are left."""
        x = wide(tokens)
        batch, n = x.shape[:2]
        ones = torch.ones(batch, n, dtype=x.dtype, device=x.device)
        size = ones if context.sizes is None else context.sizes.to(x.dtype)
        indices = torch.arange(n, device=x.device).expand(batch, n)
        sources = indices
        while x.shape[1] > keep:
            count = x.shape[1]
            row = _merge_rows(x, min(count - keep, count // 2))
            x, size, indices = _apply(x, size, indices, row, max(keep, count - count // 2))
            sources = row.gather(1, sources)
        return in_raster_order(tokens, x, indices, sources)


def _merge_rows(x: Tensor, r: int) -> Tensor:
    """Row (B, t) of every token in the next, shorter sequence."""
    batch, count = x.shape[:2]
    even = (count + 1) // 2
    best = cosine(x[:, 0::2], x[:, 1::2]).max(-1)
    order = best.values.sort(dim=-1, descending=True, stable=True).indices
    unmerged = order[:, r:].sort(dim=-1).values
    row = torch.empty(batch, count, dtype=torch.int64, device=x.device)
    row[:, 1::2] = torch.arange(count - even, device=x.device) + (even - r)
    places = torch.arange(even - r, device=x.device).expand_as(unmerged)
    row[:, 0::2] = (best.indices + (even - r)).scatter(1, unmerged, places)
    return row


def _apply(x: Tensor, size: Tensor, indices: Tensor, row: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Size-weighted means, sizes and indices of the next sequence; the last token of a row lends it its index."""
    number = torch.arange(count, device=x.device).view(1, -1, 1)
    weight = (row.unsqueeze(1) == number).to(x.dtype) * size.unsqueeze(1)
    total = weight.sum(-1)
    # Odd tokens are never merged away: each is the receiver of its row, and rows without one hold a single token.
    odd = torch.arange(row.shape[1], device=x.device) % 2
    receiver = ((weight > 0) * (1 + odd)).argmax(-1)
    alone = (weight > 0).sum(-1, keepdim=True) == 1
    features = torch.where(alone, gather_rows(x, receiver), weight @ x / total.unsqueeze(-1))
    return features, total, indices.gather(1, receiver)
