"""The published formulas written down as they stand: what `apet.compress` is compared with, in time and in choices.

Farthest-point sampling in a Python loop over differences, one linear solve, the residual of every token, the cosine
similarity as a broadcast over (donors, receivers, width), a scatter-add for the merge. Part of the comparison only: it
has none of the safe degenerate cases of `apet.compress`. Paper: arXiv 2602.19870 section 3.
"""

import torch
from torch import Tensor
from torch.nn import functional

from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens


def compress_as_published(
    tokens: Tensor, keep: int, *, basis: int = 10, start: int = 0, ridge: float = 1e-5, slots: str = "position"
) -> CompressedTokens:
    """Select and merge (B, N, D) tokens down to `keep` rows; fields as those of `apet.compress`.

    Args:
        tokens: (B, N, D) floating point; selection in its dtype, least squares in float32, merging in its dtype.
        keep: Rows kept, more than `basis` and less than N.
        basis: Basis tokens.
        start: Index of the first basis token; the published code draws it at random.
        ridge: Added to the diagonal of the basis' inner products.
        slots: Order in which basis tokens take the least informative kept rows: "position" or falling "error".
    """
    picks = _farthest_points(tokens, basis, start)
    basis_rows = gather_rows(tokens, picks)
    errors = _errors(tokens.float(), basis_rows.float(), ridge)
    order = errors.argsort(dim=-1, descending=True, stable=True)
    kept, donors = order[:, :keep], order[:, keep:]
    receivers, slot_rows = kept[:, : keep - basis], kept[:, keep - basis :]
    if slots == "position":
        slot_rows = slot_rows.sort(dim=-1).values

    similarity = functional.cosine_similarity(
        gather_rows(tokens, donors).unsqueeze(2), gather_rows(tokens, receivers).unsqueeze(1), dim=-1
    )
    target = similarity.argmax(-1)
    merged = gather_rows(tokens, receivers)
    count = torch.ones(merged.shape[:2], dtype=tokens.dtype, device=tokens.device)
    merged.scatter_add_(1, target.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), gather_rows(tokens, donors))
    count.scatter_add_(1, target, torch.ones_like(target, dtype=tokens.dtype))

    output = tokens.clone()
    _put_rows(output, receivers, merged / count.unsqueeze(-1))
    _put_rows(output, slot_rows, basis_rows)
    indices = kept.sort(dim=-1).values
    row_of = torch.full(tokens.shape[:2], -1, device=tokens.device)
    row_of.scatter_(1, indices, torch.arange(keep, device=tokens.device).expand_as(indices))
    sources = row_of.clone().scatter_(1, donors, row_of.gather(1, receivers.gather(1, target)))
    return CompressedTokens(gather_rows(output, indices), indices, errors, picks, sources)


def broadcast_elements(batch: int, tokens: int, dim: int, keep: int, basis: int = 10) -> int:
    """Elements of the broadcast product behind the cosine similarities: donors x receivers x width."""
    return batch * (tokens - keep) * (keep - basis) * dim


def _farthest_points(tokens: Tensor, k: int, start: int) -> Tensor:
    pick = torch.full(tokens.shape[:1], start, dtype=torch.int64, device=tokens.device)
    gap = torch.full(tokens.shape[:2], 1e10, device=tokens.device)
    picks = []
    for _ in range(k):
        picks.append(pick)
        difference = tokens - gather_rows(tokens, pick.unsqueeze(-1))
        gap = torch.minimum(gap, difference.square().sum(-1).float())
        pick = gap.argmax(-1)
    return torch.stack(picks, 1)


def _errors(tokens: Tensor, basis: Tensor, ridge: float) -> Tensor:
    gram = basis @ basis.transpose(1, 2)
    gram = gram + ridge * torch.eye(basis.shape[1], device=basis.device)
    coefficients = torch.linalg.solve(gram, basis @ tokens.transpose(1, 2))
    return (tokens - coefficients.transpose(1, 2) @ basis).norm(dim=-1)


def _put_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    target.scatter_(1, rows.unsqueeze(-1).expand(-1, -1, values.shape[-1]), values)
