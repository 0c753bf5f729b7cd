"""Choose the basis tokens: farthest-point sampling (the published choice), density peaks, or random.

ApET (arXiv 2602.19870) section 3: farthest-point sampling with squared Euclidean distances and k = 10; density peaks and
random are its ablations. All functions take tokens in the accumulation dtype, never synchronise with the host and have
output shapes that do not depend on the data.
"""

import torch
from torch import Tensor

from apet.core.types import Basis, gather_rows

# Two tokens closer than this share of their distance to the centre (squared) count as one point: inner products in
# float32 cannot tell them apart, and a second copy adds nothing to the basis.
_SAME_POINT = 1e-6
# Spread below this share of the tokens' own energy is rounding noise of the centring: all tokens are equal.
_NO_SPREAD = 1e-12


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

    Every pick is the token whose squared Euclidean distance to the nearest earlier pick is largest (lowest index on
    ties). A sample with fewer than `k` distinct tokens gets -1 and an invalid mark for the missing picks.

    Distances come from inner products of centred tokens: centring leaves them unchanged and removes the common
    component that would cancel.
    """
    centred, energy = _centre(tokens, mask)
    radius = centred.square().sum(-1)
    floor = _NO_SPREAD * (energy + radius.amax(-1, keepdim=True))
    lone = radius if mask is None else radius.masked_fill(~mask, -1)
    pick = lone.argmax(-1) if start is None else _start_index(start, tokens)
    gap = torch.full_like(radius, torch.inf)
    if mask is not None:
        gap = gap.masked_fill(~mask, -torch.inf)
    alive = torch.ones_like(pick, dtype=torch.bool)
    picks, valid = [], []
    for _ in range(k):
        picks.append(torch.where(alive, pick, -1))
        valid.append(alive)
        column = pick.unsqueeze(-1)
        reach = radius + radius.gather(1, column)
        distance = reach - 2 * (centred @ gather_rows(centred, column).transpose(1, 2)).squeeze(-1)
        distance = torch.where(distance > torch.maximum(_SAME_POINT * reach, floor), distance, 0)
        gap = torch.minimum(gap, distance).scatter(1, column, 0)
        gap, pick = (gap if mask is None else gap.masked_fill(~mask, -torch.inf)), gap.argmax(-1)
        # Non-finite samples keep their picks, so that one of them changes no shape and no other sample.
        alive = alive & ~(gap.amax(-1) <= 0)
    return torch.stack(picks, 1), torch.stack(valid, 1)


def density_peaks(tokens: Tensor, k: int, *, mask: Tensor | None = None) -> Basis:
    """Means of `k` density-peak clusters (DPC-KNN), with the cluster centres as positions.

    Distance is Euclidean over sqrt(D); a token's density is exp(-mean squared distance to its k nearest tokens, itself
    included); a centre has a large product of density and distance to the nearest denser token. Equal densities are
    ordered by position, lower index first. Needs O(N^2) memory per sample.
    """
    n, dim = tokens.shape[1:]
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / dim**0.5
    if mask is not None:
        distance = distance.masked_fill(~(mask.unsqueeze(1) & mask.unsqueeze(2)), torch.inf)
    nearest = distance.topk(k, dim=-1, largest=False).values.square()
    density = torch.exp(-torch.where(nearest.isinf(), 0, nearest).sum(-1) / (~nearest.isinf()).sum(-1).clamp(min=1))
    if mask is not None:
        density = density.masked_fill(~mask, -torch.inf)
    order = torch.arange(n, device=tokens.device)
    denser = density.unsqueeze(1) > density.unsqueeze(2)
    denser |= (density.unsqueeze(1) == density.unsqueeze(2)) & (order.view(1, 1, n) < order.view(1, n, 1))
    farthest = torch.where(distance.isinf(), 0, distance).amax(-1)
    isolation = distance.masked_fill(~denser, torch.inf).amin(-1)
    score = density * torch.where(isolation.isinf(), farthest, isolation)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    centres = score.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    valid = torch.ones_like(centres, dtype=torch.bool) if mask is None else mask.gather(1, centres)
    to_centre = distance.gather(1, centres.unsqueeze(-1).expand(-1, -1, n))
    cluster = to_centre.masked_fill(~valid.unsqueeze(-1), torch.inf).argmin(1)
    member = torch.nn.functional.one_hot(cluster, k).to(tokens.dtype)
    if mask is not None:
        member = member * mask.unsqueeze(-1)
    means = member.transpose(1, 2) @ tokens / member.sum(1).clamp(min=1).unsqueeze(-1)
    return Basis(torch.where(valid, centres, -1), valid, means * valid.unsqueeze(-1))


def random_positions(
    tokens: Tensor, k: int, *, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`k` distinct uniform positions (B, k) and which are valid (fewer real tokens than `k`: the rest is invalid).

    One draw serves all samples of a batch, so that a sample's result does not depend on its neighbours.
    """
    batch, n = tokens.shape[:2]
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    draw = torch.rand(n, generator=generator, device=generator.device).to(tokens.device).expand(batch, n)
    if mask is not None:
        draw = draw.masked_fill(~mask, -1.0)
    indices = draw.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    valid = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask.gather(1, indices)
    return torch.where(valid, indices, -1), valid


def _basis_of_tokens(tokens: Tensor, indices: Tensor, valid: Tensor) -> Basis:
    features = gather_rows(tokens, indices.clamp(min=0))
    return Basis(indices, valid, torch.where(valid.unsqueeze(-1), features, 0))


def _centre(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens minus their mean (masked rows become zero), and the mean's energy (B, 1)."""
    if mask is None:
        mean = tokens.mean(1, keepdim=True)
        return tokens - mean, mean.square().sum(-1)
    real = mask.unsqueeze(-1)
    count = mask.sum(1).clamp(min=1).view(-1, 1, 1)
    mean = torch.where(real, tokens, 0).sum(1, keepdim=True) / count
    return torch.where(real, tokens - mean, 0), mean.square().sum(-1)


def _start_index(start: int | Tensor, tokens: Tensor) -> Tensor:
    batch = tokens.shape[0]
    if isinstance(start, Tensor):
        return start.to(device=tokens.device, dtype=torch.int64).expand(batch)
    return torch.full((batch,), start, dtype=torch.int64, device=tokens.device)
