"""Tests of the algorithm and its pieces on tensors; no model."""

import torch


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal float32 values, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
