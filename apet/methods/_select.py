"""Pieces that several methods share: ranking with stable ties, packing a result, merging rows.

All of them are batched, never wait for the device, and have output shapes that do not depend on the data. Ties go to
the lower position everywhere.
"""

import torch
from torch import Tensor

from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens

_EPS = 1e-8


def wide(x: Tensor) -> Tensor:
    """`x` in the accumulation dtype: float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Rows of `x` divided by their L2 norm, in the accumulation dtype; zero rows stay zero."""
    x = wide(x)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=_EPS)


def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosine similarities (B, N, M) of the rows of `x` (B, N, D) and `y` (B, M, D); of `x` with itself without `y`."""
    return unit(x) @ unit(x if y is None else y).transpose(1, 2)


def top(scores: Tensor, k: int) -> Tensor:
    """Positions (B, k) of the `k` largest scores (B, N), largest first."""
    if k == 1:
        return scores.argmax(dim=-1, keepdim=True)
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def top_sorted(scores: Tensor, k: int) -> Tensor:
    """Positions (B, k) of the `k` largest scores (B, N), ascending."""
    return top(scores, k).sort(dim=-1).values


def rank_within(scores: Tensor, groups: Tensor) -> Tensor:
    """Rank (B, N) of every token by falling score among the tokens of its group (B, N) int64; 0 is the largest."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    by_group = groups.gather(1, order).sort(dim=-1, stable=True)
    order = order.gather(1, by_group.indices)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[:, 1:] = by_group.values[:, 1:] != by_group.values[:, :-1]
    first = torch.where(starts, place, 0).cummax(-1).values
    return torch.empty_like(order).scatter(1, order, place - first)


def marked(positions: Tensor, n: int) -> Tensor:
    """(B, N) bool, True at `positions` (B, k)."""
    mask = torch.zeros(positions.shape[0], n, dtype=torch.bool, device=positions.device)
    return mask.scatter(1, positions, True)


def others(positions: Tensor, n: int) -> Tensor:
    """Ascending positions (B, N - k) that are not among the distinct `positions` (B, k)."""
    return marked(positions, n).long().sort(dim=-1, stable=True).indices[:, : n - positions.shape[1]]


def own_rows(indices: Tensor, n: int) -> Tensor:
    """Source map (B, N) of pure pruning: the row of a kept token, -1 for a dropped one."""
    rows = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
    sources = torch.full((indices.shape[0], n), -1, dtype=torch.int64, device=indices.device)
    return sources.scatter(1, indices, rows)


def nearest_rows(x: Tensor, indices: Tensor, similarity_floor: float | None = None) -> Tensor:
    """Source map (B, N): kept tokens their own row, every other token the row of its most cosine-similar kept token.

    With a floor, tokens less similar than that to every kept token get -1. Rows with index -1 receive nothing.
    """
    real = indices >= 0
    kept = indices.clamp(min=0)
    similarity = cosine(x, gather_rows(x, kept)).masked_fill(~real.unsqueeze(1), -torch.inf)
    best = similarity.max(-1)
    sources = best.indices
    if similarity_floor is not None:
        sources = torch.where(best.values >= similarity_floor, sources, -1)
    rows = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
    # Rows without a source write into a spare column, which is cut off.
    spare = torch.where(real, indices, x.shape[1])
    return torch.nn.functional.pad(sources, (0, 1)).scatter(1, spare, rows)[:, :-1]


def pool(x: Tensor, sources: Tensor, rows: int, weight: Tensor | None = None, *, mean: bool = True) -> Tensor:
    """Weighted mean (or sum) (B, rows, D) of the tokens that each output row represents; zero where there are none.

    A product with the one-hot assignment: deterministic on every device, and exact for rows of a single token.

    Args:
        x: (B, N, D) in the accumulation dtype.
        sources: (B, N) output row of every token, -1 for none.
        rows: Number of output rows.
        weight: (B, N) weights; None for equal ones.
        mean: Divide by the row's total weight.
    """
    number = torch.arange(rows, device=x.device).view(1, -1, 1)
    assignment = (sources.unsqueeze(1) == number).to(x.dtype)
    if weight is not None:
        assignment = assignment * weight.to(x.dtype).unsqueeze(1)
    total = assignment @ x
    if not mean:
        return total
    share = assignment.sum(-1, keepdim=True)
    pooled = total / share.clamp(min=torch.finfo(x.dtype).tiny)
    if weight is None:
        return pooled
    # w x / w need not give x back: rows of one token are taken over unchanged.
    alone = (assignment > 0).sum(-1, keepdim=True) == 1
    return torch.where(alone, (assignment > 0).to(x.dtype) @ x, pooled)


def pruned(tokens: Tensor, indices: Tensor, scores: Tensor | None = None) -> CompressedTokens:
    """Result of keeping the tokens at ascending `indices` (B, keep) as they are and dropping the others."""
    return packed(tokens, gather_rows(tokens, indices), indices, own_rows(indices, tokens.shape[1]), scores)


def packed(
    tokens: Tensor, features: Tensor, indices: Tensor, sources: Tensor, scores: Tensor | None = None
) -> CompressedTokens:
    """Result from rows that are in their final order already; `scores` (B, N) go into `errors`, zeros without."""
    errors = torch.zeros(tokens.shape[:2], device=tokens.device) if scores is None else scores.float()
    return CompressedTokens(features.to(tokens.dtype), indices, errors, indices[:, :0], sources)


def in_raster_order(
    tokens: Tensor, features: Tensor, indices: Tensor, sources: Tensor, scores: Tensor | None = None
) -> CompressedTokens:
    """Result with rows sorted by ascending index, rows with index -1 last, and the source map renumbered."""
    n = tokens.shape[1]
    order = torch.where(indices < 0, n, indices).sort(dim=-1, stable=True).indices
    row = order.argsort(dim=-1)
    moved = torch.where(sources < 0, -1, row.gather(1, sources.clamp(min=0)))
    return packed(tokens, gather_rows(features, order), indices.gather(1, order), moved, scores)
