"""Inner products of tokens in float64, block by block: the one quantity the algorithm is made of.

Distances, the basis' Gram matrix, projections and errors all follow from inner products of tokens with a few vectors.
In float64 they are exact for float32 features up to rounding that is invisible after the result is rounded to float32:
equal tokens tie exactly, and neither the batch size nor the matrix kernel nor the TF32 setting changes a decision.
"""

import torch
from torch import Tensor

from apet.core.similarity import nearest_units, unit_rows

# Elements converted to float64 at once: one image of CLIP-L stays converted (and in cache) for all products, longer
# inputs are converted block by block, so that extra memory does not grow with them.
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}
# Squared distances up to this share of the squared norms are the rounding of float32 features: the tokens are equal.
EQUAL = 1e-12


def block_rows(tokens: Tensor) -> int:
    """Rows of (B, N, D) tokens that make one block."""
    limit = BLOCK.get(tokens.device.type, BLOCK["cuda"])
    return max(1, limit // max(1, tokens.shape[0] * tokens.shape[2]))


class Rows:
    """Tokens (B, N, D) of any floating dtype, seen as float64 vectors.

    Attributes:
        tokens: The tokens as given.
        squared_norms: (B, N) float64.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._blocks = tokens.split(block_rows(tokens), 1)
        if len(self._blocks) == 1:
            self._blocks = (tokens.double(),)
        self.squared_norms = _joined([torch.linalg.vector_norm(b, dim=-1, dtype=torch.float64) for b in self._blocks])
        self.squared_norms.square_()

    def products(self, vectors: Tensor) -> Tensor:
        """Inner products (B, k, N) float64 of every token with `vectors` (B, k, D) float64."""
        return _joined([torch.bmm(vectors, block.double().transpose(1, 2)) for block in self._blocks])

    def mean(self, mask: Tensor | None = None) -> Tensor:
        """Mean (B, 1, D) float64 of the tokens, or of those with a True in `mask` (B, N)."""
        if mask is None:
            batch, n, _ = self.tokens.shape
            ones = self.squared_norms.new_ones(batch, 1, n)
            parts = zip(ones.split(block_rows(self.tokens), 2), self._blocks, strict=True)
            return sum(torch.bmm(one, block.double()) for one, block in parts) / n
        masks = mask.unsqueeze(-1).split(block_rows(self.tokens), 1)
        total = sum(
            torch.where(real, block, 0).sum(1, keepdim=True, dtype=torch.float64)
            for block, real in zip(self._blocks, masks, strict=True)
        )
        return total / mask.sum(1).clamp(min=1).view(-1, 1, 1)

    def approach(self, pick: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Count one more pick in: its inner products with all tokens, and every token's distance to the nearest pick.

        Args:
            pick: (B, 1) int64 position of the pick.
            gap: (B, N) float32 squared distances to the nearest earlier pick.

        Returns:
            (B, N) float64 products and (B, N) float32 distances.
        """
        products = self.products(self.gather(pick)).squeeze(1)
        norm = self.squared_norms.gather(1, pick)
        return products, torch.minimum(gap, squared_distances(products, self.squared_norms, norm))

    def nearest(self, donors: Tensor, receivers: Tensor, allowed: Tensor) -> Tensor:
        """Most cosine-similar receiver (B, M) int64 of every donor; the first wins a tie.

        Donors are gathered in blocks, which bounds extra memory.

        Args:
            donors: (B, M) int64 positions.
            receivers: (B, K, D).
            allowed: (B, K) bool; rows that may receive.
        """
        unit = unit_rows(receivers)
        blocks = donors.split(block_rows(self.tokens), 1)
        return torch.cat([nearest_units(gather_rows(self.tokens, block), unit, allowed) for block in blocks], 1)

    def group_means(self, group: Tensor, count: int) -> Tensor:
        """Means (B, count, D) of the tokens of every group, zero for an empty one.

        `group` (B, N) int64 is a token's group, or -1 for a token that belongs to none.
        """
        size = (group.unsqueeze(1) == torch.arange(count, device=group.device).view(1, -1, 1)).sum(-1, keepdim=True)
        return self.group_sums(group, count) / size.clamp(min=1)

    def gather(self, indices: Tensor) -> Tensor:
        """Tokens (B, M, D) float64 at `indices` (B, M)."""
        return gather_rows(self.tokens, indices).double()

    def group_sums(self, group: Tensor, count: int) -> Tensor:
        """Sums (B, count, D) of the tokens of every group; `group` as for `group_means`."""
        batch, _, dim = self.tokens.shape
        # One row more takes what belongs nowhere.
        total = torch.zeros(batch, count + 1, dim, dtype=torch.float64, device=group.device)
        group = torch.where(group < 0, count, group)
        add = add_rows if group.device.type == "cpu" else add_product
        for block, part in zip(self._blocks, group.split(block_rows(self.tokens), 1), strict=True):
            add(total, block.double(), part)
        return total[:, :count]


def add_rows(total: Tensor, tokens: Tensor, group: Tensor) -> None:
    """Add tokens (B, N, D) to rows `group` (B, N) of `total` (B, K, D), one after the other: for CPUs."""
    batch, count, dim = total.shape
    row = torch.arange(0, batch * count, count).unsqueeze(-1) + group
    total.view(-1, dim).index_add_(0, row.flatten(), tokens.reshape(-1, dim))


def add_product(total: Tensor, tokens: Tensor, group: Tensor) -> None:
    """The same as a product with the one-hot assignment: deterministic where rows are added in parallel.

    The last row receives nothing: what belongs nowhere may be padding that is not finite.
    """
    nowhere = total.shape[1] - 1
    member = torch.arange(nowhere, device=group.device).view(1, -1, 1) == group.unsqueeze(1)
    tokens = torch.where((group < nowhere).unsqueeze(-1), tokens, 0)
    total[:, :nowhere].baddbmm_(member.to(total.dtype), tokens)


def squared_distances(products: Tensor, norms: Tensor, norm: Tensor) -> Tensor:
    """Squared distances (B, N) float32 of tokens to a vector, from products and squared norms in float64.

    Rounding to float32 makes equal distances equal; what rounding leaves of a distance between equal tokens is zero.
    """
    together = torch.add((1 - EQUAL) * norms, norm, alpha=1 - EQUAL)
    return torch.sub(together, products, alpha=2).clamp_(min=0).float()


def gather_rows(tokens: Tensor, indices: Tensor) -> Tensor:
    """Rows (B, M, D) of `tokens` (B, N, D) at `indices` (B, M)."""
    batch, n, dim = tokens.shape
    # Selecting whole rows of one long list is several times faster on CPUs than gathering element by element.
    first = torch.arange(batch, device=indices.device).unsqueeze(-1) * n if batch > 1 else 0
    return tokens.reshape(batch * n, dim).index_select(0, (indices + first).flatten()).view(*indices.shape, dim)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
