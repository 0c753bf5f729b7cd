"""SEED-Bench answers file to the upload file; prints the accuracies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401

from apet.eval.benchmarks.seed import convert
from apet.eval.scoring_cli import Parser, add_score_flags, publish, run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the upload file; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="convert_seed_for_submission", description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", required=True, help="answers file, JSON lines")
    parser.add_argument("--result-upload-file", required=True, help="upload file to write, JSON lines")
    add_score_flags(parser)
    return run(parser, _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    score = convert(args.annotation_file, args.result_file, args.result_upload_file, args.duplicates)
    publish(score, args.output_json)


if __name__ == "__main__":
    sys.exit(main())
