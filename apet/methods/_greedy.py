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


def greedy_max_min(distance: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Picks (B, k), each the token farthest from its nearest earlier pick; symmetric `distance` (B, N, N).

    The first pick is the token whose nearest other token is farthest away. `weight` (B, N), above zero, are factors on
    a token's distance.
    """
    n = distance.shape[1]
    weight = torch.ones_like(distance[:, 0]) if weight is None else weight
    itself = torch.eye(n, dtype=torch.bool, device=distance.device)
    # Two tokens nearest to each other are equally far from it, up to rounding.
    pick = _best(distance.masked_fill(itself, torch.inf).amin(-1) * weight)
    gap = torch.full_like(distance[:, 0], torch.inf)
    picks = []
    for _ in range(k):
        picks.append(pick)
        gap = torch.minimum(gap, column_of(distance, pick)).scatter(1, pick.unsqueeze(1), -torch.inf)
        pick = (gap * weight).argmax(-1)
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
        gain = _gain(matrix, covered)
        pick = _best(gain if weight is None else gain * weight, taken)
        taken = taken.scatter(1, pick.unsqueeze(1), True)
        covered = torch.maximum(covered, column_of(matrix, pick))
        picks.append(pick)
    return torch.stack(picks, 1)


def greedy_in_turn(relevance: Tensor, coverage: Tensor, share: Tensor, k: int) -> Tensor:
    """Picks (B, k) that gain relevance where enough is covered, and coverage elsewhere.

    Enough is `share` of what equally many picks of a greedy for coverage alone cover.

    Args:
        relevance: (B, Q, N) how well column n covers row q of the question.
        coverage: (B, R, N) how well it covers row r of the image.
        share: (B,) in 0..1.
        k: Number of picks.
    """
    alone = greedy_coverage(coverage, k)
    columns = coverage.gather(2, alone.unsqueeze(1).expand(-1, coverage.shape[1], -1))
    reference = torch.nn.functional.pad(columns.cummax(-1).values.sum(1), (1, 0))
    covered = torch.zeros_like(coverage[:, :, 0])
    met = torch.zeros_like(relevance[:, :, 0])
    taken = torch.zeros_like(coverage[:, 0], dtype=torch.bool)
    picks = []
    for step in range(k):
        # With a share of one the two sums are equal but for rounding.
        enough = covered.sum(-1) >= share * reference[:, step] * (1 - _TIE)
        gain = torch.where(enough.unsqueeze(-1), _gain(relevance, met), _gain(coverage, covered))
        pick = _best(gain, taken)
        taken = taken.scatter(1, pick.unsqueeze(1), True)
        covered = torch.maximum(covered, column_of(coverage, pick))
        met = torch.maximum(met, column_of(relevance, pick))
        picks.append(pick)
    return torch.stack(picks, 1)


def _gain(matrix: Tensor, covered: Tensor) -> Tensor:
    """(B, N) what every column of `matrix` (B, R, N) adds to the best entries `covered` (B, R) of the rows."""
    return (matrix - covered.unsqueeze(-1)).clamp(min=0).sum(1)


def _best(gain: Tensor, taken: Tensor | None = None) -> Tensor:
    """(B,) the column with the largest gain that is not taken.

    Two tokens that gain from each other alone gain the same, up to rounding: the lower position wins.
    """
    gain = gain if taken is None else gain.masked_fill(taken, -torch.inf)
    best = gain.amax(-1, keepdim=True)
    return (gain >= best - _TIE * best.abs()).long().argmax(-1)
