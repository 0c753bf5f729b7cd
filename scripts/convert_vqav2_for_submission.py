"""VQAv2 merged answers to the upload file of the whole test2015 list."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from apet.eval.benchmarks.vqav2 import VqaV2
from apet.eval.scoring_cli import Parser, run, upload


def main(argv: Sequence[str] | None = None) -> int:
    """Write `answers_upload/<split>/<ckpt>.json`; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="convert_vqav2_for_submission", description=__doc__)
    parser.add_argument("--dir", default="data/eval/vqav2", help="folder with answers/ and the question files")
    parser.add_argument("--ckpt", required=True, help="folder of the model below answers/<split>")
    parser.add_argument("--split", required=True, help="folder below answers/, such as llava_vqav2_mscoco_test-dev2015")
    return run(parser, _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    submission = VqaV2().submission(folder=args.dir, ckpt=args.ckpt, split=args.split)
    upload(submission, Path(args.dir) / "answers_upload" / args.split / f"{args.ckpt}.json")


if __name__ == "__main__":
    sys.exit(main())
