"""Random selection: the ceiling on speed and the floor on quality that every method is compared with.

Keeps uniformly drawn tokens and drops the others, no merging. The draw depends on the seed, the stage and the block
length only, so answers do not depend on batching; different seeds give different draws.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.basis import random_positions
from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class Random(Method):
    """Uniform selection without replacement."""

    name = "random"
    idea = "tokens drawn uniformly without replacement"

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the same random positions in every block."""
        generator = torch.Generator().manual_seed(2 * context.config.seed + (context.stage == "llm"))
        drawn, _ = random_positions(tokens, keep, generator=generator)
        indices = drawn.sort(dim=-1).values
        batch, n = tokens.shape[:2]
        rows = torch.arange(keep, device=tokens.device).expand(batch, keep)
        sources = torch.full((batch, n), -1, device=tokens.device).scatter(1, indices, rows)
        errors = torch.zeros(batch, n, device=tokens.device)
        return CompressedTokens(gather_rows(tokens, indices), indices, errors, indices[:, :0], sources)
