"""Relevance of tokens to the text, where both live in one space."""

import torch
from torch import Tensor

from apet.methods._select import cosine


def text_relevance(tokens: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine (B, N) of every token to the sample's text tokens (B, T, D), `mask` (B, T) True for real ones."""
    share = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    return (cosine(tokens, text) * share.unsqueeze(1)).sum(-1)


def min_max(scores: Tensor, eps: float = 1e-6) -> Tensor:
    """Scores (B, N) scaled to (0, 1] per sample: (r - min + eps) / (max - min), equal scores to 1."""
    low, high = scores.aminmax(dim=-1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (scores - low + eps) / spread.clamp(min=torch.finfo(scores.dtype).tiny), 1.0)
