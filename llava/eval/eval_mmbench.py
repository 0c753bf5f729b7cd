"""Score MMBench answers without the server: `python -m llava.eval.eval_mmbench --annotation-file T --result-file R`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apet.eval.benchmarks.mmbench import MmBench, MmBenchCn
from apet.eval.scoring_cli import Parser, add_score_flags, publish, run


def main(argv: Sequence[str] | None = None) -> int:
    """Print circular and plain accuracy; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="eval_mmbench", description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="the TSV with the questions and their answers")
    parser.add_argument("--result-file", required=True, help="answers of the whole TSV, JSON lines")
    parser.add_argument("--lang", choices=("en", "cn"), default="en", help="names the score mmbench or mmbench_cn")
    add_score_flags(parser)
    return run(parser, _score, argv)


def _score(args: argparse.Namespace) -> None:
    benchmark = MmBenchCn() if args.lang == "cn" else MmBench()
    score = benchmark.score(
        annotation_file=args.annotation_file, result_file=args.result_file, duplicates=args.duplicates
    )
    publish(score, args.output_json)


if __name__ == "__main__":
    sys.exit(main())
