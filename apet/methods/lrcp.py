"""LRCP: keep what a few principal components cannot rebuild, and average the rest into it.

Paper: LRCP, arXiv 2605.15621. The image's tokens are centred; the score of a token is the squared residual behind
their leading principal components, 4 for LLaVA and 8 for Qwen2.5-VL. The highest scores stay, and every dropped token
is averaged into its nearest kept one. Needs neither text nor attention.

Not known from the formulas: where features are read, here in front of the projector; and what nearest means, here the
largest cosine.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._options import check_range
from apet.methods._select import nearest_rows, packed, pool, top_sorted, wide
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class LRCP(Method):
    """Residual of a low-rank approximation.

    Attributes:
        rank: Principal components.
    """

    name = "lrcp"
    paper = "LRCP"
    arxiv = "2605.15621"
    idea = "largest residual behind four principal components, the rest averaged into the nearest"

    rank: int = 4

    def __post_init__(self) -> None:
        check_range(self, ("rank",), 1)

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the largest residuals."""
        x = wide(tokens)
        scores = _residual(x - x.mean(1, keepdim=True), self.rank)
        indices = top_sorted(scores, keep)
        sources = nearest_rows(x, indices)
        return packed(tokens, pool(x, sources, keep), indices, sources, scores)


def _residual(x: Tensor, rank: int) -> Tensor:
    """(B, N) squared norm of every row of `x` (B, N, D) outside its `rank` leading principal components.

    The components are had from inner products in float64: a residual is a difference of large numbers.
    """
    x = x.double()
    products = x @ x.transpose(1, 2)
    values, vectors = torch.linalg.eigh(products)
    explained = (vectors[..., -rank:].square() * values[:, None, -rank:].clamp(min=0)).sum(-1)
    energy = products.diagonal(dim1=1, dim2=2)
    # What a token inside the components leaves is rounding noise: it counts as zero, so that ties are ties.
    noise = 100 * torch.finfo(x.dtype).eps * energy.sum(-1, keepdim=True)
    residual = energy - explained
    return torch.where(residual > noise, residual, 0)
