"""ScienceQA problems to a LLaVA conversation file in the same folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401

from apet.eval.benchmarks.scienceqa_convert import DEFAULT_FORMAT, convert
from apet.eval.scoring_cli import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Write `llava_<split>_<format>.json`; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="convert_sqa_to_llava", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("convert_to_llava",), help="the published script wants its name")
    parser.add_argument("--base-dir", required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--split", required=True, help="a split of pid_splits.json")
    parser.add_argument("--prompt-format", default=DEFAULT_FORMAT, help="such as QCM-LEA or CQM-A")
    return run(parser, _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    print(f"wrote {convert(args.base_dir, args.split, args.prompt_format)}")


if __name__ == "__main__":
    sys.exit(main())
