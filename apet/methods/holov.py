"""HoloV: share the budget among crops by their attention, then keep the most attended tokens of each crop.

Paper: Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention, arXiv 2510.02912.
The tokens behind the projector are cut into 16 contiguous raster crops. A token's score is its CLS attention (vision
layer -2, head mean, times 1000) plus 0.09 times the variance of its cosines within the crop, rescaled to the
attention's mean; a crop's quota is its share of the mean scores. Needs one attention row.

Deviations: inside a crop the published code keeps the top tokens by attention although the paper says by score;
attention is the default, `inside` switches. Quota that a small crop cannot use goes to the most attended tokens left,
where the code pads with zero rows. Rows are in raster order; `legacy_order` puts crop after crop by falling score.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods._grid import crop_ids
from apet.methods._options import check_choice, check_range
from apet.methods._select import cosine, own_rows, packed, pruned, rank_within, top, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class HoloV(Method):
    """Quota per crop, top attention inside.

    Attributes:
        crops: Number P of contiguous crops.
        variance: Weight of the variance term.
        inside: What ranks the tokens of a crop: "attention" (code) or "score" (paper).
        legacy_order: Crop after crop, largest first; `indices` are then not ascending.
    """

    name = "holov"
    paper = "HoloV"
    arxiv = "2510.02912"
    idea = "budget per crop by its attention, top attention inside"
    stages = ("vision",)
    features = "post_projector"
    needs_cls_attention = (-2,)

    crops: int = 16
    variance: float = 0.09
    inside: str = "attention"
    legacy_order: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "inside", ("attention", "score"))
        check_range(self, ("crops",), 1)
        check_range(self, ("variance",), 0)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Fill every crop's quota."""
        batch, n = tokens.shape[:2]
        attention = 1e3 * wide(context.ask(self, "cls_attention", -2)).mean(1)
        count = min(self.crops, n)
        crop = crop_ids(n, count, tokens.device)
        member = torch.nn.functional.one_hot(crop, count).to(attention.dtype)
        member = member / member.sum(0)
        spread = _variance(cosine(tokens), crop)
        spread = spread * ((attention.abs() @ member) / (spread.abs() @ member + 1e-6))[:, crop]
        scores = attention + self.variance * spread
        quota = _quotas(scores @ member, keep)[:, crop]
        inside = attention if self.inside == "attention" else scores
        groups = crop.expand(batch, n)
        chosen = rank_within(inside, groups) < quota
        picks = top(inside.masked_fill(chosen, torch.inf), keep)
        if not self.legacy_order:
            return pruned(tokens, picks.sort(dim=-1).values, scores)
        picks = picks.sort(dim=-1).values
        by_score = picks.gather(1, inside.gather(1, picks).sort(dim=-1, descending=True, stable=True).indices)
        picks = by_score.gather(1, groups.gather(1, by_score).sort(dim=-1, stable=True).indices)
        return packed(tokens, gather_rows(tokens, picks), picks, own_rows(picks, n), scores)


def _variance(similarity: Tensor, crop: Tensor) -> Tensor:
    """Spread (B, N) of every token's cosines to the other tokens of its crop; its own entry counts as a zero."""
    n = similarity.shape[1]
    same = crop.unsqueeze(0) == crop.unsqueeze(1)
    itself = torch.eye(n, dtype=torch.bool, device=crop.device)
    others = (same.sum(-1) - 1).clamp(min=1)
    similarity = similarity.masked_fill(itself | ~same, 0)
    mean = similarity.sum(-1) / others
    return ((similarity - mean.unsqueeze(-1)).square() * same).sum(-1) / others


def _quotas(means: Tensor, keep: int) -> Tensor:
    """Tokens (B, P) of every crop: floor of its share, and one more for the heaviest crops."""
    share = means / means.sum(-1, keepdim=True)
    quota = (share * keep).floor().long()
    left = keep - quota.sum(-1, keepdim=True)
    return quota + (rank_within(share, torch.zeros_like(quota)) < left)
