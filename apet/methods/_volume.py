"""Greedy selection of the largest volume: log-determinant, pivoted Cholesky and residual-updated selection are one.

With kernel K = Z Z^T the residual energy of token i given the picks Y is K_ii - K_iY K_YY^-1 K_Yi, the squared
distance of z_i to their span. Picking its maximum again and again is column-pivoted QR of Z and the greedy maximum of
log det K_YY. Each pick costs one row of a Cholesky factor, O(N t); no residual of width D is formed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from apet.methods._select import rank_within, top


class Volume(NamedTuple):
    """A greedy selection.

    Attributes:
        picks: (B, k) positions in pick order.
        residual: (B, N) energy left of every token after all picks.
        energy: (B, k) energy left of all tokens together after each pick (after its round, with rounds).
    """

    picks: Tensor
    residual: Tensor
    energy: Tensor


@dataclass(frozen=True)
class Quota:
    """A guaranteed share of the picks for every window, in proportion to the error mass in it.

    Attributes:
        groups: (N,) window of every token.
        windows: Number of windows.
        share: Share of all picks that is guaranteed; each window's part is rounded down.
        after: Picks after which the error mass is measured.
    """

    groups: Tensor
    windows: int
    share: float
    after: int

    @cached_property
    def member(self) -> Tensor:
        """(N, W) 1 where the token lies in the window."""
        return torch.nn.functional.one_hot(self.groups, self.windows).float()

    def floors(self, residual: Tensor, k: int, barred: Tensor) -> Tensor:
        """Guaranteed picks (B, W): by the sum of errors (root of the energy), at most what a window can give."""
        mass = residual.sqrt() @ self.member.to(residual.dtype)
        total = mass.sum(-1, keepdim=True).clamp(min=torch.finfo(residual.dtype).tiny)
        return torch.minimum((self.share * k * mass / total).floor(), self.counts(~barred))

    def counts(self, marked: Tensor) -> Tensor:
        """Tokens (B, W) of every window that are marked (B, N)."""
        return marked.float() @ self.member


def greedy_volume(
    kernel: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    first: Tensor | None = None,
    barred: Tensor | None = None,
    rounds: int = 0,
    quota: Quota | None = None,
    rank: int | None = None,
) -> Volume:
    """Choose `k` tokens, each with the largest residual energy given the earlier ones.

    Args:
        kernel: (B, N, N) symmetric, positive semi-definite.
        k: Number of picks.
        weight: (B, N) factors on the residual energy when ranking; None for none.
        first: (B,) first pick; None for the largest diagonal entry.
        barred: (B, N) bool, tokens never picked; at least `k` must remain.
        rounds: Update the residuals this many times in all, with several picks between; 0 is after every pick.
        quota: Guaranteed picks per window.
        rank: Largest rank `kernel` can have. After that many picks nothing is left, and the search starts anew among
            the other tokens; None takes them in order instead.
    """
    batch, n = kernel.shape[:2]
    whole = kernel.diagonal(dim1=1, dim2=2).clamp(min=0)
    # What a dependent token leaves is rounding noise: it counts as zero, and such tokens are taken in order.
    noise = 10 * torch.finfo(kernel.dtype).eps * whole
    residual = whole
    taken = torch.zeros(batch, n, dtype=torch.bool, device=kernel.device)
    barred = taken if barred is None else barred
    factor = kernel.new_zeros(batch, k, n)
    picks, energy, floors, done, fresh = [], [], None, 0, 0
    for size in _round_sizes(k, rounds, first is not None):
        if rank is not None and done - fresh >= rank:
            residual, fresh = whole.masked_fill(taken, 0), done
        score = (residual if weight is None else residual * weight).masked_fill(taken | barred, -torch.inf)
        if quota is not None and floors is None and done >= quota.after:
            floors = quota.floors(residual, k, barred)
        if floors is not None:
            score = _guarantee(score, floors - quota.counts(taken), quota.groups, size, k - done)
        pick = first.unsqueeze(1) if first is not None and done == 0 else top(score, size)
        rows = _factor_rows(kernel, factor[:, fresh:done], pick, residual, noise)
        factor[:, done : done + size] = rows
        residual = (residual - rows.square().sum(1)).scatter(1, pick, 0)
        residual = torch.where(residual > noise, residual, 0)
        taken = taken.scatter(1, pick, True)
        picks.append(pick)
        energy.append(residual.sum(-1, keepdim=True).expand(batch, size))
        done += size
    return Volume(torch.cat(picks, 1), residual, torch.cat(energy, 1))


def _round_sizes(k: int, rounds: int, alone: bool) -> list[int]:
    """Picks per round, as even as possible; `alone`: the first pick is given and has a round of its own."""
    rounds = min(rounds or k, k)
    head = [1] if alone else []
    rest = k - len(head)
    rounds = max(1, rounds - len(head)) if rest else 0
    return head + [rest // rounds + (number < rest % rounds) for number in range(rounds)]


def _factor_rows(kernel: Tensor, factor: Tensor, pick: Tensor, residual: Tensor, noise: Tensor) -> Tensor:
    """The rows (B, m, N) that `pick` (B, m) adds to the Cholesky factor (B, t, N); zero for a dependent pick."""
    size, n = pick.shape[1], kernel.shape[1]
    rows = kernel.gather(1, pick.unsqueeze(-1).expand(-1, -1, n))
    if factor.shape[1]:
        known = factor.gather(2, pick.unsqueeze(1).expand(-1, factor.shape[1], -1))
        rows = rows - known.transpose(1, 2) @ factor
    pivot = residual.gather(1, pick)
    live = (pivot > 0).unsqueeze(-1)
    if size == 1:
        return torch.where(live, rows / pivot.clamp(min=torch.finfo(rows.dtype).tiny).sqrt().unsqueeze(-1), 0)
    block = rows.gather(2, pick.unsqueeze(1).expand(-1, size, -1))
    block = torch.where(live & live.transpose(1, 2), block, 0)
    jitter = noise.amax(-1, keepdim=True).expand(-1, size) + (~live.squeeze(-1)).to(rows.dtype)
    lower, _ = torch.linalg.cholesky_ex(block + torch.diag_embed(jitter))
    return torch.linalg.solve_triangular(lower, torch.where(live, rows, 0), upper=False)


def _guarantee(score: Tensor, missing: Tensor, groups: Tensor, size: int, remaining: int) -> Tensor:
    """Lift (B, N) scores as far as the windows' missing picks (B, W) must come from the next `size` of `remaining`."""
    missing = missing.clamp(min=0)
    due = missing.sum(-1, keepdim=True) - (remaining - size)
    wanted = missing[:, groups]
    if size == 1:
        return torch.where((due > 0) & (wanted <= 0), -torch.inf, score)
    counting = (rank_within(score, groups.expand(score.shape)) < wanted) & (score > -torch.inf)
    order = rank_within(score.masked_fill(~counting, -torch.inf), torch.zeros_like(groups).expand(score.shape))
    return score.masked_fill(counting & (order < due), torch.inf)
