"""How badly a few basis tokens rebuild every token: the approximation error that decides what is kept.

ApET (arXiv 2602.19870) section 3: minimise ||X - C^T S||^2 + ridge ||C||^2 over C, with S the basis rows; the error of
token i is ||x_i - c_i^T S||_2.
"""

import torch
from torch import Tensor

from apet.core.types import Basis

# Relative jitter on the basis Gram matrix: collinear basis tokens make it singular, and an absolute ridge of 1e-5 is
# below rounding for tokens of large norm.
_JITTER = 1e-12
# An error below this share of the token's norm is the rounding of its float32 features: the token lies in the span of
# the basis. Zero keeps rounding from deciding the order of such tokens.
_IN_SPAN = 1e-6


def approximation_errors(tokens: Tensor, basis: Basis, ridge: float) -> Tensor:
    """L2 error (B, N) of the ridge least-squares reconstruction of `tokens` (B, N, D) from the basis.

    Solved in float64 and rounded to the tokens' dtype: a nearly singular basis multiplies the rounding of the products
    by up to 1e6, and equal tokens must get equal errors whatever the batch size or matrix kernel. The residual is
    formed directly rather than as a difference of squared norms, which cancels for tokens close to the basis' span.
    """
    if basis.features.shape[1] == 0:
        return tokens.norm(dim=-1)
    x, features = tokens.double(), basis.features.double()
    gram = features @ features.transpose(1, 2)
    scale = gram.diagonal(dim1=1, dim2=2).amax(-1, keepdim=True)
    jitter = (_JITTER * scale).clamp(min=torch.finfo(gram.dtype).tiny)
    # An invalid basis row is zero: a unit on its diagonal keeps the system regular and its coefficients zero.
    gram = gram + torch.diag_embed(ridge + jitter + (~basis.valid).double())
    factor, _ = torch.linalg.cholesky_ex(gram)
    coefficients = torch.cholesky_solve(features @ x.transpose(1, 2), factor)
    errors = torch.baddbmm(x, coefficients.transpose(1, 2), features, alpha=-1).norm(dim=-1)
    return torch.where(errors <= _IN_SPAN * x.norm(dim=-1), 0, errors).to(tokens.dtype)
