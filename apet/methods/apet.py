"""ApET as published: farthest-point basis, least-squares error, keep the worst rebuilt, merge the rest.

Paper: arXiv 2602.19870 (CVPR 2026). Needs neither text nor attention. Deviations from the published code, all stated in
the algorithm specification section 3: deterministic start, float32 throughout, stable ties, safe degenerate cases.
"""

import torch
from torch import Tensor

from apet.compressor import compress
from apet.core.types import CompressedTokens
from apet.methods.base import Method, StageContext, register


@register
class Apet(Method):
    """Approximation-error guided selection and merging."""

    name = "apet"

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
