"""What the scorer and converter command lines share: flag spellings, one-line errors, printing and saving a score."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from apet.eval.benchmarks.base import Score, Submission
from apet.eval.benchmarks.files import DUPLICATE_RULES, PathLike


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes every long flag with `-` and with `_`, whichever way it is declared."""

    def add_argument(self, *names: str, **options) -> argparse.Action:
        spellings = list(names)
        for name in names:
            if name.startswith("--"):
                for other in ("--" + name[2:].replace("_", "-"), "--" + name[2:].replace("-", "_")):
                    if other not in spellings:
                        spellings.append(other)
        return super().add_argument(*spellings, **options)


def add_duplicates_flag(parser: Parser) -> None:
    """What a second answer to a question does."""
    parser.add_argument("--duplicates", choices=DUPLICATE_RULES, default="error", help="a second answer to a question")


def add_score_flags(parser: Parser) -> None:
    """Flags of every scorer: what to do with repeated answers, and where to save the score."""
    add_duplicates_flag(parser)
    parser.add_argument("--output-json", help="write the score, its details and the per-sample correctness here")


def run(parser: Parser, action: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """Parse and run; what the user can mend (bad value, bad file) becomes one line on stderr and exit status 1."""
    args = parser.parse_args(argv)
    try:
        action(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def publish(score: Score, output_json: str | None) -> None:
    """Save the score if asked to, then print its report: what is printed is also on disk."""
    if output_json:
        score.write(output_json)
    sys.stdout.write(score.report)


def upload(submission: Submission, path: PathLike) -> None:
    """Write an upload file and print what the converter has to say about it."""
    submission.write(path)
    sys.stdout.write(submission.report)
    if submission.note:
        print(f"note: {submission.note}", file=sys.stderr)
