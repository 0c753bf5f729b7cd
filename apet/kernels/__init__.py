"""Device kernels behind `apet.core.rows.Rows`: which one serves a tensor."""

import importlib.util

import torch
from torch import Tensor

from apet.core.rows import Rows

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rows_for(tokens: Tensor) -> Rows:
    """`tokens` (B, N, D) as the algorithm reads them: Triton kernels on CUDA, torch everywhere else."""
    if tokens.is_cuda and tokens.dtype in _DTYPES and importlib.util.find_spec("triton") is not None:
        from apet.kernels.triton_rows import TritonRows  # imports a compiler: only where it is used

        return TritonRows(tokens)
    return Rows((tokens if tokens.dtype == torch.float64 else tokens.float()).contiguous())
