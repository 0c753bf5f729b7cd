"""ApET as published: farthest-point basis, least-squares error, keep the worst rebuilt, merge the rest.

Paper: arXiv 2602.19870 (CVPR 2026). Needs neither text nor attention. Deviations from the published code, all stated
in the algorithm specification section 3: deterministic start, float32 throughout, stable ties, safe degenerate cases.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apet.compressor import compress
from apet.config import ApetConfig
from apet.core.types import CompressedTokens
from apet.methods._budget import vision_and_middle
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class Apet(Method):
    """Approximation-error guided selection and merging."""

    name = "apet"
    paper = "ApET"
    arxiv = "2602.19870"
    idea = "keep the tokens that a few basis tokens rebuild worst, merge the rest into the kept ones"

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Run `apet.compress` with the family's stage preset and the user's options."""
        config, preset = context.config, context.preset
        return compress(
            tokens,
            keep,
            basis=config.basis_token_num,
            basis_selection=config.basis_selection,
            start=None if config.fps_start == "farthest" else config.fps_start,
            ridge=preset.ridge,
            slots=preset.slots,
            insertion=preset.insertion,
            generator=torch.Generator().manual_seed(config.seed) if config.basis_selection == "random" else None,
        )

    def reads(self, config: ApetConfig) -> Collection[str]:
        """Everything about the basis; where it starts for farthest points alone."""
        return ("basis_selection", "fps_start") if config.basis_selection == "fps" else ("basis_selection",)

    def plan(self, average: float, tokens: int, layers: int) -> dict[str, Any]:
        """(288, 96), (192, 64) and (96, 32) for 192, 128 and 64 tokens of LLaVA-1.5."""
        return vision_and_middle(average, tokens, layers)
