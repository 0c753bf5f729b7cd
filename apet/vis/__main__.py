"""The command line: ``apet vis``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from apet.compare.plan import parse_methods
from apet.config import ApetConfig
from apet.eval.benchmarks import Question
from apet.eval.benchmarks.files import replacing, user_path
from apet.eval.cli import add_compression_flags, config_from_flags
from apet.eval.images import open_images
from apet.eval.loader import LoadedModel, add_loader_flag, run_program
from apet.eval.scoring_cli import Parser
from apet.methods import get_method, parse_method
from apet.vis.ask import ask
from apet.vis.draw import FORMATS, check_output, draw
from apet.vis.trace import MethodTrace

_EXAMPLES = """examples:
  apet vis cat.jpg --model-path data/model/llava-v1.5-7b --methods apet,random --tokens 64"""


def parser(loader: ModuleType | None = None) -> Parser:
    """The program's flags, with those of the module that loads checkpoints."""
    flags = Parser(
        prog="apet vis", usage="apet vis IMAGE --model-path MODEL [options]", allow_abbrev=False, epilog=_EXAMPLES,
        description="Draw which tokens of an image compression methods keep, and what the model answers.",
    )  # fmt: skip
    flags.add_argument("image", metavar="IMAGE", help="the image file")
    flags.add_argument("--question", default="What is in the image?", help="what the model is asked")
    flags.add_argument("--methods", help="separated by commas, or all (default: --method)")
    flags.add_argument("--tokens", type=int, help="averaged over the layers, as each method was published; or budgets")
    flags.add_argument("--out", help=f"the picture, {', '.join(FORMATS)} (default: <image>.vis.png); the data is .npz")
    add_loader_flag(flags)
    if loader is not None:
        loader.add_flags(flags)
    add_compression_flags(flags)
    return flags


def visualise(args: argparse.Namespace, loader: ModuleType) -> None:
    """Answer once per method, draw, and write the picture and its data.

    Raises:
        ValueError: An image that cannot be read (`ImageError`), or no method that can run with these budgets.
    """
    methods = parse_methods(args.methods or args.method)
    out = user_path(args.out or f"{Path(args.image).stem}.vis.png")
    check_output(out)
    question = Question(0, args.question, args.question, args.image)
    images = open_images(question, "")
    loaded: LoadedModel = loader.load(args)
    traces, image, refused = [], None, []
    for method in methods:
        try:
            asked = ask(loaded, method, _config(args, method, loaded), question, images)
            traces.append(asked.trace)
            image = asked.seen
        except ValueError as error:
            refused.append(f"{method}: {error}")
    if not traces:
        raise ValueError("; ".join(refused))
    for line in refused:
        print(f"left out {line}", file=sys.stderr)
    _write(out, image, loaded.grid, traces, args.question)
    print(f"{out}\n{out.with_suffix('.npz')}")


def _config(args: argparse.Namespace, method: str, loaded: LoadedModel) -> ApetConfig:
    """The flags' budgets, or `--tokens` spent the method's way."""
    name, options = parse_method(method)
    budgets = {}
    if args.tokens is not None:
        # The budget flags fall back to their defaults; everything else about the method stays.
        budgets = {"visual_token_num": None, "image_token_ratio": None, "layer_list": (), "image_token_list": (),
                   "image_token_ratio_list": ()}  # fmt: skip
        budgets |= get_method(name, **options).plan(args.tokens, loaded.image_tokens, loaded.layers)
    config = replace(config_from_flags(args), **budgets, method=name, method_options=options)
    budget = config.visual_token_num
    whole = config.image_token_ratio is None and (budget or loaded.image_tokens) >= loaded.image_tokens
    if whole and not config.layer_list and not config.reduces_tower:
        raise ValueError(
            f"nothing would be compressed; give --tokens or --visual_token_num below {loaded.image_tokens}"
        )
    return config


def _write(out: Path, image: np.ndarray, grid: tuple[int, int], traces: Sequence[MethodTrace], question: str) -> None:
    with replacing(out) as temporary:
        draw(image, grid, traces, question).savefig(temporary, format=out.suffix[1:].lower())
    arrays = {"image": image, "grid": np.array(grid), "question": np.array(question)}
    arrays["methods"] = np.array([one.method for one in traces])
    for one in traces:
        arrays |= one.arrays()
    with replacing(out.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status; what the user can mend is one line on stderr."""
    return run_program(parser, visualise, argv)


if __name__ == "__main__":
    sys.exit(main())
