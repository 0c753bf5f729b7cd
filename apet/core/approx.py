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


def approximation_errors(squared_norms: Tensor, basis: Basis, ridge: float) -> Tensor:
    """L2 error (B, N) float32 of the ridge least-squares reconstruction of every token from the basis.

    With G the basis' Gram matrix, b_i the products of token i with the basis, L L^T = G + ridge and c_i the
    coefficients, the squared error is |x_i|^2 - |L^-1 b_i|^2 - ridge |c_i|^2: no token is read again. Float64 products
    leave 1e-15 |x_i|^2 after the subtraction, far below what float32 features mean.

    Args:
        squared_norms: (B, N) float64.
        basis: Basis vectors and their products with all tokens.
        ridge: Added to the diagonal of G.
    """
    if basis.features.shape[1] == 0:
        return squared_norms.sqrt().float()
    gram = basis.features @ basis.features.transpose(1, 2)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = diagonal.amax(-1, keepdim=True)
    penalty = ridge + (_JITTER * scale).clamp(min=torch.finfo(gram.dtype).tiny)
    # An invalid basis row is zero: a unit on its diagonal keeps the system regular and its coefficients zero.
    gram = gram + torch.diag_embed(penalty + (~basis.valid).double())
    factor, _ = torch.linalg.cholesky_ex(gram)
    explained = torch.linalg.solve_triangular(factor, basis.products, upper=False)
    coefficients = torch.linalg.solve_triangular(factor.transpose(1, 2), explained, upper=True)
    squared = squared_norms - explained.square().sum(1) - penalty * coefficients.square().sum(1)
    return torch.where(squared <= _IN_SPAN**2 * squared_norms, 0, squared).sqrt().float()
