"""Evenly spaced tokens of the sequence: the cheapest baseline that covers the whole image.

Position j of T is floor((j + 1/2) N / T). It needs nothing, and the others are dropped, not merged.
"""

from dataclasses import dataclass

from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._grid import even_positions, shared_positions
from apet.methods._select import pruned
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class Uniform(Method):
    """Every (N / T)-th token in raster order."""

    name = "uniform"
    idea = "evenly spaced tokens of the raster sequence"

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the same evenly spaced positions in every block."""
        batch, n = tokens.shape[:2]
        return pruned(tokens, shared_positions(even_positions(n, keep), batch, tokens.device))
