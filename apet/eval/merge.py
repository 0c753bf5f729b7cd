"""Join the answers of finished chunks: ``python -m apet.eval.merge --answers-file merge.jsonl 0.jsonl 1.jsonl``."""

import argparse
import sys

from apet.eval.runner import merge_chunks
from apet.eval.scoring_cli import Parser, run


def _merge(args: argparse.Namespace) -> None:
    merge_chunks(args.chunks, args.answers_file, overwrite=args.overwrite)
    print(f"joined {len(args.chunks)} chunks in {args.answers_file}")


def parser() -> Parser:
    """The program's flags."""
    flags = Parser(prog="python -m apet.eval.merge", description=__doc__.partition(":")[0])
    flags.add_argument("--answers-file", required=True, help="where the joined answers go")
    flags.add_argument("--overwrite", action="store_true", help="replace answers of another run that are there")
    flags.add_argument("chunks", nargs="+", help="answers files of all chunks")
    return flags


if __name__ == "__main__":
    sys.exit(run(parser(), _merge))
