"""Greedy subset selection on a matrix per sample: max-min distance and coverage; `_volume` holds log-determinant.

Every function runs a fixed number of steps on device tensors, without host synchronisation; the lower position wins a
tie.
"""

import torch
from torch import Tensor

_TIE = 1e-6


def column_of(matrix: Tensor, pick: Tensor) -> Tensor:
    """Column (B, R) at `pick` (B,) of every matrix (B, R, N)."""
    return matrix.gather(2, pick.view(-1, 1, 1).expand(-1, matrix.shape[1], 1)).squeeze(2)


def greedy_max_min(distance: Tensor, k: int) -> Tensor:
    """Picks (B, k), each the token farthest from its nearest earlier pick; symmetric `distance` (B, N, N).

    The first pick is the token whose nearest other token is farthest away.
    """
    n = distance.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=distance.device)
    pick = distance.masked_fill(itself, torch.inf).amin(-1).argmax(-1)
    gap = torch.full_like(distance[:, 0], torch.inf)
    picks = []
    for _ in range(k):
        picks.append(pick)
        gap = torch.minimum(gap, column_of(distance, pick)).scatter(1, pick.unsqueeze(1), -torch.inf)
        pick = gap.argmax(-1)
    return torch.stack(picks, 1)


def greedy_coverage(matrix: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Picks (B, k) of columns, each with the largest gain of sum_rows max(0, best picked entry of the row).

    Args:
        matrix: (B, R, N) how well column n covers row r.
        k: Number of picks.
        weight: (B, N) factors on the gain of a column; None for none.
    """
    covered = torch.zeros_like(matrix[:, :, 0])
    taken = torch.zeros_like(matrix[:, 0], dtype=torch.bool)
    picks = []
    for _ in range(k):
        gain = (matrix - covered.unsqueeze(-1)).clamp(min=0).sum(1)
        gain = gain if weight is None else gain * weight
        gain = gain.masked_fill(taken, -torch.inf)
        # Two tokens that gain from each other alone gain the same, up to rounding: the lower position wins.
        best = gain.amax(-1, keepdim=True)
        pick = (gain >= best - _TIE * best.abs()).long().argmax(-1)
        taken = taken.scatter(1, pick.unsqueeze(1), True)
        covered = torch.maximum(covered, column_of(matrix, pick))
        picks.append(pick)
    return torch.stack(picks, 1)
