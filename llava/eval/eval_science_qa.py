"""Score ScienceQA: `python -m llava.eval.eval_science_qa --base-dir D --result-file R [--output-file O] ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apet.eval.benchmarks.scienceqa import MISSING_RULES, OPTIONS, ScienceQa, score_records, write_analysis
from apet.eval.scoring_cli import Parser, add_score_flags, publish, run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the analysis files and print the accuracies; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="eval_science_qa", description=__doc__)
    parser.add_argument("--base-dir", required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--result-file", required=True, help="answers file, JSON lines")
    parser.add_argument("--output-file", help="write the correct and incorrect answers here")
    parser.add_argument("--output-result", help="write accuracy, choices and texts by id here")
    parser.add_argument("--split", default="test", help="a split of pid_splits.json")
    parser.add_argument("--options", type=list, default=list(OPTIONS), help="option letters, such as ABCDE")
    parser.add_argument("--missing", choices=MISSING_RULES, default="error", help="a question without an answer")
    add_score_flags(parser)
    return run(parser, _score, argv)


def _score(args: argparse.Namespace) -> None:
    records = ScienceQa().analyse(
        base_dir=args.base_dir,
        result_file=args.result_file,
        split=args.split,
        options=args.options,
        missing=args.missing,
        duplicates=args.duplicates,
    )
    write_analysis(records, args.output_file, args.output_result)
    publish(score_records(records), args.output_json)


if __name__ == "__main__":
    sys.exit(main())
