"""Choose the basis tokens: farthest-point sampling (the published choice), density peaks, or random.

ApET (arXiv 2602.19870) section 3: farthest-point sampling with Euclidean distances and k = 10; density peaks and random
are its ablations. All functions take tokens in the accumulation dtype, never synchronise with the host and have output
shapes that do not depend on the data.
"""

import torch
from torch import Tensor

from apet.core.types import Basis, gather_rows


def select_basis(
    tokens: Tensor,
    k: int,
    selection: str,
    *,
    start: int | Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Basis:
    """Choose `k` basis tokens per sample.

    Args:
        tokens: (B, N, D) float32 or float64.
        k: Basis size, 0 <= k <= N.
        selection: "fps", "dpc" or "random".
        start: First token of "fps": an index, a (B,) tensor of indices, or None for the token farthest from the mean.
        mask: (B, N) bool, True for real tokens; None if all are.
        generator: Source of "random"; None draws the same positions at every call.
    """
    if k == 0:
        empty = torch.zeros(tokens.shape[0], 0, dtype=torch.int64, device=tokens.device)
        return Basis(empty, empty.bool(), tokens[:, :0])
    if selection == "fps":
        indices, valid = farthest_points(tokens, k, start=start, mask=mask)
        return _basis_of_tokens(tokens, indices, valid)
    if selection == "dpc":
        return density_peaks(tokens, k, mask=mask)
    indices, valid = random_positions(tokens, k, mask=mask, generator=generator)
    return _basis_of_tokens(tokens, indices, valid)


def farthest_points(
    tokens: Tensor, k: int, *, start: int | Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions (B, k) of mutually distant tokens in pick order, and which picks are valid (B, k).

    Every pick is the token whose Euclidean distance to the nearest earlier pick is largest (lowest index on ties). A
    sample with fewer than `k` distinct tokens gets -1 and an invalid mark for the missing picks. A `start` on padding
    counts as None.

    Distances come from differences, not from inner products: exactly zero for equal tokens and the same bits for every
    batch size.
    """
    spread = (tokens - _mean(tokens, mask)).square().sum(-1)
    if mask is not None:
        spread = spread.masked_fill(~mask, -1)
    pick = spread.argmax(-1) if start is None else _start_index(start, spread, mask)
    gap = torch.full_like(spread, torch.inf)
    alive = torch.ones_like(pick, dtype=torch.bool)
    picks, valid = [], []
    for _ in range(k):
        picks.append(torch.where(alive, pick, -1))
        valid.append(alive)
        column = pick.unsqueeze(-1)
        gap = torch.minimum(gap, _distances(gather_rows(tokens, column), tokens).squeeze(1))
        if mask is not None:
            gap = gap.masked_fill(~mask, -torch.inf)
        pick = gap.argmax(-1)
        # Non-finite samples keep their picks, so that one of them changes no shape and no other sample.
        alive = alive & ~(gap.amax(-1) <= 0)
    return torch.stack(picks, 1), torch.stack(valid, 1)


def density_peaks(tokens: Tensor, k: int, *, mask: Tensor | None = None) -> Basis:
    """Means of `k` density-peak clusters (DPC-KNN), with the cluster centres as positions.

    Distance is Euclidean over sqrt(D); a token's density is exp(-mean squared distance to its k nearest tokens, itself
    included); a centre has a large product of density and distance to the nearest denser token. Equal densities are
    ordered by position, lower index first. A token equal to a denser one is no centre: with fewer than `k` distinct
    tokens the missing centres are -1 and invalid. Needs O(N^2) memory per sample.

    Densities and scores are compared as logarithms, because the exponential underflows for tokens of large norm.
    """
    n, dim = tokens.shape[1:]
    distance = _distances(tokens, tokens) / dim**0.5
    if mask is not None:
        tokens = torch.where(mask.unsqueeze(-1), tokens, 0)
        distance = distance.masked_fill(~(mask.unsqueeze(1) & mask.unsqueeze(2)), torch.inf)
    nearest = distance.topk(k, dim=-1, largest=False).values.square()
    density = -torch.where(nearest.isinf(), 0, nearest).sum(-1) / (~nearest.isinf()).sum(-1).clamp(min=1)
    if mask is not None:
        density = density.masked_fill(~mask, -torch.inf)
    order = torch.arange(n, device=tokens.device)
    denser = density.unsqueeze(1) > density.unsqueeze(2)
    denser |= (density.unsqueeze(1) == density.unsqueeze(2)) & (order.view(1, 1, n) < order.view(1, n, 1))
    farthest = torch.where(distance.isinf(), 0, distance).amax(-1).clamp(min=torch.finfo(distance.dtype).tiny)
    isolation = distance.masked_fill(~denser, torch.inf).amin(-1)
    score = density + torch.where(isolation.isinf(), farthest, isolation).log()
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    ranked = score.sort(dim=-1, descending=True, stable=True)
    centres, valid = ranked.indices[:, :k], ranked.values[:, :k] != -torch.inf
    to_centre = distance.gather(1, centres.unsqueeze(-1).expand(-1, -1, n))
    cluster = to_centre.masked_fill(~valid.unsqueeze(-1), torch.inf).argmin(1)
    member = torch.nn.functional.one_hot(cluster, k).double()
    if mask is not None:
        member = member * mask.unsqueeze(-1)
    means = member.transpose(1, 2) @ tokens.double() / member.sum(1).clamp(min=1).unsqueeze(-1)
    features = torch.where(valid.unsqueeze(-1), means.to(tokens.dtype), 0)
    return Basis(torch.where(valid, centres, -1), valid, features)


def random_positions(
    tokens: Tensor, k: int, *, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`k` distinct uniform positions (B, k) and which are valid (fewer real tokens than `k`: the rest is invalid).

    One draw serves all samples of a batch, so that a sample's result does not depend on its neighbours.
    """
    batch, n = tokens.shape[:2]
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    draw = torch.rand(n, generator=generator, device=generator.device).to(tokens.device, non_blocking=True)
    draw = draw.expand(batch, n)
    if mask is not None:
        draw = draw.masked_fill(~mask, -1.0)
    indices = draw.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    valid = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask.gather(1, indices)
    return torch.where(valid, indices, -1), valid


def _basis_of_tokens(tokens: Tensor, indices: Tensor, valid: Tensor) -> Basis:
    features = gather_rows(tokens, indices.clamp(min=0))
    return Basis(indices, valid, torch.where(valid.unsqueeze(-1), features, 0))


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean (B, 1, D) of the real tokens."""
    if mask is None:
        return tokens.mean(1, keepdim=True)
    count = mask.sum(1).clamp(min=1).view(-1, 1, 1)
    return torch.where(mask.unsqueeze(-1), tokens, 0).sum(1, keepdim=True) / count


def _start_index(start: int | Tensor, spread: Tensor, mask: Tensor | None) -> Tensor:
    batch, device = spread.shape[0], spread.device
    if isinstance(start, Tensor):
        index = start.to(device=device, dtype=torch.int64).expand(batch)
    else:
        index = torch.full((batch,), start, dtype=torch.int64, device=device)
    if mask is None:
        return index
    return torch.where(mask.gather(1, index.unsqueeze(-1)).squeeze(-1), index, spread.argmax(-1))
