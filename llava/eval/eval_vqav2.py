"""Score VQAv2 answers on an annotated split: `python -m llava.eval.eval_vqav2 --annotation-file A --result-file R`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apet.eval.benchmarks.vqav2 import VqaV2
from apet.eval.scoring_cli import Parser, add_score_flags, publish, run


def main(argv: Sequence[str] | None = None) -> int:
    """Print overall accuracy and its breakdowns; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="eval_vqav2", description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="v2_mscoco_val2014_annotations.json")
    parser.add_argument("--result-file", required=True, help="answers file (.jsonl) or upload file (.json)")
    add_score_flags(parser)
    return run(parser, _score, argv)


def _score(args: argparse.Namespace) -> None:
    score = VqaV2().score(
        annotation_file=args.annotation_file, result_file=args.result_file, duplicates=args.duplicates
    )
    publish(score, args.output_json)


if __name__ == "__main__":
    sys.exit(main())
