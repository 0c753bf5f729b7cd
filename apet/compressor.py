"""The compression algorithm, once, for every stage and family: defines `compress`.

Choose basis tokens, rebuild every token from them by least squares, keep the tokens with the largest error, let basis
features take the place of the least informative kept ones, and merge the rest into their most similar kept token
(ApET, arXiv 2602.19870, section 3). Stages and families differ by arguments only. Pure function: no model, no host
synchronisation, no data-dependent shape, no global random state.
"""

import torch
from torch import Tensor

from apet.core.approx import approximation_errors
from apet.core.basis import select_basis
from apet.core.rows import Rows, block_rows, gather_rows
from apet.core.types import Basis, CompressedTokens
from apet.kernels import rows_for

BASIS_SELECTIONS = ("fps", "dpc", "random")
SLOTS = ("position", "error")
INSERTIONS = ("overwrite", "blend", "append", "none")


def compress(
    tokens: Tensor,
    keep: int,
    *,
    basis: int = 10,
    basis_selection: str = "fps",
    start: int | Tensor | None = None,
    ridge: float = 1e-5,
    slots: str = "position",
    insertion: str = "overwrite",
    merge: bool = True,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    validate: bool = False,
) -> CompressedTokens:
    """Reduce every sample of a batch to `keep` tokens.

    Args:
        tokens: (B, N, D) floating point; computed in float32 (float64 stays float64), returned in its own dtype, never
            modified.
        keep: Tokens kept per sample, at least 1. `keep` >= N returns the tokens unchanged (without their padding).
        basis: Basis tokens k. With "overwrite" and "blend" at most `keep` - 1 are used, so that a receiver remains.
        basis_selection: "fps" (farthest-point sampling), "dpc" (density-peak cluster means) or "random".
        start: First token of "fps": an index or a (B,) tensor; None is the token farthest from the mean.
        ridge: Ridge of the least-squares problem, absolute.
        slots: Which of the k least informative kept tokens takes basis token j: ordered by "position" or by falling
            "error".
        insertion: What happens in these slots: "overwrite" by the basis feature, "blend" half and half, "append" the
            basis after the kept tokens instead (`keep` + k rows), or "none".
        merge: Average dropped tokens into their most similar kept token; False drops them.
        mask: (B, N) bool, True for real tokens. Padding is never chosen, never merged and takes no budget; a sample
            with fewer real tokens than `keep` keeps all of them, followed by zero rows with index -1.
        generator: Randomness of "random"; None draws the same positions at every call.
        validate: Check the values too (finite tokens, `start` in range, `mask` not empty). Costs one host
            synchronisation.

    Returns:
        CompressedTokens. Equal input gives equal output: ties go to the lower position, and a sample alone gives what
        it gives in a batch. A non-finite sample does not touch the others.

    Raises:
        ValueError: An argument is out of range, or with `validate` a value is.
        TypeError: `tokens` is not a floating point tensor, or `keep`, `basis` or `start` is not an int.
    """
    _check_arguments(tokens, keep, basis, basis_selection, start, ridge, slots, insertion, mask)
    if validate:
        _check_values(tokens, start, mask)
    with torch.autocast(tokens.device.type, enabled=False):
        n = tokens.shape[1]
        whole = keep >= n and mask is None
        keep = min(keep, n)
        k = min(basis, keep - 1) if insertion in ("overwrite", "blend") and not whole else min(basis, n)
        parts = []
        for part, part_start, part_mask in _parts(tokens, start, mask):
            rows = rows_for(part)
            picks = select_basis(rows, k, basis_selection, start=part_start, mask=part_mask, generator=generator)
            errors = approximation_errors(rows.squared_norms, picks, ridge)
            if part_mask is not None:
                errors = errors.masked_fill(~part_mask, -torch.inf)
            if whole:
                parts.append(_identity(part, errors, picks.indices))
            else:
                parts.append(_keep_and_merge(rows, keep, picks, errors, slots, insertion, merge, part_mask))
        first, *others = parts
        result = CompressedTokens(*map(torch.cat, zip(*parts, strict=True))) if others else first
        return result._replace(tokens=result.tokens.to(tokens.dtype))


