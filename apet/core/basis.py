"""Choose the basis tokens: farthest-point sampling (the published choice), density peaks, or random.

ApET (arXiv 2602.19870) section 3: farthest-point sampling with Euclidean distances and k = 10; density peaks and random
are its ablations. No function synchronises with the host, and no output shape depends on the data.
"""

import torch
from torch import Tensor, nn

from apet.core.constants import on_device
from apet.core.rows import Rows, squared_distances
from apet.core.types import Basis


def select_basis(
    rows: Rows,
    k: int,
    selection: str,
    *,
    start: int | Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Basis:
    """Choose `k` basis tokens per sample.

    Args:
        rows: The tokens (B, N, D).
        k: Basis size, 0 <= k <= N.
        selection: "fps", "dpc" or "random".
        start: First token of "fps": an index, a (B,) tensor of indices, or None for the token farthest from the mean.
        mask: (B, N) bool, True for real tokens; None if all are.
        generator: Source of "random"; None draws the same positions at every call.
    """
    if k == 0:
        batch, n, dim = rows.tokens.shape
        indices = torch.zeros(batch, 0, dtype=torch.int64, device=rows.tokens.device)
        features = rows.squared_norms.new_zeros(batch, 0, dim)
        return Basis(indices, indices.bool(), features, features.new_zeros(batch, 0, n))
    if selection == "fps":
        return farthest_points(rows, k, start=start, mask=mask)
    if selection == "dpc":
        indices, valid, features = density_peaks(rows.tokens, k, mask=mask)
        features = features.double()
    else:
        indices, valid = random_positions(rows.tokens, k, mask=mask, generator=generator)
        features = rows.gather(indices.clamp(min=0)).masked_fill(~valid.unsqueeze(-1), 0)
    return Basis(indices, valid, features, rows.products(features))


def farthest_points(rows: Rows, k: int, *, start: int | Tensor | None = None, mask: Tensor | None = None) -> Basis:
    """`k` mutually distant tokens in pick order.

    Every pick is the token whose Euclidean distance to the nearest earlier pick is largest (lowest index on ties). A
    sample with fewer than `k` distinct tokens gets -1 and an invalid mark for the missing picks. A `start` on padding
    counts as None.

    The products that give a pick's distances are those its least-squares problem needs; each is taken once.
    """
    norms = rows.squared_norms
    mean = rows.mean(mask)
    spread = squared_distances(rows.products(mean).squeeze(1), norms, mean.square().sum(-1))
    if mask is not None:
        spread = spread.masked_fill(~mask, -1)
    pick = spread.argmax(-1) if start is None else _start_index(start, spread, mask)
    gap = torch.full_like(spread, torch.inf)
    picks, products, farthest = [], [], []
    for _ in range(k):
        picks.append(pick)
        column, gap = rows.approach(pick.unsqueeze(-1), gap)
        products.append(column)
        if mask is not None:
            gap = gap.masked_fill(~mask, -torch.inf)
        largest, pick = gap.max(-1)
        farthest.append(largest)
    # Non-finite samples keep their picks, so that one of them changes no shape and no other sample.
    left = ~(torch.stack(farthest, 1) <= 0)
    valid = nn.functional.pad(left[:, :-1].cumprod(-1).bool(), (1, 0), value=True)
    indices, missing = torch.stack(picks, 1), ~valid.unsqueeze(-1)
    features = rows.gather(indices).masked_fill(missing, 0)
    return Basis(indices.masked_fill(~valid, -1), valid, features, torch.stack(products, 1).masked_fill(missing, 0))


def density_peaks(tokens: Tensor, k: int, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (B, k) of `k` density-peak clusters (DPC-KNN), which are valid (B, k), and cluster means (B, k, D).

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
    return torch.where(valid, centres, -1), valid, features


def random_positions(
    tokens: Tensor, k: int, *, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`k` distinct uniform positions (B, k) and which are valid (fewer real tokens than `k`: the rest is invalid).

    One draw serves all samples of a batch, so that a sample's result does not depend on its neighbours.
    """
    batch, n = tokens.shape[:2]
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    draw = torch.rand(n, generator=generator, device=generator.device)
    draw = (on_device(draw, tokens.device) if draw.device.type == "cpu" else draw.to(tokens.device)).expand(batch, n)
    if mask is not None:
        draw = draw.masked_fill(~mask, -1.0)
    indices = draw.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    valid = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask.gather(1, indices)
    return torch.where(valid, indices, -1), valid


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def _start_index(start: int | Tensor, spread: Tensor, mask: Tensor | None) -> Tensor:
    batch, device = spread.shape[0], spread.device
    if isinstance(start, Tensor):
        index = start.to(device=device, dtype=torch.int64).expand(batch)
    else:
        index = torch.full((batch,), start, dtype=torch.int64, device=device)
    if mask is None:
        return index
    return torch.where(mask.gather(1, index.unsqueeze(-1)).squeeze(-1), index, spread.argmax(-1))
