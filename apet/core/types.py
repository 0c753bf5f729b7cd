"""Result types of the compression functions."""

from typing import NamedTuple

import torch
from torch import Tensor


class CompressedTokens(NamedTuple):
    """What one compression decided and produced, for a batch of B samples with N tokens each.

    Attributes:
        tokens: (B, K, D) kept tokens in the input's dtype. K is `keep`, or `keep` + basis size with
            ``insertion="append"``.
        indices: (B, K) int64 source position of every output row: ascending, or for ``append`` the kept tokens by
            falling error followed by the basis. -1 marks a row without a source (a masked sample with fewer real
            tokens than `keep`).
        errors: (B, N) float32 approximation error of every token (L2 norm); -inf where `mask` is False.
        basis: (B, k) int64 basis positions in pick order; -1 where no further distinct token existed.
        sources: (B, N) int64 output row that represents each input token: its own row when kept, otherwise the row it
            was merged into; -1 when its content was dropped.
    """

    tokens: Tensor
    indices: Tensor
    errors: Tensor
    basis: Tensor
    sources: Tensor


class Basis(NamedTuple):
    """Basis tokens of a batch.

    Attributes:
        indices: (B, k) int64 positions in pick order; -1 where `valid` is False.
        valid: (B, k) bool; the valid picks of a sample come first.
        features: (B, k, D) float64 basis vectors, zero where `valid` is False.
        products: (B, k, N) float64 inner products of the basis vectors with all tokens, zero where `valid` is False.
    """

    indices: Tensor
    valid: Tensor
    features: Tensor
    products: Tensor


def token_sizes(result: CompressedTokens, sizes: Tensor | None = None) -> Tensor:
    """(B, K) float32 image tokens that each output row stands for: 1 for a token that was kept as it is.

    Args:
        result: What a method returned.
        sizes: (B, N) sizes of the rows that entered; None if every row stood for one token.
    """
    weight = torch.ones_like(result.sources, dtype=torch.float32) if sizes is None else sizes.float()
    weight = torch.where(result.sources >= 0, weight, 0)
    rows = torch.zeros(result.indices.shape, device=weight.device)
    return rows.scatter_add(1, result.sources.clamp(min=0), weight)
