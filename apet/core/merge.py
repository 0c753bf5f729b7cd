"""Fold dropped tokens into their most similar kept token.

ApET (arXiv 2602.19870) section 3: each dropped token goes to the kept token of largest cosine similarity; a kept token
becomes the unweighted mean of itself and everything it received.

The receiver is the first with the largest float64 similarity rounded to float32, so that it does not depend on the
matrix kernel, the batch size or the TF32 setting, and equal tokens tie exactly. On CPUs a float32 product decides the
clear cases, at half the cost, and only the donors it leaves in doubt are looked at again.
"""

import torch
from torch import Tensor

from apet.core.rows import Rows, block_rows, gather_rows

# Devices where looking at a value costs nothing.
MAY_LOOK = ("cpu",)

_EPS = 1e-8
# Twice the largest error of a float32 cosine (D terms of rounding 6e-8, summed in blocks), with a wide margin.
_DOUBT = 1e-5


def assign_dropped(tokens: Tensor, dropped: Tensor, receivers: Tensor, allowed: Tensor) -> Tensor:
    """Receiver (B, M) of every dropped token: `nearest_receivers` over blocks of donors, which bounds extra memory.

    Args:
        tokens: (B, N, D).
        dropped: (B, M) int64 positions of the donors.
        receivers: (B, K, D).
        allowed: (B, K) bool; rows that may receive.
    """
    unit = _unit(receivers)
    blocks = dropped.split(block_rows(tokens), 1)
    return torch.cat([_nearest(gather_rows(tokens, block), unit, allowed) for block in blocks], 1)


def merge_groups(rows: Rows, group: Tensor, count: int) -> Tensor:
    """Mean (B, count, D) float64 of the tokens of every group; zero for a group without tokens.

    Args:
        rows: The tokens (B, N, D).
        group: (B, N) int64 group of every token, or -1 for tokens that belong to none.
        count: Number of groups.
    """
    size = (group.unsqueeze(1) == torch.arange(count, device=group.device).view(1, -1, 1)).sum(-1, keepdim=True)
    total = rows.group_sums(torch.where(group < 0, count, group), count + 1)
    return total[:, :count] / size.clamp(min=1)


def nearest_receivers(donors: Tensor, receivers: Tensor, allowed: Tensor) -> Tensor:
    """Row (B, M) of the most cosine-similar receiver for every donor; the first row wins a tie.

    Args:
        donors: (B, M, D).
        receivers: (B, K, D).
        allowed: (B, K) bool; rows that may receive.
    """
    return _nearest(donors, _unit(receivers), allowed)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=_EPS)


def _nearest(donors: Tensor, unit: Tensor, allowed: Tensor) -> Tensor:
    # A donor's own norm scales its whole row of similarities and cannot change the largest.
    fast = donors.device.type in MAY_LOOK and donors.dtype == torch.float32 and not torch.compiler.is_compiling()
    if not fast:
        similarity = (donors.double() @ unit.double().transpose(1, 2)).float()
        return similarity.masked_fill(~allowed.unsqueeze(1), -torch.inf).argmax(-1)
    similarity = (donors @ unit.transpose(1, 2)).masked_fill_(~allowed.unsqueeze(1), -torch.inf)
    best, target = similarity.max(-1)
    slack = _DOUBT * donors.norm(dim=-1)
    # Written so that NaN is in doubt.
    doubtful = (similarity < (best - slack).unsqueeze(-1)).sum(-1) != unit.shape[1] - 1
    for sample in doubtful.any(-1).nonzero().flatten().tolist():
        rows = doubtful[sample].nonzero().flatten()
        again = (donors[sample, rows].double() @ unit[sample].double().T).float()
        target[sample, rows] = again.masked_fill(~allowed[sample], -torch.inf).argmax(-1)
    return target
