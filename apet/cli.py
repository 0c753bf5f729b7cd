"""The one command line: ``apet COMMAND ...``, or ``python -m apet COMMAND ...`` from a checkout.

A command is a module with `main(argv) -> int`. It is imported when it is called, so that the list of commands needs
neither torch nor transformers.
"""

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import apet


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        module: Has `main(argv) -> int`.
        about: One line for the list.
        words: Put in front of the user's own words, where one module serves several commands.
    """

    module: str
    about: str
    words: tuple[str, ...] = ()


GROUPS: Mapping[str, Mapping[str, Command]] = {
    "accuracy": {
        "eval": Command("apet.eval.suite", "answer and score a published benchmark with a model family"),
        "report": Command("apet.report.__main__", "one table of all scored runs below some folders"),
        "compare": Command("apet.compare.__main__", "compression methods side by side on one checkpoint"),
        "check-data": Command(
            "apet.eval.check_data", "what is there of benchmarks and checkpoints, and what is missing"
        ),
    },
    "speed": {
        "bench": Command("apet.bench.__main__", "measure selection, prefill, generation, evaluation or a server"),
        "cost": Command(
            "apet.bench.__main__", "predict FLOPs, cache bytes and milliseconds; nothing is run", ("cost",)
        ),
    },
    "use": {
        "serve": Command("apet.serving.cli", "serve a checkpoint with vLLM behind the OpenAI API"),
        "demo": Command("apet.demo.__main__", "ask about a picture in the browser, with and without compression"),
        "vis": Command("apet.vis.__main__", "draw which tokens of a picture a method keeps"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}

_EXAMPLES = """examples:
  apet eval llava1_5 pope --tokens 64
  apet report data/eval
  apet compare --model-path data/model/llava-v1.5-7b --methods apet,random --tokens 192,64
  apet vis picture.jpg --model-path data/model/llava-v1.5-7b --tokens 64

`apet COMMAND --help` explains a command. Without an installation: python -m apet, in the checkout."""


def usage() -> str:
    """The list of commands with examples."""
    width = max(map(len, COMMANDS))
    lines = ["usage: apet COMMAND ...", ""]
    for title, group in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:{width}}  {command.about}" for name, command in group.items()), ""]
    return "\n".join([*lines, _EXAMPLES])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The words behind `apet`; None for those of the command line.

    Returns:
        The exit status: that of the command, or 2 where there is no such command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(apet.__version__)
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        print(f"apet: error: unknown command {name!r}{hint}; choose {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _see_checkout()
    command = COMMANDS[name]
    return import_module(command.module).main([*command.words, *rest])


def _see_checkout() -> None:
    """Let commands and the programs they start import what lies beside `apet` in a checkout.

    An installation that points to the checkout (`pip install -e .`) makes `apet` alone importable from elsewhere.
    """
    root = Path(__file__).resolve().parents[1]
    if (root / "llava/eval/apet_loader.py").is_file() and str(root) not in sys.path:
        sys.path.append(str(root))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(root)]))
