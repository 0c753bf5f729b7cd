"""Checks of hyper-parameters: the message names the option, its value and what is allowed."""

from math import inf
from typing import Any


def check_range(method: Any, names: tuple[str, ...], low: float, high: float = inf) -> None:
    """Raise ValueError where an option lies outside [low, high]."""
    for name in names:
        value = getattr(method, name)
        if not low <= value <= high:
            allowed = f"be at least {low}" if high == inf else f"lie in [{low}, {high}]"
            raise ValueError(f"option {name}={value!r} of method {method.name!r} must {allowed}")


def check_choice(method: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError where an option is not one of the allowed words."""
    value = getattr(method, name)
    if value not in allowed:
        raise ValueError(f"option {name}={value!r} of method {method.name!r} is unknown; choose {', '.join(allowed)}")
