"""The command line: ``apet report``."""

import argparse
import sys
from collections.abc import Sequence

from apet.eval.scoring_cli import Parser, run
from apet.report.output import markdown, notes, write_csv, write_png
from apet.report.rows import columns_of, rows_of
from apet.report.runs import find_runs

_ABOUT = """Compare scored runs: a row of the table is a checkpoint with one compression, a column is a benchmark.

Reads every X.score.json below the folders and the run record X.run.json beside it. Scores are also given in percent of
the uncompressed run with the same checkpoint, questions and settings; runs that differ in any of these are never set
against each other."""
_EXAMPLES = """examples:
  apet report data/eval
  apet report runs/a runs/b --csv table.csv --png curves.png"""


def parser() -> Parser:
    """The program's flags."""
    flags = Parser(prog="apet report", description=_ABOUT, epilog=_EXAMPLES)
    flags.add_argument("folders", nargs="+", help="folders with *.score.json and *.run.json, or score files")
    flags.add_argument("--csv", metavar="FILE", help="write one line per run here")
    flags.add_argument("--png", metavar="FILE", help="draw score against tokens here (needs matplotlib)")
    return flags


def _report(args: argparse.Namespace) -> None:
    runs = find_runs(args.folders)
    rows, headings = rows_of(runs), columns_of(runs)
    if args.csv:
        write_csv(args.csv, rows)
    if args.png:
        write_png(args.png, rows, headings)
    print(markdown(rows, headings), end="")
    for note in notes(runs, headings):
        print(f"\nNOTE: {note}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status; what the user can mend is one line on stderr."""
    return run(parser(), _report, argv)


if __name__ == "__main__":
    sys.exit(main())
