"""Answers file to official GQA predictions: `convert_gqa_for_eval.py --src merge.jsonl --dst predictions.json`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _checkout  # noqa: F401

from apet.eval.benchmarks.gqa import convert
from apet.eval.scoring_cli import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the predictions file; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="convert_gqa_for_eval", description=__doc__)
    parser.add_argument("--src", required=True, help="answers file, JSON lines")
    parser.add_argument("--dst", required=True, help="predictions file to write")
    return run(parser, lambda args: convert(args.src, args.dst), argv)


if __name__ == "__main__":
    sys.exit(main())
