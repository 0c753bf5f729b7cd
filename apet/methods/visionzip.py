"""VisionZip: keep the tokens CLS attends to, merge the rest into a few evenly spaced contextual tokens.

Paper: VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv 2412.04467. Dominant tokens are
the top ones by CLS attention of vision layer -2, summed over heads. Of the remaining tokens evenly stepped ones
become targets; every other remaining token joins the target of largest cosine between head-averaged keys of that
layer, and a target becomes x_t + mean of its members: the published code adds the mean, it does not average with it.
Needs one row of attention and the keys of vision layer -2. Published splits are 54 + 10, 108 + 20 and 162 + 30.

Deviations: CLS itself is not passed on, all dominant tokens are patches (the block holds patches only); contextual
rows stand in raster order at their target's index unless `legacy_order` appends them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods._options import check_range
from apet.methods._select import cosine, in_raster_order, others, packed, pool, top_sorted, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant tokens by CLS attention plus contextual tokens by key similarity.

    Attributes:
        contextual: Share of the budget that goes to contextual tokens, rounded down.
        legacy_order: Append the contextual rows after the dominant ones; `indices` are then not ascending.
    """

    name = "visionzip"
    paper = "VisionZip"
    arxiv = "2412.04467"
    idea = "top CLS attention, the rest merged into evenly spaced tokens by key similarity"
    stages = ("vision",)
    needs_cls_attention = (-2,)
    needs_vision_keys = (-2,)

    contextual: float = 10 / 64
    legacy_order: bool = False

    def __post_init__(self) -> None:
        check_range(self, ("contextual",), 0, 1)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the dominant tokens and add the contextual ones."""
        n = tokens.shape[1]
        scores = wide(context.ask(self, "cls_attention", -2)).sum(1)
        keys = wide(context.ask(self, "vision_keys", -2)).mean(1)
        extra = int(keep * self.contextual)
        dominant = top_sorted(scores, keep - extra)
        rest = others(dominant, n)
        targets = rest[:, :: (n - keep + extra) // max(1, extra)][:, :extra]
        x = wide(tokens)
        members = others(torch.cat([dominant, targets], 1), n)
        indices = torch.cat([dominant, targets], 1)
        rows = torch.arange(keep, device=x.device).expand(x.shape[0], keep)
        sources = torch.full(x.shape[:2], -1, device=x.device).scatter(1, indices, rows)
        features = gather_rows(x, indices)
        if extra:
            joined = cosine(gather_rows(keys, members), gather_rows(keys, targets)).argmax(-1)
            sources = sources.scatter(1, members, joined + (keep - extra))
            added = pool(gather_rows(x, members), joined, extra)
            features = torch.cat([features[:, : keep - extra], features[:, keep - extra :] + added], 1)
        build = packed if self.legacy_order else in_raster_order
        return build(tokens, features, indices, sources, scores)
