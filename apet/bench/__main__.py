"""The command line: ``python -m apet.bench COMMAND``: a table for people, and as the last line one JSON object.

A sub-command is a module of this package with `add_arguments(parser)` and `run(args) -> dict`, named in `COMMANDS`.
What `run` returns is JSON; its "tables" (`apet.bench.output.table`) are printed and everything goes to the JSON line.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from types import ModuleType

from apet.bench.output import environment, markdown
from apet.eval.benchmarks.files import user_path, write_json_atomic, write_text_atomic
from apet.eval.scoring_cli import Parser

# Name of the sub-command and of its module. The first line of the module's docstring is its help.
COMMANDS = ("compress", "prefill", "generate", "eval", "cost", "serve")


def module_of(command: str) -> ModuleType:
    """The module behind a sub-command."""
    return importlib.import_module(f"apet.bench.{command}")


def parser(command: str) -> Parser:
    """The flags of one sub-command."""
    module = module_of(command)
    flags = Parser(prog=f"python -m apet.bench {command}", description=module.__doc__, allow_abbrev=False)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--json", metavar="FILE", help="write the JSON object here too")
    flags.add_argument("--markdown", metavar="FILE", help="write the tables here too")
    module.add_arguments(flags)
    return flags


def usage() -> str:
    """The list of sub-commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {module_of(command).__doc__.splitlines()[0]}" for command in COMMANDS]
    return "\n".join(["usage: python -m apet.bench COMMAND [--help] ...", "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status; what the user can mend is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    command, *rest = words
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"python -m apet.bench: error: unknown command {command!r}; choose {known}", file=sys.stderr)
        return 2
    flags = parser(command)
    args = flags.parse_args(rest)
    try:
        result = module_of(command).run(args)
        arguments = {name: value for name, value in vars(args).items() if name not in ("json", "markdown")}
        result = {"command": command, "arguments": arguments, "environment": environment(), **result}
        text = markdown(result.get("tables", ()), result["environment"])
        if args.json:
            write_json_atomic(user_path(args.json), result, indent=1)
        if args.markdown:
            write_text_atomic(user_path(args.markdown), text)
    except (ValueError, OSError, ImportError) as error:
        print(f"{flags.prog}: error: {error}", file=sys.stderr)
        return 1
    print(text)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
