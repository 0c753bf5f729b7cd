"""Fold dropped tokens into their most similar kept token.

ApET (arXiv 2602.19870) section 3: each dropped token goes to the kept token of largest cosine similarity; a kept token
becomes the unweighted mean of itself and everything it received.

Matrix products are taken in float64 and then rounded: the result does not depend on the matrix kernel, the batch size
or the TF32 setting, and equal tokens tie exactly.
"""

import torch
from torch import Tensor

_EPS = 1e-8


def nearest_receivers(donors: Tensor, receivers: Tensor, allowed: Tensor) -> Tensor:
    """Row (B, M) of the most cosine-similar receiver for every donor; the first row wins a tie.

    Args:
        donors: (B, M, D).
        receivers: (B, K, D).
        allowed: (B, K) bool; rows that may receive.
    """
    # A donor's own norm scales its whole row of similarities and cannot change the largest.
    unit = receivers / receivers.norm(dim=-1, keepdim=True).clamp(min=_EPS)
    similarity = (donors.double() @ unit.double().transpose(1, 2)).float()
    return similarity.masked_fill(~allowed.unsqueeze(1), -torch.inf).argmax(-1)


def merge_into(receivers: Tensor, donors: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean (B, K, D) of every receiver and the donors assigned to it; receivers without donors are returned unchanged.

    The sum is a product with the one-hot assignment: deterministic on every device.

    Args:
        receivers: (B, K, D).
        donors: (B, M, D).
        target: (B, M) int64 receiver row of each donor.
        weight: (B, M) 1 for donors that count and 0 for those that do not; None if all count.
    """
    rows = torch.arange(receivers.shape[1], device=target.device).view(1, -1, 1)
    assignment = (target.unsqueeze(1) == rows).double()
    if weight is not None:
        assignment = assignment * weight.unsqueeze(1)
        donors = torch.where(weight.unsqueeze(-1) > 0, donors, 0)
    received = assignment.sum(-1, keepdim=True)
    merged = torch.baddbmm(receivers.double(), assignment, donors.double()) / (1 + received)
    return torch.where(received > 0, merged.to(receivers.dtype), receivers)
