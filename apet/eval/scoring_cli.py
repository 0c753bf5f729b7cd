"""What the scorer and converter command lines share: flag spellings, one-line errors, printing and saving a score.

A scorer or converter is a `Program`, an entry of a table: `apet.eval.scorers`, `apet.eval.convert`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apet.eval.benchmarks.base import Score, Submission
from apet.eval.benchmarks.files import DUPLICATE_RULES, PathLike, refuse_inputs

# Arguments, in any program, that name a file to be written.
_OUTPUTS = ("output_json", "output_file", "output_result", "result_upload_file", "dst", "out", "json", "markdown")

# What the user can mend: a bad value or file, a package that is not installed, something a model cannot do.
USER_ERRORS = (ValueError, OSError, ImportError, NotImplementedError)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes every long flag with `-` and with `_`, whichever way it is declared.

    Its help leaves line breaks as they are and puts a flag and its text on one line where it can.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **{"formatter_class": _HelpFormatter} | options)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._as_declared(word) for word in words], namespace)

    def _as_declared(self, word: str) -> str:
        # At parse time and by the parser's own table, so that flags of argument groups are covered too.
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        plain = name.replace("_", "-")
        for declared in self._option_string_actions:
            if declared.replace("_", "-") == plain:
                return declared + equals + value
        return word


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)


def show_notes() -> None:
    """Print what our modules log, as it is; of the libraries below them only warnings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("transformers", "httpx", "accelerate", "PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def add_duplicates_flag(parser: Parser) -> None:
    """What a second answer to a question does."""
    parser.add_argument("--duplicates", choices=DUPLICATE_RULES, default="error", help="a second answer to a question")


def add_score_flags(parser: Parser) -> None:
    """Flags of every scorer: what to do with repeated answers, and where to save the score."""
    add_duplicates_flag(parser)
    parser.add_argument("--output-json", help="write the score, its details and the per-sample correctness here")


def run(parser: Parser, action: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """Parse and run; what the user can mend (`USER_ERRORS`) becomes one line on stderr and exit status 1."""
    args = parser.parse_args(argv)
    try:
        _refuse_overwriting(args)
        action(args)
    except USER_ERRORS as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True)
class Program:
    """A program that reads some files, and prints or writes what it makes of them.

    Attributes:
        about: What it does.
        flags: Its flags and their options for `add_argument`; a short name stands in front of the long one.
        action: Does it, given the parsed flags.
        more: Adds flags that several programs share.
    """

    about: str
    flags: Mapping[str, Mapping[str, Any]]
    action: Callable[[argparse.Namespace], None]
    more: Callable[[Parser], None] = lambda parser: None

    def parser(self, name: str) -> Parser:
        """The flags of the program that calls itself `name`."""
        flags = Parser(prog=name, description=self.about)
        for names, options in self.flags.items():
            flags.add_argument(*names.split(), **options)
        self.more(flags)
        return flags

    def main(self, name: str) -> Callable[[Sequence[str] | None], int]:
        """The `main(argv) -> exit status` of the program that calls itself `name`; errors as `run`."""

        def main(argv: Sequence[str] | None = None) -> int:
            return run(self.parser(name), self.action, argv)

        return main


def required(about: str, **options: Any) -> dict[str, Any]:
    """Options of a flag: its help, and that it must be given."""
    return {"help": about, "required": True, **options}


def _refuse_overwriting(args: argparse.Namespace) -> None:
    """Raise ValueError where a file that is to be written is named by another argument too."""
    given = {name: value if isinstance(value, list) else [value] for name, value in vars(args).items()}
    words = [word for name, values in given.items() if name not in _OUTPUTS for word in values]
    files = [word for word in words if isinstance(word, str) and os.path.isfile(os.path.expanduser(word))]
    refuse_inputs([value for name in _OUTPUTS for value in given.get(name, []) if isinstance(value, str)], files)


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
