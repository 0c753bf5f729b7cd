"""How badly a few basis tokens rebuild every token: the approximation error that decides what is kept.

ApET (arXiv 2602.19870) section 3: minimise ||X - C^T S||^2 + ridge ||C||^2 over C, with S the basis rows; the error of
token i is ||x_i - c_i^T S||_2.
"""

import torch
from torch import Tensor

from apet.core.types import Basis

# Relative jitter on the basis Gram matrix: collinear basis tokens make it singular, and an absolute ridge of 1e-5 is
# below rounding for tokens of large norm. Far below the float32 noise of the products themselves.
_JITTER = 1e-12


def approximation_errors(tokens: Tensor, basis: Basis, ridge: float) -> Tensor:
    """L2 error (B, N) of the ridge least-squares reconstruction of `tokens` (B, N, D) from the basis.

    The small k x k system is solved in float64; the residual is formed directly rather than as a difference of squared
    norms, which cancels for tokens close to the span of the basis.
    """
    if basis.features.shape[1] == 0:
        return tokens.norm(dim=-1)
    features = basis.features.double()
    gram = features @ features.transpose(1, 2)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    jitter = _JITTER * diagonal.amax(-1, keepdim=True)
    # An invalid basis row is zero: a unit on its diagonal keeps the system regular and its coefficients zero.
    gram = gram + torch.diag_embed(ridge + jitter + (~basis.valid).double())
    factor, _ = torch.linalg.cholesky_ex(gram)
    products = (basis.features @ tokens.transpose(1, 2)).double()
    coefficients = torch.cholesky_solve(products, factor).to(tokens.dtype)
    return (tokens - coefficients.transpose(1, 2) @ basis.features).square().sum(-1).sqrt()
