"""SparseVLM: score image tokens by the attention of the text tokens that matter, recycle some of the dropped ones.

Paper: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, arXiv 2410.04417 (version
1). Raters are the text tokens whose mean relevance to the image, softmax over text of the products of the embeddings,
exceeds the average. Before layers 2, 6 and 15 of 32 a token's score is the raters' attention to it, averaged over
raters and heads. Of the dropped tokens the best 30 % (plus one) are clustered by density peaks into a tenth as many
(plus one) rows, each the sum of its members. Needs the raters' attention rows at these layers and the embeddings.

Deviations: attention is that of the layer about to run. The recycled rows are part of the budget, so that a stage
returns exactly T rows; a budget too small for one recycled and one kept token has none. `plan` scales the published
counts to the layer average. A recycled row carries its cluster centre's index and stands there; `legacy_order`
appends them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apet.core.basis import density_peaks
from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods._budget import check_reachable, scaled_stops
from apet.methods._options import check_range
from apet.methods._select import in_raster_order, others, packed, pool, top_sorted, wide
from apet.methods.base import Method, StageContext, register

# Published counts after the three stops, of 576 tokens, by layer average.
_COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


@register
@dataclass(frozen=True)
class SparseVLM(Method):
    """Text-guided attention with recycling.

    Attributes:
        recycle: Cluster part of the dropped tokens into rows of their own.
        recycled: Share of the dropped tokens that is clustered.
        members: Tokens per cluster, about.
        stops: Stops as shares of the depth; used by `plan`.
        legacy_order: Append the recycled rows; `indices` are then not ascending.
    """

    name = "sparsevlm"
    paper = "SparseVLM"
    arxiv = "2410.04417"
    idea = "attention of image-relevant text tokens at three depths, dropped tokens recycled"
    stages = ("llm",)
    needs_text_attention = (0,)
    needs_text_embeddings = True
    needs_image_embeddings = True

    recycle: bool = True
    recycled: float = 0.3
    members: int = 10
    stops: tuple[float, ...] = (2 / 32, 6 / 32, 15 / 32)
    legacy_order: bool = False

    def __post_init__(self) -> None:
        check_range(self, ("recycled",), 0, 1)
        check_range(self, ("members",), 1)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the tokens the raters attend to; cluster some of the others."""
        batch, n = tokens.shape[:2]
        scores = self._scores(context)
        own = self._own_rows(n, keep)
        kept = top_sorted(scores, own)
        pool_size, clusters = self._clusters(n - own) if own < keep else (0, 0)
        x = wide(tokens)
        rest = others(kept, n)
        best = rest.gather(1, top_sorted(scores.gather(1, rest), pool_size))
        indices, features = kept, gather_rows(x, kept)
        rows = torch.arange(own, device=x.device).expand(batch, own)
        sources = torch.full((batch, n), -1, device=x.device).scatter(1, kept, rows)
        if clusters:
            members = gather_rows(x, best)
            centres = _distinct(density_peaks(members, clusters)[0], pool_size)
            cluster = _assign(members, centres)
            features = torch.cat([features, pool(members, cluster, clusters, mean=False)], 1)
            indices = torch.cat([kept, best.gather(1, centres)], 1)
            sources = sources.scatter(1, best, cluster + own)
        build = packed if self.legacy_order else in_raster_order
        return build(tokens, features, indices, sources, scores)

    def _scores(self, context: StageContext) -> Tensor:
        """Attention (B, N), averaged over heads and raters."""
        text, mask = context.ask(self, "text_embeddings")
        image = wide(context.ask(self, "image_embeddings"))
        products = (image @ wide(text).transpose(1, 2)).masked_fill(~mask.unsqueeze(1), -torch.inf)
        relevance = products.softmax(-1).mean(1)
        average = relevance.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        # Equal relevance exceeds no average: then every text token rates.
        raters = (relevance > average) & mask
        raters = torch.where(raters.any(-1, keepdim=True), raters, mask)
        share = (raters / raters.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(-1)
        attention = wide(context.ask(self, "text_attention", context.layer)).mean(1)
        return (attention * share).sum(1)

    def _clusters(self, dropped: int) -> tuple[int, int]:
        """Tokens that are clustered, and clusters, when `dropped` tokens are not kept."""
        size = min(dropped, int(self.recycled * dropped) + 1)
        return size, min(size, size // self.members + 1)

    def _own_rows(self, n: int, keep: int) -> int:
        """Rows of `keep` that are kept tokens; the others are recycled ones."""
        if self.recycle:
            for own in range(keep - 1, 0, -1):
                if own + self._clusters(n - own)[1] == keep:
                    return own
        return keep

    def plan(self, average: float, tokens: int, layers: int) -> dict[str, Any]:
        """The published counts nearest to the average, scaled so that the layers average it."""
        if average >= tokens:
            return {}
        stops = scaled_stops(self.stops, layers)
        check_reachable(self.name, average, stops, [tokens, *([1] * len(stops))], layers)
        nearest = min(_COUNTS, key=lambda budget: abs(budget - 576 * average / tokens))
        spans = [end - start for start, end in zip(stops, [*stops[1:], layers], strict=True)]
        rest = layers * average - stops[0] * tokens
        scale = rest / sum(span * count for span, count in zip(spans, _COUNTS[nearest], strict=True))
        counts = [min(tokens, max(1, round(scale * count))) for count in _COUNTS[nearest]]
        return {"layer_list": tuple(stops), "image_token_list": tuple(counts)}


def _distinct(centres: Tensor, n: int) -> Tensor:
    """The centres, ascending, with other positions in place of the missing ones (-1) where members are equal."""
    mask = torch.zeros(centres.shape[0], n + 1, dtype=torch.int64, device=centres.device)
    mask = mask.scatter(1, torch.where(centres < 0, n, centres), 1)[:, :n]
    return mask.sort(dim=-1, descending=True, stable=True).indices[:, : centres.shape[1]]


def _assign(members: Tensor, centres: Tensor) -> Tensor:
    """Cluster (B, M) of every member: its nearest centre; a centre belongs to itself."""
    cluster = torch.cdist(members, gather_rows(members, centres), compute_mode="donot_use_mm_for_euclid_dist").argmin(
        -1
    )
    number = torch.arange(centres.shape[1], device=centres.device).expand_as(centres)
    return cluster.scatter(1, centres, number)
