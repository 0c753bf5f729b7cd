"""The blocks of tokens that selection is timed on, and a method ready to be called on one."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from apet.bench.as_published import compress_as_published
from apet.bench.stage_inputs import SyntheticInputs
from apet.config import ApetConfig, StagePreset
from apet.core.types import CompressedTokens
from apet.methods import get_method, method_names, selector

AS_PUBLISHED = "as published"


class Shape(NamedTuple):
    """A block of tokens and its budget, written ``1x576x1024:96``.

    Attributes:
        batch: Samples or crops B.
        tokens: Tokens N.
        dim: Width D.
        keep: Budget K.
    """

    batch: int
    tokens: int
    dim: int
    keep: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read ``BxNxD:K``.

        Raises:
            ValueError: Another form, or a budget that is no compression.
        """
        size, colon, keep = text.strip().partition(":")
        numbers = [*size.split("x"), keep]
        if not colon or len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"shape {text!r} must be BxNxD:K, like 1x576x1024:96")
        shape = cls(*map(int, numbers))
        if min(shape) < 1 or shape.keep >= shape.tokens:
            raise ValueError(f"shape {text!r} must keep at least 1 and fewer than its {shape.tokens} tokens")
        return shape

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.dim}:{self.keep}"


def block(shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, N, D) tokens made on the device: a few directions with noise, norms of differing size, as towers give them.

    Selection takes the same time on any values; these make its choices free of ties.
    """
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    topics = noise(shape.batch, 12, shape.dim)
    mix = noise(shape.batch, shape.tokens, 12)
    scale = 1 + noise(shape.batch, shape.tokens, 1).abs()
    return (scale * (mix @ topics + noise(shape.batch, shape.tokens, shape.dim))).to(dtype)


def parse_methods(text: str) -> list[str]:
    """Registered methods that select, from names separated by commas or "all".

    Raises:
        ValueError: An unknown method, or one that selects nothing.
    """
    if text == "all":
        return [name for name in method_names() if get_method(name).stages]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not get_method(name).stages:
            raise ValueError(f"method {name!r} keeps every token, so there is nothing to time")
    return names


def compressor(method: str, shape: Shape, tokens: Tensor) -> Callable[[], CompressedTokens]:
    """A call without arguments that compresses `tokens` by a method at its first stage, or by the formulas as written.

    Inputs that a method asks for are random and are made once, in the first call.

    Raises:
        ValueError: As `apet.methods.selector`.
    """
    if method == AS_PUBLISHED:
        return lambda: compress_as_published(tokens, shape.keep)
    stage = get_method(method).stages[0]
    config = ApetConfig(method=method)
    layer = 2 if stage == "llm" else 0
    select = selector(config, stage, StagePreset(), layer=layer, num_layers=32)
    side = math.isqrt(shape.tokens)
    grid = (side, side) if side * side == shape.tokens else None
    inputs = SyntheticInputs(tokens)
    return lambda: select(tokens, shape.keep, grid=grid, inputs=inputs)
