"""MM-Vet answers file to the file of the MM-Vet grader."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401

from apet.eval.benchmarks.mmvet import convert
from apet.eval.scoring_cli import Parser, add_duplicates_flag, run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the grader file; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="convert_mmvet_for_eval", description=__doc__)
    parser.add_argument("--src", required=True, help="answers file, JSON lines")
    parser.add_argument("--dst", required=True, help="grader file to write")
    add_duplicates_flag(parser)
    return run(parser, _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    convert(args.src, args.dst, args.duplicates)


if __name__ == "__main__":
    sys.exit(main())
