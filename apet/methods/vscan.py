"""VScan: local and global scans of CLS attention in the encoder with merging, then one attention cut in the decoder.

Paper: VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models, arXiv 2505.22654. Vision
stage: half of the budget is spread evenly over 4 x 4 windows, inside a window by the CLS attention of a shallow layer
(5); the rest goes to the top of what is left by layer -2. Behind the projector every dropped token is averaged into
its most similar kept one. Decoder stage, published before layer 16 of 32: the last prompt token's attention in the
layer about to run, no merge. Needs these attention rows only.

Deviation: images that are not 24 x 24 use the same 4 x 4 windows, unequal ones where the sides are not multiples of
4.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._budget import vision_and_middle
from apet.methods._grid import grid_of, window_ids
from apet.methods._options import check_range
from apet.methods._select import nearest_rows, packed, pool, pruned, rank_within, top_sorted, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class VScan(Method):
    """Local and global scan with merging, then last-token attention.

    Attributes:
        local: Share of the vision budget for the windows.
        windows: Windows per side.
        shallow: Block of the tower whose attention is read per window; published for towers of 24 blocks.
    """

    name = "vscan"
    paper = "VScan"
    arxiv = "2505.22654"
    idea = "CLS attention per window and over all, merging; last-token attention at half depth"
    features = "post_projector"
    needs_attention_row = (0,)

    local: float = 0.5
    windows: int = 4
    shallow: int = 5

    def __post_init__(self) -> None:
        check_range(self, ("local",), 0, 1)
        check_range(self, ("windows",), 1)

    def needs(self, stage: str) -> dict[str, tuple[int, ...]]:
        return {"cls_attention": (self.shallow, -2)} if stage == "vision" else super().needs(stage)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Scan and merge at the vision stage, cut by attention in the decoder."""
        if context.stage == "llm":
            scores = wide(context.ask(self, "attention_row", context.layer)).mean(1)
            return pruned(tokens, top_sorted(scores, keep), scores)
        shallow = wide(context.ask(self, "cls_attention", self.shallow)).mean(1)
        scores = wide(context.ask(self, "cls_attention", -2)).mean(1)
        window = window_ids(grid_of(context, tokens.shape[1]), self.windows, tokens.device).expand_as(scores)
        per_window = int(keep * self.local) // self.windows**2
        local = rank_within(shallow, window) < per_window
        indices = top_sorted(scores.masked_fill(local, torch.inf), keep)
        x = wide(tokens)
        sources = nearest_rows(x, indices)
        return packed(tokens, pool(x, sources, keep), indices, sources, scores)

    def plan(self, average: float, tokens: int, layers: int) -> dict[str, Any]:
        """(288, 96), (192, 64) and (96, 32) for 192, 128 and 64 tokens of LLaVA-1.5."""
        return vision_and_middle(average, tokens, layers)
