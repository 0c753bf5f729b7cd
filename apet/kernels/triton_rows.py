"""`Rows` in Triton: tokens are read in their own dtype, without a float64 copy, in two passes of few launches.

One launch per basis token takes its products with all tokens, turns them into distances and keeps the smaller ones;
one launch finds all nearest receivers, one sums all groups. Products that decide the selection are accumulated in
float64 on the ordinary units (some ten million of them), similarities and sums in float32 by the matrix units: exact
products of half precision features, IEEE float32 otherwise. Tiles do not depend on the batch size, so neither do the
results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from apet.core.rows import EQUAL, Rows

_ROWS, _DEPTH = 32, 128
_DONORS, _RECEIVERS, _INNER = 32, 64, 32
_GROUPS, _COLUMNS, _MEMBERS = 32, 64, 32


@triton.jit
def _approach(
    x, norms, picks, gap, products, closer, n, dim, ROWS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Products (B, N) float64 of every token with its sample's pick, and the smaller of `gap` and its distance.

    `norms` are squared and shrunk by the share of them that counts as rounding, as in `squared_distances`.
    """
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n
    pick = tl.load(picks + sample)
    base = x + sample * n * dim
    total = tl.zeros([ROWS], dtype=tl.float64)
    for first in range(0, dim, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        inside = depth < dim
        tile = tl.load(base + row[:, None] * dim + depth[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        chosen = tl.load(base + pick * dim + depth, mask=inside, other=0.0)
        total += tl.sum(tile.to(tl.float64) * chosen.to(tl.float64)[None, :], axis=1)
    at = sample * n + row
    together = tl.load(norms + at, mask=real, other=0.0) + tl.load(norms + sample * n + pick)
    distance = tl.maximum(together - 2 * total, 0.0).to(tl.float32)
    before = tl.load(gap + at, mask=real, other=0.0)
    tl.store(products + at, total, mask=real)
    tl.store(closer + at, tl.minimum(before, distance), mask=real)


@triton.jit
def _products(x, vectors, products, n, dim, count, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Products (B, k, N) float64 of every token with float64 vectors (B, k, D)."""
    sample, number = tl.program_id(1).to(tl.int64) // count, tl.program_id(1).to(tl.int64) % count
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n
    vector = vectors + (sample * count + number) * dim
    total = tl.zeros([ROWS], dtype=tl.float64)
    for first in range(0, dim, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        inside = depth < dim
        at = x + sample * n * dim + row[:, None] * dim + depth[None, :]
        tile = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float64) * tl.load(vector + depth, mask=inside, other=0.0)[None, :], axis=1)
    tl.store(products + (sample * count + number) * n + row, total, mask=real)


@triton.jit
def _nearest(
    x, donors, receivers, lengths, allowed, target, n, dim, donor_count, count,
    DONORS: tl.constexpr, RECEIVERS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Most similar receiver (B, M) of every donor: a matrix product tile by tile with a running maximum."""
    sample = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * DONORS + tl.arange(0, DONORS)
    real = number < donor_count
    row = tl.load(donors + sample * donor_count + number, mask=real, other=0)
    best = tl.full([DONORS], float("-inf"), dtype=tl.float32)
    winner = tl.zeros([DONORS], dtype=tl.int32)
    for start in range(0, count, RECEIVERS):
        receiver = start + tl.arange(0, RECEIVERS)
        exists = receiver < count
        dots = tl.zeros([DONORS, RECEIVERS], dtype=tl.float32)
        for first in range(0, dim, INNER):
            depth = first + tl.arange(0, INNER)
            inside = depth < dim
            left = tl.load(
                x + (sample * n + row)[:, None] * dim + depth[None, :], mask=real[:, None] & inside[None, :], other=0.0
            )
            right = tl.load(
                receivers + (sample * count + receiver)[None, :] * dim + depth[:, None],
                mask=exists[None, :] & inside[:, None],
                other=0.0,
            )
            dots = tl.dot(left.to(tl.float32), right.to(tl.float32), dots, input_precision=PRECISION)
        open_to = tl.load(allowed + sample * count + receiver, mask=exists, other=0) != 0
        length = tl.load(lengths + sample * count + receiver, mask=exists, other=1.0)
        cosine = tl.where(open_to[None, :], dots / length[None, :], float("-inf"))
        largest = tl.max(cosine, axis=1)
        place = tl.argmax(cosine, axis=1) + start
        winner = tl.where(largest > best, place, winner)
        best = tl.maximum(best, largest)
    tl.store(target + sample * donor_count + number, winner.to(tl.int64), mask=real)


@triton.jit
def _group_sums(
    x, group, sums, n, dim, count,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, MEMBERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums (B, K, D) float32 of the tokens of every group: a product with the one-hot assignment made on the fly."""
    sample = tl.program_id(2).to(tl.int64)
    wanted = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([GROUPS, COLUMNS], dtype=tl.float32)
    for first in range(0, n, MEMBERS):
        member = first + tl.arange(0, MEMBERS)
        belongs = tl.load(group + sample * n + member, mask=member < n, other=-1)
        # Tokens of no group are not read: padding may hold anything.
        tile = tl.load(
            x + (sample * n + member)[:, None] * dim + column[None, :],
            mask=(belongs >= 0)[:, None] & (column < dim)[None, :],
            other=0.0,
        )
        one_hot = (wanted[:, None] == belongs[None, :]).to(tl.float32)
        total = tl.dot(one_hot, tile.to(tl.float32), total, input_precision=PRECISION)
    at = sums + (sample * count + wanted)[:, None] * dim + column[None, :]
    tl.store(at, total, mask=(wanted < count)[:, None] & (column < dim)[None, :])


class TritonRows(Rows):
    """`Rows` for float32, float16 and bfloat16 tokens on a CUDA device."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens.contiguous()
        self.squared_norms = torch.linalg.vector_norm(self.tokens, dim=-1, dtype=torch.float64).square_()
        self._shrunk = (1 - EQUAL) * self.squared_norms

    @property
    def _precision(self) -> str:
        # TF32 holds every float16 and bfloat16 number: with half precision features its products are exact.
        return "ieee" if self.tokens.dtype == torch.float32 else "tf32"

    def products(self, vectors: Tensor) -> Tensor:
        """As `Rows.products`, in one launch."""
        batch, n, dim = self.tokens.shape
        count = vectors.shape[1]
        products = self.squared_norms.new_empty(batch, count, n)
        grid = (triton.cdiv(n, _ROWS), batch * count)
        _products[grid](self.tokens, vectors.contiguous(), products, n, dim, count, ROWS=_ROWS, DEPTH=_DEPTH)
        return products

    def mean(self, mask: Tensor | None = None) -> Tensor:
        """As `Rows.mean`."""
        if mask is None:
            return self.tokens.mean(1, keepdim=True, dtype=torch.float64)
        total = torch.where(mask.unsqueeze(-1), self.tokens, 0).sum(1, keepdim=True, dtype=torch.float64)
        return total / mask.sum(1).clamp(min=1).view(-1, 1, 1)

    def approach(self, pick: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """As `Rows.approach`, in one launch."""
        batch, n, dim = self.tokens.shape
        products, closer = torch.empty_like(self.squared_norms), torch.empty_like(gap)
        grid = (triton.cdiv(n, _ROWS), batch)
        _approach[grid](
            self.tokens, self._shrunk, pick.contiguous(), gap, products, closer, n, dim, ROWS=_ROWS, DEPTH=_DEPTH
        )
        return products, closer

    def nearest(self, donors: Tensor, receivers: Tensor, allowed: Tensor) -> Tensor:
        """As `Rows.nearest`, in one launch and with float32 similarities: near ties may go the other way."""
        batch, n, dim = self.tokens.shape
        lengths = torch.linalg.vector_norm(receivers, dim=-1, dtype=torch.float32).clamp(min=1e-8)
        target = torch.empty_like(donors)
        grid = (triton.cdiv(donors.shape[1], _DONORS), batch)
        _nearest[grid](
            self.tokens, donors.contiguous(), receivers.to(self.tokens.dtype).contiguous(), lengths,
            allowed.to(torch.int8).contiguous(), target, n, dim, donors.shape[1], receivers.shape[1],
            DONORS=_DONORS, RECEIVERS=_RECEIVERS, INNER=_INNER, PRECISION=self._precision,
        )  # fmt: skip
        return target

    def group_sums(self, group: Tensor, count: int) -> Tensor:
        """As `Rows.group_sums`, in one launch and float32."""
        batch, n, dim = self.tokens.shape
        sums = torch.empty(batch, count, dim, dtype=torch.float32, device=group.device)
        grid = (triton.cdiv(count, _GROUPS), triton.cdiv(dim, _COLUMNS), batch)
        _group_sums[grid](
            self.tokens, group.contiguous(), sums, n, dim, count,
            GROUPS=_GROUPS, COLUMNS=_COLUMNS, MEMBERS=_MEMBERS, PRECISION=self._precision,
        )  # fmt: skip
        return sums
