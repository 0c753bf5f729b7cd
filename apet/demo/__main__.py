"""The command line: ``apet demo``."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from apet.demo.answers import Asker
from apet.eval.loader import add_loader_flag, run_program
from apet.eval.scoring_cli import Parser

_DATA = Path(__file__).resolve().parents[2] / "data/sample"
_SAMPLE = _DATA / "model/llava-v1.5-sample"
_EXAMPLES = 4
_PROMPT = "Answer the question using a single word or phrase."
_FLAGS = """examples:
  apet demo
  apet demo --model-path data/model/llava-v1.5-7b --port 7860"""


def parser(loader: ModuleType | None = None) -> Parser:
    """The program's flags, with those of the module that loads checkpoints."""
    flags = Parser(
        prog="apet demo", usage="apet demo [options]", allow_abbrev=False, epilog=_FLAGS,
        description="A web page to try compression on one's own pictures; without --model-path on the sample model.",
    )  # fmt: skip
    flags.add_argument("--port", type=int, default=None, help="on 127.0.0.1 (default: the first free one from 7860 on)")
    add_loader_flag(flags)
    if loader is not None:
        loader.add_flags(flags)
        flags.set_defaults(model_path=str(_SAMPLE), max_new_tokens=32)
    return flags


def serve(args: argparse.Namespace, loader: ModuleType) -> None:
    """Load the checkpoint and serve the page until it is interrupted.

    Raises:
        ValueError: Gradio or the sample is missing, or a checkpoint whose images have no fixed grid of tokens.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the demo needs gradio: pip install 'apet[demo]', or pip install gradio")
    if args.model_path == str(_SAMPLE) and not _SAMPLE.is_dir():
        raise ValueError("the sample model is in the repository only; name a checkpoint with --model-path")
    from apet.demo import page  # optional: gradio

    asker = Asker(loader.load(args))
    page.launch(page.build(asker, examples()), args.port)


def examples() -> list[tuple[str, str]]:
    """Pictures of the sample with a question each, none where the sample is not there."""
    file = _DATA / "eval/gqa/testdev_balanced_questions.json"
    if not file.is_file():
        return []
    found: dict[str, str] = {}
    for one in json.loads(file.read_text(encoding="utf-8")).values():
        found.setdefault(str(file.parent / "images" / f"{one['imageId']}.jpg"), f"{one['question']}\n{_PROMPT}")
        if len(found) == _EXAMPLES:
            break
    return list(found.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status; what the user can mend is one line on stderr."""
    return run_program(parser, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
