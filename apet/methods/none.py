"""No compression: the model as it is, the 100 % that scores are stated against.

It has no stages: a budget given together with it is refused instead of silently ignored.
"""

from dataclasses import dataclass
from typing import Any

from apet.methods.base import Method, register


@register
@dataclass(frozen=True)
class NoCompression(Method):
    """Every token is kept."""

    name = "none"
    idea = "keep every token"
    stages = ()

    def plan(self, average: float, tokens: int, layers: int) -> dict[str, Any]:
        """No budget at all."""
        return {}
