"""Greedy selection of the largest volume: log-determinant, pivoted Cholesky and residual-updated selection are one.

With kernel K = Z Z^T the residual energy of token i given the picks Y is K_ii - K_iY K_YY^-1 K_Yi, the squared
distance of z_i to their span. Picking its maximum again and again is column-pivoted QR of Z and the greedy maximum of
log det K_YY. Each pick costs one row of a Cholesky factor, O(N t); no residual of width D is formed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apet.core.similarity import may_look
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
    barred = torch.zeros(batch, n, dtype=torch.bool, device=kernel.device) if barred is None else barred
    if rounds or not may_look(kernel):
        return _in_rounds(kernel, k, weight, first, barred, rounds, quota, rank)
    each = [[None] * batch if given is None else given for given in (weight, first)]
    samples = zip(kernel, *each, barred, strict=True)
    parts = [_one_by_one(row, k, w, start, closed, quota, rank) for row, w, start, closed in samples]
    return Volume(*map(torch.stack, zip(*parts, strict=True)))


def _in_rounds(
    kernel: Tensor,
    k: int,
    weight: Tensor | None,
    first: Tensor | None,
    barred: Tensor,
    rounds: int,
    quota: Quota | None,
    rank: int | None,
) -> Volume:
    """All samples at once, without a look at any value: for devices that one would have to wait for."""
    batch, n = kernel.shape[:2]
    whole, noise = _energies(kernel)
    residual = whole
    taken = torch.zeros_like(barred)
    factor = kernel.new_zeros(batch, k, n)
    picks, energy, floors, done, fresh = [], [], None, 0, 0
    for size in _round_sizes(k, rounds, first is not None):
        if rank is not None and done - fresh >= rank:
            residual, fresh = whole.masked_fill(taken, 0), done
        score = (residual if weight is None else residual * weight).masked_fill(taken | barred, -torch.inf)
        if quota is not None and floors is None and done >= quota.after:
            floors = quota.floors(residual, k, barred)
        # Windows never lack more than their share, so nothing is due before the last rounds.
        if floors is not None and k - done - size < quota.share * k:
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


def _one_by_one(
    kernel: Tensor,
    k: int,
    weight: Tensor | None,
    first: Tensor | None,
    barred: Tensor,
    quota: Quota | None,
    rank: int | None,
) -> Volume:
    """One sample, one pick at a time, in NumPy: for CPUs.

    A pick is a dozen operations on N numbers. NumPy's cost per call is a tenth of torch's, and what a quota demands is
    looked at instead of computed for every pick.
    """
    whole, noise = (part[0].numpy() for part in _energies(kernel.detach()[None]))
    kernel, weight = kernel.detach().numpy(), 1 if weight is None else weight.detach().numpy()
    residual = whole.copy()
    open_score = np.where(barred.numpy(), -np.inf, 0).astype(kernel.dtype)
    factor = np.zeros((k, len(kernel)), kernel.dtype)
    picks, energy, missing, fresh = [], [], None, 0
    for done in range(k):
        if rank is not None and done - fresh >= rank:
            residual, fresh = whole.copy(), done
            residual[picks] = 0
        if quota is not None and missing is None and done >= quota.after:
            floors = quota.floors(torch.from_numpy(residual)[None], k, barred[None])[0].numpy()
            missing, windows = floors - np.bincount(quota.groups[picks], minlength=len(floors)), quota.groups.numpy()
        score = residual * weight + open_score
        if missing is not None and missing.clip(0).sum() >= k - done:
            score[missing[windows] <= 0] = -np.inf
        pick = int(score.argmax() if first is None or done else first)
        if residual[pick] > 0:
            np.subtract(kernel[pick], factor[fresh:done, pick] @ factor[fresh:done], out=factor[done])
            factor[done] /= np.sqrt(residual[pick])
            residual -= np.square(factor[done])
            residual[~(residual > noise)] = 0
        residual[pick], open_score[pick] = 0, -np.inf
        if missing is not None:
            missing[windows[pick]] -= 1
        picks.append(pick)
        energy.append(residual.sum())
    return Volume(torch.tensor(picks), torch.from_numpy(residual), torch.from_numpy(np.array(energy, kernel.dtype)))


def _energies(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Energy (B, N) of every token, and what rounding leaves of it in a dependent token: as good as zero."""
    whole = kernel.diagonal(dim1=1, dim2=2).clamp(min=0)
    return whole, 10 * torch.finfo(kernel.dtype).eps * whole


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
