"""Tokens of largest (or smallest) L2 norm: a two-line control.

Reconstruction error grows with a token's norm, so an error-based method must be compared with the norm itself. Needs
nothing; drops, never merges.
"""

from dataclasses import dataclass

from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._select import pruned, top_sorted, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class Norm(Method):
    """Top tokens by norm.

    Attributes:
        smallest: Keep the smallest norms instead.
    """

    name = "norm"
    idea = "tokens of largest L2 norm"

    smallest: bool = False

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the `keep` largest norms."""
        norms = wide(tokens).norm(dim=-1)
        return pruned(tokens, top_sorted(-norms if self.smallest else norms, keep), norms)
