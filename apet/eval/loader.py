"""Where checkpoints are loaded: a module that an installed distribution names in the entry points `apet.loaders`.

``--loader package.module`` names another one. In a checkout, which is not installed, the module of the package `llava`
beside `apet` is there without an entry point. The module has three functions:

    add_flags(parser)                  adds the flags that name a checkpoint and how it answers
    load(args)                         returns a `LoadedModel`
    resolve_vision_tower(name, folder) returns the folder or hub id of the vision tower that a checkpoint names
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from apet.eval.scoring_cli import Parser, run, show_notes

if TYPE_CHECKING:  # what only looks at files needs no torch
    import numpy as np
    from torch import nn

    from apet.config import ApetConfig
    from apet.eval.answerer import Answerer
    from apet.eval.benchmarks import Question

ENTRY_POINTS = "apet.loaders"
_IN_A_CHECKOUT = "llava.eval.apet_loader"


class LoadedModel(Protocol):
    """A checkpoint in memory.

    Attributes:
        model: The model, of a family that `apet.apply_patch` serves.
        model_id: Name of the checkpoint in tables.
        image_tokens: Visual tokens of an uncompressed image.
        layers: Decoder layers.
        grid: (rows, columns) of an image's tokens.
    """

    model: nn.Module
    model_id: str
    image_tokens: int
    layers: int
    grid: tuple[int, int]

    def answerer(self, config: ApetConfig, *, share_tower: bool = False, new_tokens: int | None = None) -> Answerer:
        """The model with this compression, until the next call.

        Args:
            config: The compression.
            share_tower: What the vision tower gives for a picture may be kept from one answerer to the next, where the
                method works behind the tower. Answers are the same, times are not.
            new_tokens: For measurements: every answer has exactly so many tokens.

        Raises:
            ValueError: The model or the method cannot do it.
        """

    def prompt_length(self, question: Question) -> int:
        """Tokens of a question's prompt, its image counted as one."""

    def seen(self, prepared: Any) -> np.ndarray:
        """(H, W, 3) uint8 picture that the model gets of a prepared question, in the shape of its tokens' grid."""


def find_loader(argv: Sequence[str] | None = None) -> ModuleType:
    """The module that ``--loader`` names, or the only one there is.

    Raises:
        ValueError: There is none, or more than one.
    """
    first = Parser(add_help=False)
    add_loader_flag(first)
    name = first.parse_known_args(sys.argv[1:] if argv is None else argv)[0].loader
    if name is None:
        names = loader_names()
        if len(names) != 1:
            found = f"there are {', '.join(names)}" if names else "none is installed (pip install apet-llava)"
            raise ValueError(f"which module loads the checkpoint? {found}; name it with --loader package.module")
        name = names[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--loader {name!r} cannot be imported: {error}") from None


def loader_names() -> list[str]:
    """Modules that load checkpoints: those of installed distributions, and that of the checkout."""
    names = {entry.value for entry in entry_points(group=ENTRY_POINTS)}
    package = find_spec(_IN_A_CHECKOUT.partition(".")[0])
    # Another package of this name, LLaVA's own for one, has no such file.
    for folder in () if package is None else package.submodule_search_locations or ():
        if (Path(folder) / "eval/apet_loader.py").is_file():
            names.add(_IN_A_CHECKOUT)
    return sorted(names)


def run_program(
    parser: Callable[[ModuleType | None], Parser],
    action: Callable[[argparse.Namespace, ModuleType], None],
    argv: Sequence[str] | None,
) -> int:
    """Find the loader, parse with its flags, act. Exit status; what the user can mend is one line on stderr.

    Args:
        parser: The program's parser, with the flags of a loader if one is given.
        action: (arguments, loader).
        argv: Arguments, None for the command line's.
    """
    show_notes()
    try:
        loader = find_loader(argv)
    except ValueError as error:
        print(f"{parser(None).prog}: error: {error}", file=sys.stderr)
        return 1
    return run(parser(loader), lambda args: action(args, loader), argv)


def add_loader_flag(parser: Parser) -> None:
    """Which module loads the checkpoint."""
    parser.add_argument("--loader", metavar="MODULE", help="loads the checkpoint (default: the only one installed)")
