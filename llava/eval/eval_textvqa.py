"""Score TextVQA answers: `python -m llava.eval.eval_textvqa --annotation-file A (--result-file R | --result-dir D)`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from apet.eval.benchmarks.files import user_path
from apet.eval.benchmarks.textvqa import TextVqa
from apet.eval.scoring_cli import Parser, add_score_flags, publish, run


def main(argv: Sequence[str] | None = None) -> int:
    """Print experiment name, samples and accuracy per answers file; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="eval_textvqa", description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="TextVQA_0.5.1_val.json")
    results = parser.add_mutually_exclusive_group(required=True)
    results.add_argument("--result-file", help="one answers file, JSON lines")
    results.add_argument("--result-dir", help="score every *.jsonl of this folder")
    add_score_flags(parser)
    return run(parser, _score, argv)


def _score(args: argparse.Namespace) -> None:
    files = [Path(args.result_file)] if args.result_file else sorted(user_path(args.result_dir).glob("*.jsonl"))
    if not files:
        raise ValueError(f"--result-dir {args.result_dir} has no *.jsonl file")
    if args.output_json and len(files) > 1:
        raise ValueError(f"--output-json takes one score, --result-dir has {len(files)}: use --result-file")
    for file in files:
        score = TextVqa().score(annotation_file=args.annotation_file, result_file=file, duplicates=args.duplicates)
        publish(score, args.output_json)


if __name__ == "__main__":
    sys.exit(main())
