"""Score a POPE answers file: `python -m llava.eval.eval_pope --annotation-dir D --question-file Q --result-file R`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apet.eval.benchmarks.pope import Pope
from apet.eval.scoring_cli import Parser, add_score_flags, publish, run


def main(argv: Sequence[str] | None = None) -> int:
    """Print the three splits and their means; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="eval_pope", description=__doc__)
    parser.add_argument(
        "--annotation-dir", required=True, help="folder with coco_pope_{random,popular,adversarial}.json"
    )
    parser.add_argument("--question-file", required=True, help="llava_pope_test.jsonl")
    parser.add_argument("--result-file", required=True, help="answers of the whole question file, JSON lines")
    add_score_flags(parser)
    return run(parser, _score, argv)


def _score(args: argparse.Namespace) -> None:
    score = Pope().score(
        annotation_dir=args.annotation_dir,
        question_file=args.question_file,
        result_file=args.result_file,
        duplicates=args.duplicates,
    )
    publish(score, args.output_json)


if __name__ == "__main__":
    sys.exit(main())
