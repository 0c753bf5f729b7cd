"""What a compression method is, and the registry of them.

A method decides which tokens of a block survive and with which content. It sees token blocks only: no model, no
family. The patch asks it once per stage and group of equally long blocks.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apet.config import ApetConfig, StagePreset
from apet.core.types import CompressedTokens


@dataclass(frozen=True)
class StageContext:
    """What the patch knows about the blocks it hands over.

    Attributes:
        stage: "vision" or "llm".
        preset: The family's settings for this stage.
        config: The user's configuration.
    """

    stage: str
    preset: StagePreset
    config: ApetConfig


class Method:
    """Base class of compression methods; subclasses set `name` and implement `select`.

    Attributes:
        name: Lower-case name users type.
        stages: Stages at which the method can run.
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]] = ("vision", "llm")

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Reduce blocks (B, N, D) to exactly `keep` rows each, 1 <= keep < N, `indices` ascending."""
        raise NotImplementedError


_METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method available under its name."""
    if cls.name != cls.name.lower():
        raise ValueError(f"method name {cls.name!r} must be lower case")
    if cls.name in _METHODS:
        raise ValueError(f"method name {cls.name!r} is already taken by {_METHODS[cls.name].__name__}")
    _METHODS[cls.name] = cls
    return cls


def method_names() -> list[str]:
    """Names of the registered methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str) -> Method:
    """The method registered under `name`.

    Raises:
        ValueError: Unknown name; the message gives the nearest and the available ones.
    """
    if name not in _METHODS:
        raise ValueError(unknown_name("method", name, method_names()))
    return _METHODS[name]()


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """Message for an unknown registry name: what, which value, the nearest and all allowed ones."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Available: {', '.join(known)}"


Selector = Callable[[Tensor, int], CompressedTokens]


def selector(config: ApetConfig, stage: str, preset: StagePreset) -> Selector:
    """The configured method as a function of (blocks, keep) for one stage.

    Raises:
        ValueError: Unknown method, or one that cannot run at this stage.
    """
    method = get_method(config.method)
    if stage not in method.stages:
        raise ValueError(
            f"method {method.name!r} has no {stage} stage (it runs at: {', '.join(method.stages)}); "
            "leave that stage out of the budgets"
        )
    context = StageContext(stage, preset, config)
    return lambda tokens, keep: method.select(tokens, keep, context)
