"""MMBench answers file to the xlsx of the submission server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from apet.eval.benchmarks.mmbench import convert
from apet.eval.scoring_cli import Parser, add_duplicates_flag, run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the xlsx file; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="convert_mmbench_for_submission", description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="the TSV the questions came from")
    parser.add_argument("--result-dir", required=True, help="folder with <experiment>.jsonl")
    parser.add_argument("--upload-dir", required=True, help="folder for <experiment>.xlsx")
    parser.add_argument("--experiment", required=True, help="name of the answers file without suffix")
    add_duplicates_flag(parser)
    return run(parser, _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    convert(
        args.annotation_file,
        Path(args.result_dir) / f"{args.experiment}.jsonl",
        Path(args.upload_dir) / f"{args.experiment}.xlsx",
        args.duplicates,
    )


if __name__ == "__main__":
    sys.exit(main())
