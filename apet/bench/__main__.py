"""The command line ``apet bench COMMAND``: a table for people, and as the last line one JSON object.

A sub-command is a module of this package with `add_arguments(parser)` and `run(args) -> dict`, named in `COMMANDS`.
What `run` returns is JSON; its "tables" (`apet.bench.output.table`) are printed and everything goes to the JSON line.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from apet.bench.output import environment, markdown
from apet.eval.benchmarks.files import write_json_atomic, write_text_atomic
from apet.eval.scoring_cli import Parser, run

# Name of the sub-command and of its module, with an example. The first line of the module's docstring is its help.
COMMANDS: Mapping[str, str] = {
    "compress": "--methods all --shapes 1x576x1024:96",
    "prefill": "--preset cpu-small --batch 1,4",
    "generate": "--preset llava-1.5-7b --batch 1,16 --new_tokens 2,16 --device cuda",
    "eval": "--model-path data/sample/model/llava-v1.5-sample --tokens 64 --batch_size 16",
    "cost": "--preset llava-1.5-7b --tflops 600 --gbytes 4000",
    "serve": "--server http://localhost:8000 --baseline http://localhost:8001",
}


def module_of(command: str) -> ModuleType:
    """The module behind a sub-command."""
    return importlib.import_module(f"apet.bench.{command}")


def parser(command: str) -> Parser:
    """The flags of one sub-command."""
    module = module_of(command)
    name = f"apet bench {command}"
    flags = Parser(
        prog=name, usage=f"{name} [options]", description=module.__doc__, allow_abbrev=False,
        epilog=f"examples:\n  {name} {COMMANDS[command]}",
    )  # fmt: skip
    flags.add_argument("--json", metavar="FILE", help="write the JSON object here too")
    flags.add_argument("--markdown", metavar="FILE", help="write the tables here too")
    module.add_arguments(flags)
    return flags


def usage() -> str:
    """The list of sub-commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {module_of(command).__doc__.splitlines()[0]}" for command in COMMANDS]
    examples = [f"  apet bench {command} {words}" for command, words in COMMANDS.items()]
    return "\n".join(["usage: apet bench COMMAND [--help] ...", "", *lines, "", "examples:", *examples])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status; what the user can mend is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    command, *rest = words
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"apet bench: error: unknown command {command!r}; choose {known}", file=sys.stderr)
        return 2
    return run(parser(command), lambda args: measure(command, args), rest)


def measure(command: str, args: argparse.Namespace) -> None:
    """Run a sub-command; print its tables and its JSON line, and write them where the flags say."""
    result = module_of(command).run(args)
    arguments = {name: value for name, value in vars(args).items() if name not in ("json", "markdown")}
    result = {"command": command, "arguments": arguments, "environment": environment(), **result}
    text = markdown(result.get("tables", ()), result["environment"])
    if args.json:
        write_json_atomic(args.json, result, indent=1)
    if args.markdown:
        write_text_atomic(args.markdown, text)
    print(text)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
