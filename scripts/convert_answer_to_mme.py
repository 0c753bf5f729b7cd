"""MME answers file to the tables of the MME scorer, with the ground truth beside each answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401

from apet.eval.benchmarks.mme import convert
from apet.eval.scoring_cli import Parser, add_duplicates_flag, run


def main(argv: Sequence[str] | None = None) -> int:
    """Write `eval_tool/answers/<experiment>/<category>.txt`; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="convert_answer_to_mme", description=__doc__)
    parser.add_argument("--experiment", required=True, help="name of the answers file in answers/, without suffix")
    parser.add_argument("--dir", default=".", help="the MME folder; the published tool runs inside it")
    add_duplicates_flag(parser)
    return run(parser, _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    convert(args.dir, args.experiment, args.duplicates)


if __name__ == "__main__":
    sys.exit(main())
