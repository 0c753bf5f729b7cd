"""Score MME: `python -m llava.eval.eval_mme --results_dir eval_tool/answers/<experiment>`.

The folder is what `scripts/convert_answer_to_mme.py` writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apet.eval.benchmarks.mme import Mme
from apet.eval.scoring_cli import Parser, publish, run


def main(argv: Sequence[str] | None = None) -> int:
    """Print Perception, Cognition and the 14 task scores; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="eval_mme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", default="./LaVIN", help="folder with one <category>.txt per category")
    parser.add_argument("--present-only", action="store_true", help="score a part of the 14 categories, and say so")
    parser.add_argument("--output-json", help="write the score, its details and the per-sample correctness here")
    return run(parser, _score, argv)


def _score(args: argparse.Namespace) -> None:
    publish(Mme().score(results_dir=args.results_dir, present_only=args.present_only), args.output_json)


if __name__ == "__main__":
    sys.exit(main())
