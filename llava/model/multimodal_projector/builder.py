"""Projectors by the name in `config.mm_projector_type`."""

import re
from typing import Any

from torch import nn


def build_vision_projector(config: Any) -> nn.Module:
    """The projector a LLaVA config names.

    Args:
        config: Has `mm_projector_type` ("linear", "mlpNx_gelu" or "identity"; absent means "linear"), `mm_hidden_size`
            and `hidden_size`.

    Returns:
        A module mapping (..., mm_hidden_size) to (..., hidden_size). Layers of an MLP are numbered as in checkpoints:
        0, 2, 4, ... are linear, the odd ones GELU.

    Raises:
        ValueError: Another type.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if match is None:
        raise ValueError(f"mm_projector_type={kind!r} is unknown; supported: linear, mlp2x_gelu (any depth), identity")
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
