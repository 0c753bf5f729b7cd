"""What is compared: one cell per method, budget and seed, and the reasons why others are left out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from apet.config import ApetConfig
from apet.methods import get_method, method_names, parse_method

# Methods whose selection depends on the seed; every other one gives the same answers with every seed.
DRAWS_AT_RANDOM = ("random",)
UNCOMPRESSED = "none"
_NO_FILE_NAME = re.compile(r"[^\w.=+-]+")
BASELINE = "random"  # what every method is set against


@dataclass(frozen=True)
class Cell:
    """One compression that is run over all benchmarks.

    Attributes:
        method: Registered name, with options as `parse_method` reads them.
        tokens: Visual tokens per image asked for, averaged over the decoder layers; None for the uncompressed model.
        seed: Seed of a method that draws at random, None for the others.
        config: What the model is patched with.
    """

    method: str
    tokens: int | None
    seed: int | None
    config: ApetConfig

    @property
    def name(self) -> str:
        """Folder and file name: "random-64-seed1", "apet_plus_quota=0-64"."""
        parts = [_NO_FILE_NAME.sub("_", self.method), *([] if self.tokens is None else [str(self.tokens)])]
        return "-".join([*parts, *([] if self.seed is None else [f"seed{self.seed}"])])


@dataclass(frozen=True)
class Skip:
    """A method that does not run at a budget.

    Attributes:
        method: Registered name, with options.
        tokens: Budget.
        reason: Why not.
    """

    method: str
    tokens: int
    reason: str


def plan_cells(
    methods: Sequence[str],
    budgets: Sequence[int],
    seeds: int,
    image_tokens: int,
    layers: int,
    further: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[Cell], list[Skip]]:
    """The uncompressed cell first, then method by method; budgets a method cannot reach are skips.

    A budget of all tokens of an image is the uncompressed cell.

    Args:
        methods: Registered names, with options.
        budgets: Visual tokens per image, averaged over the decoder layers.
        seeds: Number of seeds of methods that draw at random.
        image_tokens: Visual tokens of an uncompressed image.
        layers: Decoder layers of the model.
        further: Fields of `ApetConfig` for every compressed cell.
    """
    cells, skips = [Cell(UNCOMPRESSED, None, None, ApetConfig(method=UNCOMPRESSED))], []
    for text in methods:
        name, options = parse_method(text)
        for tokens in budgets:
            if name == UNCOMPRESSED or tokens >= image_tokens:
                continue
            try:
                fields = get_method(name, **options).plan(tokens, image_tokens, layers)
                for seed in range(seeds) if name in DRAWS_AT_RANDOM else (None,):
                    own = {"method": name, "method_options": options, "seed": seed or 0}
                    config = ApetConfig.from_dict({**own, **fields, **further})
                    cells.append(Cell(text, tokens, seed, config))
            except ValueError as error:
                skips.append(Skip(text, tokens, str(error)))
    return cells, skips


def parse_methods(text: str) -> list[str]:
    """Methods in the order given, each with its options; "all" stands for every registered one but the uncompressed.

    Options follow a colon: ``apet,apet_plus:quota=0,merge=false,random`` are three methods.

    Raises:
        ValueError: An unknown name or option, or no method at all.
    """
    methods: list[str] = []
    for word in _words(text, "--methods"):
        if "=" in word and ":" not in word and methods:
            methods[-1] += f",{word}"
        else:
            methods += [name for name in method_names() if name != UNCOMPRESSED] if word == "all" else [word]
    for method in methods:
        parse_method(method)
    return list(dict.fromkeys(methods))


def parse_budgets(text: str) -> list[int]:
    """Budgets, the largest first.

    Raises:
        ValueError: Something that is no whole number of at least 1.
    """
    words = _words(text, "--tokens")
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise ValueError(f"--tokens {text!r} must be whole numbers of at least 1 separated by commas, like 192,128,64")
    return sorted(set(map(int, words)), reverse=True)


def parse_names(text: str, flag: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(word.lower() for word in _words(text, flag)))


def _words(text: str, flag: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError(f"{flag} {text!r} names nothing; give names separated by commas")
    return words
