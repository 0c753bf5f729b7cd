"""Cosine similarity: the most similar kept token of every dropped one.

ApET (arXiv 2602.19870) section 3: each dropped token goes to the kept token of largest cosine similarity.

The receiver is the first with the largest float64 similarity rounded to float32, so that it does not depend on the
matrix kernel, the batch size or the TF32 setting, and equal tokens tie exactly. On CPUs a float32 product decides the
clear cases, at half the cost, and only the donors it leaves in doubt are looked at again.
"""

import torch
from torch import Tensor

# Devices where looking at a value costs nothing.
MAY_LOOK = ("cpu",)

_EPS = 1e-8
# Twice the largest error of a float32 cosine (D terms of rounding 6e-8, summed in blocks), with a wide margin.
_DOUBT = 1e-5


def may_look(tensor: Tensor) -> bool:
    """Whether values may decide what is computed: nothing waits for them, and nothing is being compiled."""
    return tensor.device.type in MAY_LOOK and not torch.compiler.is_compiling()


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (B, K, D) scaled to length one; zero rows stay zero."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=_EPS)


def nearest_units(donors: Tensor, unit: Tensor, allowed: Tensor) -> Tensor:
    """Row (B, M) of the most similar unit vector for every donor; the first row wins a tie.

    Args:
        donors: (B, M, D).
        unit: (B, K, D) receivers of length one.
        allowed: (B, K) bool; rows that may receive.
    """
    # A donor's own norm scales its whole row of similarities and cannot change the largest.
    if donors.dtype != torch.float32 or not may_look(donors):
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
