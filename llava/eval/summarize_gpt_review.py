"""Summarise LLaVA-Bench reviews: `python -m llava.eval.summarize_gpt_review -f reviews/<experiment>.jsonl`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from apet.eval.benchmarks.llava_bench import LlavaBench, experiment, review_files
from apet.eval.scoring_cli import Parser, publish, run


def main(argv: Sequence[str] | None = None) -> int:
    """Print relative score and mean marks per category and file; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="summarize_gpt_review", description=__doc__)
    parser.add_argument("-d", "--dir", help="folder of review files")
    parser.add_argument("-v", "--version", help="only files whose name has this")
    parser.add_argument("-s", "--select", nargs="*", help="only files whose name has all of these")
    parser.add_argument("-f", "--files", nargs="*", default=[], help="review files, instead of --dir")
    parser.add_argument("-i", "--ignore", nargs="*", default=[], help="no files whose name has one of these")
    parser.add_argument("--output-json", help="write the score here (one review file)")
    return run(parser, _summarise, argv)


def _summarise(args: argparse.Namespace) -> None:
    if not args.files and not args.dir:
        raise ValueError("name the review files with --files or their folder with --dir")
    wanted = [*(args.select or []), *([args.version] if args.version else [])]
    files = [
        file
        for file in map(Path, args.files or review_files(args.dir))
        if all(word in experiment(file) for word in wanted)
        and not any(word in experiment(file) for word in args.ignore)
    ]
    if not files:
        raise ValueError(f"no review file is left of {', '.join(args.files) or args.dir}")
    if args.output_json and len(files) > 1:
        raise ValueError(f"--output-json takes one score, there are {len(files)} review files: name one with --files")
    for file in files:
        publish(LlavaBench().score(review_file=file), args.output_json)


if __name__ == "__main__":
    sys.exit(main())
