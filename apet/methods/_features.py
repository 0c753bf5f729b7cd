"""Feature spaces in which ApET+ measures errors, tokens of extreme norm ("sinks"), and tokens unlike all others.

Encoders put global information into a few tokens whose norm is several times the median; squared errors then speak of
little else.
"""

import torch
from torch import Tensor

from apet.methods._select import top, unit
from apet.methods._text import min_max


def error_space(x: Tensor, normalise: str, clipped: float) -> Tensor:
    """Tokens (B, N, D) as the selection sees them.

    Args:
        x: Tokens in the accumulation dtype.
        normalise: "raw", "unit", "centre" or "centre_unit".
        clipped: Share of the tokens whose norms are cut down to the largest of the others'; 0 is none.
    """
    if normalise in ("centre", "centre_unit"):
        x = x - x.mean(1, keepdim=True)
    if normalise in ("unit", "centre_unit"):
        return unit(x)
    if not clipped:
        return x
    norms = x.norm(dim=-1, keepdim=True)
    extreme = min(x.shape[1] - 1, -int(-clipped * x.shape[1] // 1))
    limit = norms.sort(dim=1, descending=True).values[:, extreme : extreme + 1]
    return x * (limit / norms.clamp(min=torch.finfo(x.dtype).tiny)).clamp(max=1)


def sink_positions(x: Tensor, share: float, keep: int) -> Tensor:
    """Positions (B, s) of the tokens of largest norm, largest first; s leaves `keep` tokens to choose from."""
    n = x.shape[1]
    return top(x.norm(dim=-1), max(1, min(-int(-share * n // 1), n - keep + 1)))


def outlierness(x: Tensor) -> Tensor:
    """(B, N) how little every token resembles the others: the negated mean cosine to them, scaled to (0, 1] per image.

    Cosines of the tokens as they are: what all of them share is what makes a token common (Cen-Prune, arXiv
    2608.30263).
    """
    directions = unit(x)
    # The sum of cosines is one product with the sum of directions: no (N, N) matrix.
    everything = (directions @ directions.sum(1, keepdim=True).transpose(1, 2)).squeeze(-1)
    itself = directions.square().sum(-1)
    return min_max((itself - everything) / max(1, x.shape[1] - 1))
