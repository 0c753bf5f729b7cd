"""VizWiz answers file to the upload file; prints how many results, questions and broken lines there were."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401

from apet.eval.benchmarks.vizwiz import VizWiz
from apet.eval.scoring_cli import Parser, run, upload


def main(argv: Sequence[str] | None = None) -> int:
    """Write the upload file; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="convert_vizwiz_for_submission", description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="llava_test.jsonl")
    parser.add_argument("--result-file", required=True, help="answers file, JSON lines")
    parser.add_argument("--result-upload-file", required=True, help="upload file to write")
    return run(parser, _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    submission = VizWiz().submission(annotation_file=args.annotation_file, result_file=args.result_file)
    upload(submission, args.result_upload_file)


if __name__ == "__main__":
    sys.exit(main())
