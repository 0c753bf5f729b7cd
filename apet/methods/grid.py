"""Tokens at the centres of a coarser grid: the two-dimensional form of even spacing.

The grid has at most T cells, as many as possible, with the aspect nearest to the image's; what is left of the budget
goes to evenly spaced unused tokens. Needs nothing but the shape of the block; where that is not a full grid (behind
an earlier stage) it equals `uniform`.
"""

from dataclasses import dataclass

from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._grid import cell_grid, even_positions, filled, grid_of, shared_positions
from apet.methods._select import pruned
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class Grid(Method):
    """Cell centres of a coarser grid."""

    name = "grid"
    idea = "tokens at the cell centres of a coarser grid"

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the same cell centres in every block."""
        batch, n = tokens.shape[:2]
        rows, columns = grid_of(context, n)
        height, width = cell_grid(rows, columns, keep)
        across = even_positions(columns, width)
        centres = [row * columns + column for row in even_positions(rows, height) for column in across]
        return pruned(tokens, shared_positions(sorted(filled(centres, n, keep)), batch, tokens.device))
