"""The algorithm once more, as plainly as it can be written: numpy, float64, one sample, loops. No code is shared.

`margin` of a result is the smallest gap (relative to the tokens' size) by which any decision was taken. Where it is
close to rounding noise, float32 may decide otherwise and a comparison of indices means nothing.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    tokens: np.ndarray
    indices: np.ndarray
    errors: np.ndarray
    sources: np.ndarray
    margin: float


def lead(values) -> float:
    """Gap between the largest and the second largest value."""
    ranked = sorted(values, reverse=True)
    return float("inf") if len(ranked) < 2 else ranked[0] - ranked[1]


def farthest_points(x: np.ndarray, k: int, start: int | None = None) -> tuple[list[int], float]:
    """Step C1: picks, fewer than k if no further distinct token exists, and the margin."""
    size, margin = np.abs(x).max() + 1e-30, float("inf")
    if start is None:
        spread = np.linalg.norm(x - x.mean(0), axis=1)
        start, margin = int(spread.argmax()), lead(spread)
    picks = [start]
    gap = np.linalg.norm(x - x[start], axis=1)
    while len(picks) < k and gap.max() > 0:
        margin = min(margin, lead(gap))
        picks.append(int(gap.argmax()))
        gap = np.minimum(gap, np.linalg.norm(x - x[picks[-1]], axis=1))
    return picks[:k], margin / size


def density_peaks(x: np.ndarray, k: int) -> tuple[list[int], np.ndarray, float]:
    """Centres, cluster means and margin of density-peak clustering; densities and scores as logarithms.

    Of two equally dense tokens the earlier counts as denser.
    """
    n, dim = x.shape
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1) / dim**0.5
    density = [-np.mean(np.sort(row)[:k] ** 2) for row in distance]
    score = np.empty(n)
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score[i] = density[i] + np.log(distance[i, denser].min() if denser else distance[i].max())
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:k]
    cluster = distance[centres].argmin(0)
    ranked = np.sort(score)[::-1]
    margin = min([lead(-column) for column in distance[centres].T] + list((ranked[:-1] - ranked[1:])[:k]))
    return centres, np.stack([x[cluster == j].mean(0) for j in range(k)]), margin


def approximation_errors(x: np.ndarray, basis: np.ndarray, ridge: float) -> np.ndarray:
    """Step C3."""
    if len(basis) == 0:
        return np.linalg.norm(x, axis=1)
    coefficients = np.linalg.solve(basis @ basis.T + ridge * np.eye(len(basis)), basis @ x.T)
    return np.linalg.norm(x - coefficients.T @ basis, axis=1)


def compress(x, keep, picks, basis, ridge=1e-5, slots="position", insertion="overwrite", merge=True) -> Result:
    """Steps C3 to C7 for the basis features `basis` (k, D) taken at `picks`."""
    n, k = len(x), len(picks)
    errors = approximation_errors(x, basis, ridge)
    order = sorted(range(n), key=lambda i: (-errors[i], i))
    kept, donors = order[:keep], order[keep:]
    slot_tokens = kept[keep - k :] if insertion in ("overwrite", "blend") and k else []
    receivers = [i for i in kept if i not in slot_tokens]

    gaps = [errors[a] - errors[b] for a, b in zip(order, order[1:], strict=False)]
    decisive = {keep - 1} if donors else set()
    if slot_tokens:
        decisive |= {keep - k - 1} | (set(range(keep - k, keep - 1)) if slots == "error" else set())
    if insertion == "append":
        decisive |= set(range(keep - 1))
    margin = min([gaps[i] for i in decisive if i >= 0] + [np.inf]) / (np.linalg.norm(x, axis=1).max() + 1e-30)

    feature = {i: x[i].copy() for i in kept}
    host = {i: i for i in kept}
    if merge:
        groups = {i: [x[i]] for i in receivers}
        for donor in donors:
            norms = [max(np.linalg.norm(x[i]) * np.linalg.norm(x[donor]), 1e-8) for i in receivers]
            cosine = [x[i] @ x[donor] / norm for i, norm in zip(receivers, norms, strict=True)]
            margin = min(margin, lead(cosine))
            host[donor] = receivers[int(np.argmax(cosine))]
            groups[host[donor]].append(x[donor])
        feature |= {i: np.mean(group, axis=0) for i, group in groups.items()}
    for j, i in enumerate(sorted(slot_tokens) if slots == "position" else slot_tokens):
        feature[i] = basis[j] if insertion == "overwrite" else 0.5 * basis[j] + 0.5 * x[i]

    out = kept if insertion == "append" else sorted(kept)
    rows = [feature[i] for i in out] + (list(basis) if insertion == "append" else [])
    indices = out + (list(picks) if insertion == "append" else [])
    sources = [out.index(host[i]) if i in host else -1 for i in range(n)]
    return Result(np.array(rows), np.array(indices), errors, np.array(sources), float(margin))
