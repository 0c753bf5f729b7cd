"""Result types of the compression functions."""

from typing import NamedTuple

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
        features: (B, k, D) basis vectors in the accumulation dtype, zero where `valid` is False.
    """

    indices: Tensor
    valid: Tensor
    features: Tensor


def gather_rows(tokens: Tensor, indices: Tensor) -> Tensor:
    """Rows (B, M, D) of `tokens` (B, N, D) at `indices` (B, M)."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
