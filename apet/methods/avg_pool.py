"""Average pooling of the feature map to a coarser grid: a smaller image of the same size in tokens.

24 x 24 features become 8 x 8 for 64 tokens, 8 x 16 for 128, 12 x 16 for 192; cells follow adaptive average pooling,
[floor(i H / h), ceil((i + 1) H / h)). Needs nothing but the shape of the block; a block that is not a full grid is
pooled as one row.

Deviation from plain pooling: a budget that no grid fills exactly gets evenly spaced single tokens for the rest, so
that every method returns exactly T rows. A pooled row carries the index of its cell's centre, rounded down. Where
cells overlap, the source map names one of a token's cells.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods._grid import cell_grid, filled, grid_of, shared_positions
from apet.methods._select import in_raster_order, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class AvgPool(Method):
    """Means over the cells of a coarser grid."""

    name = "avg_pool"
    idea = "average pooling of the feature map to a coarser grid"

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Pool to the best-fitting grid and fill up with single tokens."""
        batch, n = tokens.shape[:2]
        grid = grid_of(context, n)
        cells = cell_grid(*grid, keep)
        centres = [
            row * grid[1] + column for row in _centres(grid[0], cells[0]) for column in _centres(grid[1], cells[1])
        ]
        indices = shared_positions(filled(centres, n, keep), batch, tokens.device)
        x = wide(tokens)
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, grid), cells)
        single = gather_rows(x, indices[:, len(centres) :])
        features = torch.cat([pooled.flatten(2).transpose(1, 2), single], 1)
        rows = torch.arange(keep, device=tokens.device).expand(batch, keep)
        sources = _cell_of(grid, cells, tokens.device).expand(batch, n).scatter(1, indices, rows)
        return in_raster_order(tokens, features, indices, sources)


def _centres(length: int, cells: int) -> list[int]:
    """Middle position, rounded down, of every adaptive cell along one axis."""
    return [(i * length // cells - (-(i + 1) * length // cells) - 1) // 2 for i in range(cells)]


def _cell_of(grid: tuple[int, int], cells: tuple[int, int], device: torch.device) -> Tensor:
    """A cell (N,) that contains each token."""
    down = torch.arange(grid[0], device=device) * cells[0] // grid[0]
    across = torch.arange(grid[1], device=device) * cells[1] // grid[1]
    return (down.unsqueeze(1) * cells[1] + across).flatten()
