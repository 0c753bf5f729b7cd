"""Positions that depend on the shape only: even spacing, cells of a grid, windows and crops."""

from functools import lru_cache

import torch
from torch import Tensor

from apet.methods.base import StageContext


def grid_of(context: StageContext, n: int) -> tuple[int, int]:
    """(rows, columns) of a block of `n` tokens; one row where the tokens are not a full grid."""
    grid = context.grid
    return grid if grid is not None and grid[0] * grid[1] == n else (1, n)


def even_positions(n: int, k: int) -> list[int]:
    """`k` evenly spaced positions of 0..n-1: floor((j + 1/2) n / k)."""
    return [(2 * j + 1) * n // (2 * k) for j in range(k)]


def filled(taken: list[int], n: int, k: int) -> list[int]:
    """`taken` and evenly spaced unused positions behind it, `k` in all."""
    used = set(taken)
    unused = [position for position in range(n) if position not in used]
    return taken + [unused[j] for j in even_positions(len(unused), k - len(taken))]


@lru_cache(maxsize=256)
def cell_grid(rows: int, columns: int, k: int) -> tuple[int, int]:
    """Grid of at most `k` cells: as many as possible, then the aspect nearest to rows / columns, then fewer rows."""
    candidates = [(height, min(columns, k // height)) for height in range(1, min(rows, k) + 1)]

    def order(cell: tuple[int, int]) -> tuple[float, ...]:
        across, down = cell[0] * columns, cell[1] * rows
        return -cell[0] * cell[1], max(across, down) / min(across, down), cell[0]

    return min(candidates, key=order)


def window_ids(grid: tuple[int, int], per_side: int, device: torch.device) -> Tensor:
    """Window (N,) of every token of a grid cut into `per_side` x `per_side` windows."""
    rows, columns = grid
    down = torch.arange(rows, device=device) * per_side // rows
    across = torch.arange(columns, device=device) * per_side // columns
    return (down.unsqueeze(1) * per_side + across).flatten()


def crop_ids(n: int, crops: int, device: torch.device) -> Tensor:
    """Crop (N,) of every token of a sequence cut into contiguous crops, the first n % crops of them one longer."""
    size, longer = divmod(n, crops)
    edge = longer * (size + 1)
    position = torch.arange(n, device=device)
    return torch.where(position < edge, position // (size + 1), longer + (position - edge) // max(1, size))


def shared_positions(positions: list[int], batch: int, device: torch.device) -> Tensor:
    """The same positions (B, k) for every sample of a batch."""
    return torch.tensor(positions, dtype=torch.int64).to(device, non_blocking=True).expand(batch, -1)