def _parts(tokens: Tensor, start: int | Tensor | None, mask: Tensor | None):
    """The batch in parts of (tokens, start, mask) that are converted to float64 at once: a cache's worth on CPUs."""
    batch = tokens.shape[0]
    size = max(1, block_rows(tokens[:1]) // tokens.shape[1])
    for first in range(0, max(batch, 1), size):
        part = slice(first, first + size)
        some = start.expand(batch)[part] if isinstance(start, Tensor) else start
        yield tokens[part], some, None if mask is None else mask[part]


def _identity(tokens: Tensor, errors: Tensor, basis: Tensor) -> CompressedTokens:
    batch, n = tokens.shape[:2]
    indices = torch.arange(n, device=tokens.device).repeat(batch, 1)
    return CompressedTokens(tokens, indices, errors, basis, indices.clone())


def _keep_and_merge(
    rows: Rows,
    keep: int,
    picks: Basis,
    errors: Tensor,
    slots: str,
    insertion: str,
    merge: bool,
    mask: Tensor | None,
) -> CompressedTokens:
    """Steps C4 to C7 of the algorithm specification, in order of falling error ("rank") until the last step."""
    order = errors.sort(dim=-1, descending=True, stable=True).indices
    kept, dropped = order[:, :keep], order[:, keep:]
    features = gather_rows(rows.tokens, kept)
    features = features if features.dtype == torch.float64 else features.float()
    rank = torch.arange(keep, device=kept.device).expand_as(kept)
    real = None if mask is None else mask.gather(1, kept)

    slot_count = _slot_count(picks, keep, insertion, mask)
    is_slot = rank >= keep - slot_count
    if merge:
        receives = ~is_slot if real is None else ~is_slot & real
        target = rows.nearest(dropped, features, receives)
        group = torch.empty_like(order).scatter(1, order, torch.cat([rank, target], 1))
        if mask is not None:
            group = group.masked_fill(~mask, -1)
        features = rows.group_means(group, keep).to(features.dtype)
    else:
        target = torch.full_like(dropped, -1)
    if insertion in ("overwrite", "blend") and picks.indices.shape[1] > 0:
        features = _insert_basis(features, picks, kept, is_slot, slot_count, slots, insertion)
    if real is not None:
        features = torch.where(real.unsqueeze(-1), features, 0)
        kept = torch.where(real, kept, -1)

    if insertion == "append":
        features = torch.cat([features, picks.features.to(features.dtype)], 1)
        indices, row = torch.cat([kept, picks.indices], 1), rank
    else:
        features, indices, row = _by_position(features, kept, errors.shape[1])
    sources = _sources(order, row, target, mask)
    return CompressedTokens(features, indices, errors, picks.indices, sources)


def _slot_count(picks: Basis, keep: int, insertion: str, mask: Tensor | None) -> Tensor:
    """Slots (B, 1) that take a basis feature: the valid picks, none where all real tokens of a sample are kept."""
    count = picks.valid.sum(-1, keepdim=True)
    if insertion in ("append", "none"):
        return torch.zeros_like(count)
    if mask is None:
        return count
    return torch.where(mask.sum(-1, keepdim=True) > keep, count, 0)


def _insert_basis(
    features: Tensor,
    picks: Basis,
    kept: Tensor,
    is_slot: Tensor,
    slot_count: Tensor,
    slots: str,
    insertion: str,
) -> Tensor:
    """Write (or blend) basis token j into slot j, slots numbered by position or by falling error."""
    keep = kept.shape[1]
    if slots == "error":
        number = torch.arange(keep, device=kept.device) - (keep - slot_count)
    else:
        place = torch.where(is_slot, kept, -1)
        smaller = is_slot.unsqueeze(1) & (place.unsqueeze(1) < place.unsqueeze(2))
        number = smaller.sum(-1)
    number = number.clamp(0, picks.indices.shape[1] - 1)
    incoming = gather_rows(picks.features, number).to(features.dtype)
    if insertion == "blend":
        incoming = 0.5 * incoming + 0.5 * features
    return torch.where(is_slot.unsqueeze(-1), incoming, features)


def _by_position(features: Tensor, kept: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in ascending source position (missing rows last), their positions, and the row of every rank."""
    position = torch.where(kept < 0, n, kept).sort(dim=-1, stable=True)
    row = position.indices.argsort(dim=-1)
    return gather_rows(features, position.indices), kept.gather(1, position.indices), row


def _sources(order: Tensor, row: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Output row (B, N) of every token, from the rows of the kept ranks and the ranks that dropped tokens joined."""
    joined = torch.where(target < 0, -1, row.gather(1, target.clamp(min=0)))
    sources = torch.empty_like(order).scatter(1, order, torch.cat([row, joined], 1))
    return sources if mask is None else sources.masked_fill(~mask, -1)


def _check_arguments(tokens, keep, basis, basis_selection, start, ridge, slots, insertion, mask) -> None:
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        kind = getattr(tokens, "dtype", type(tokens))
        raise TypeError(f"tokens must be a floating point tensor (B, N, D), got {kind}")
    if tokens.dim() != 3 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must have shape (B, N, D) with N >= 1, got {tuple(tokens.shape)}")
    for name, value, least in (("keep", keep, 1), ("basis", basis, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name}={value} is too small; it must be at least {least}")
    if not isinstance(ridge, (int, float)) or not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge={ridge!r} must be a finite number of at least 0")
    for name, value, allowed in (
        ("basis_selection", basis_selection, BASIS_SELECTIONS),
        ("slots", slots, SLOTS),
        ("insertion", insertion, INSERTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
    batch, n = tokens.shape[:2]
    is_index = not start.dtype.is_floating_point if isinstance(start, Tensor) else type(start) is int
    if start is not None and not is_index:
        raise TypeError(f"start must be None, an int or a tensor of ints, got {start!r}")
    if isinstance(start, Tensor):
        if start.shape not in (torch.Size([]), torch.Size([1]), torch.Size([batch])):
            raise ValueError(f"start must have shape ({batch},), one index per sample, got {tuple(start.shape)}")
    elif start is not None and not 0 <= start < n:
        raise ValueError(f"start={start} is not one of the {n} tokens; choose 0..{n - 1}")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (batch, n)):
        kind = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a bool tensor of shape {(batch, n)}, got {kind}")


def _check_values(tokens: Tensor, start: int | Tensor | None, mask: Tensor | None) -> None:
    """The checks that read values: gathered into one transfer to the host."""
    finite = tokens.isfinite().all(-1)
    bad = ~(finite.all(-1) if mask is None else (finite | ~mask).all(-1))
    empty = torch.zeros_like(bad) if mask is None else ~mask.any(-1)
    n = tokens.shape[1]
    outside = torch.zeros_like(bad)
    if isinstance(start, Tensor):
        outside = ((start < 0) | (start >= n)).to(bad.device).expand_as(bad)
    for name, rows in zip(("bad", "empty", "outside"), torch.stack([bad, empty, outside]).tolist(), strict=True):
        if any(rows):
            sample = rows.index(True)
            raise ValueError(
                {
                    "bad": f"sample {sample} holds NaN or infinite tokens; find their source before compressing",
                    "empty": f"sample {sample} has no real token in its mask; leave the sample out",
                    "outside": f"start of sample {sample} is not one of its {n} tokens; choose 0..{n - 1}",
                }[name]
            )
