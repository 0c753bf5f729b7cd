"""The command line: ``apet compare``."""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from apet.compare.cost import measure_costs
from apet.compare.difficulty import CHEAP, split_by_difficulty
from apet.compare.execute import Place, execute
from apet.compare.plan import parse_budgets, parse_methods, parse_names, plan_cells
from apet.compare.plot import TIME, TOKENS, write_png
from apet.compare.results import rows_of
from apet.compare.table import has_random_weights, markdown, summary, write_csv
from apet.compare.tasks import open_task
from apet.eval.benchmarks.files import user_path, write_text_atomic
from apet.eval.loader import LoadedModel, add_loader_flag, run_program
from apet.eval.scoring_cli import Parser
from apet.methods import parse_options
from apet.plots import check_matplotlib

_EXAMPLES = """examples:
  apet compare --model-path data/model/llava-v1.5-7b --methods all --tokens 192,64 --batch_size 16
  apet compare --model-path data/sample/model/llava-v1.5-sample --data data/sample/eval --limit 200"""


def parser(loader: ModuleType | None = None) -> Parser:
    """The program's flags, with those of the module that loads checkpoints."""
    flags = Parser(
        prog="apet compare", usage="apet compare --model-path MODEL [options]", allow_abbrev=False, epilog=_EXAMPLES,
        description="Compare compression methods on one checkpoint: scores with paired intervals, time, memory.",
    )  # fmt: skip
    group = flags.add_argument_group("what is compared")
    group.add_argument("--methods", default="apet,random", help="separated by commas, options behind a colon; or all")
    group.add_argument("--tokens", default="192,128,64", help="tokens per image, averaged over the decoder layers")
    group.add_argument("--benchmarks", default="gqa,pope,textvqa", help="separated by commas")
    group.add_argument("--data", default="data/eval", help="folder of the benchmarks, see data/README.md")
    group.add_argument("--limit", type=int, help="only the first so many questions of each benchmark")
    group.add_argument("--seeds", type=int, default=3, help="seeds of methods that draw at random")
    group.add_argument(
        "--apet", action="append", default=[], metavar="NAME=VALUE,...",
        help="further settings of every compressed run (docs/options.md)",
    )  # fmt: skip
    group.add_argument("--difficulty", action="store_true", help="tell apart what average pooling answers too")
    group = flags.add_argument_group("how")
    group.add_argument("--out", default="runs/compare", help="answers, records, scores, table and pictures go here")
    group.add_argument("--batch_size", type=int, default=1, help="questions per batch; answers do not depend on it")
    group.add_argument("--num_workers", type=int, default=0, help="processes that open pictures")
    group.add_argument("--timed", type=int, default=4, help="questions that time and memory are measured on; 0: none")
    group.add_argument("--no_png", action="store_true", help="no pictures")
    add_loader_flag(flags)
    if loader is not None:
        loader.add_flags(flags)
    return flags


def compare(args: argparse.Namespace, loader: ModuleType) -> None:
    """Run, then print the table and write it with the picture.

    Raises:
        ValueError: A value that cannot be; checked before the checkpoint is loaded where that is possible.
    """
    methods, budgets = parse_methods(args.methods), parse_budgets(args.tokens)
    if args.difficulty:
        methods = list(dict.fromkeys([*methods, CHEAP]))
    for flag, value, least in (("--seeds", args.seeds, 1), ("--limit", args.limit, 1), ("--timed", args.timed, 0)):
        if value is not None and value < least:
            raise ValueError(f"{flag} {value} must be at least {least}")
    further: dict[str, Any] = {}
    for text in args.apet:
        further |= parse_options(text, f"--apet {text}", "--apet name=value,name=value")
    if not args.no_png:
        check_matplotlib("leave them out with --no_png")
    out = user_path(args.out)
    tasks = [open_task(name, args.data, out, args.limit) for name in parse_names(args.benchmarks, "--benchmarks")]
    loaded: LoadedModel = loader.load(args)
    cells, unreachable = plan_cells(methods, budgets, args.seeds, loaded.image_tokens, loaded.layers, further)
    finished, refused = execute(loaded, cells, tasks, Place(out, args.batch_size, args.num_workers))
    costs = measure_costs(loaded, finished, tasks, args.timed, out / "cost.json") if args.timed else {}
    tables = rows_of(finished, costs)
    text = markdown(
        tables, finished, [*unreachable, *refused], split_by_difficulty(finished) if args.difficulty else {}
    )
    write_text_atomic(out / "table.md", text)
    write_text_atomic(out / "summary.md", summary(tables, finished))
    write_csv(out / "table.csv", tables)
    print(text, end="")
    if not args.no_png:
        warning = " (random weights: the scores mean nothing)" if has_random_weights(finished) else ""
        write_png(out / "accuracy.png", tables, loaded.model_id + warning, TOKENS)
        if costs:
            write_png(out / "accuracy_time.png", tables, loaded.model_id + warning, TIME)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status; what the user can mend is one line on stderr."""
    return run_program(parser, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
