"""Questions answered per second by the evaluation runner on a real checkpoint, against no compression and random.

Whole runs, opening and preparing images included, in turns and with spread. Answers go to a temporary folder.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from apet.bench.comparison import percent, timings_as_json
from apet.bench.output import table
from apet.bench.variants import NONE, RANDOM
from apet.compare.plan import UNCOMPRESSED, Cell, parse_budgets, parse_methods, plan_cells
from apet.compare.tasks import open_task
from apet.eval.benchmarks import get_benchmark
from apet.eval.cli import add_batch_flags
from apet.eval.loader import LoadedModel, add_loader_flag, find_loader
from apet.eval.run_options import RunOptions
from apet.eval.runner import run as answer_questions
from apet.measure import Timing, ratio, time_in_turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command, and those of the module that loads checkpoints."""
    parser.add_argument("--data", default="data/sample/eval", help="folder of the benchmarks, see data/README.md")
    parser.add_argument("--benchmark", default="gqa", help="whose questions are answered")
    parser.add_argument("--limit", type=int, default=100, help="only the first so many questions")
    parser.add_argument("--tokens", default="64", help="budgets, averaged over the layers, separated by commas")
    parser.add_argument("--methods", default="apet", help="beside none and random, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    add_batch_flags(parser)
    add_loader_flag(parser)
    find_loader().add_flags(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return a table with the figures.

    Raises:
        ValueError: A flag that cannot be, or data that is not there.
    """
    budgets = parse_budgets(args.tokens)
    methods = [name for name in dict.fromkeys([RANDOM, *parse_methods(args.methods)]) if name != NONE]
    with tempfile.TemporaryDirectory() as folder:
        task = open_task(args.benchmark, args.data, Path(folder), args.limit)
        loaded: LoadedModel = find_loader().load(args)
        cells, skipped = plan_cells(methods, budgets, 1, loaded.image_tokens, loaded.layers)
        answering: dict[str, list[float]] = {cell.name: [] for cell in cells}
        tokens: dict[str, float | None] = {}

        def answer(cell: Cell) -> None:
            options = RunOptions(
                str(task.question_file), str(Path(folder) / f"{cell.name}.jsonl"), str(task.image_folder),
                batch_size=args.batch_size, num_workers=args.num_workers, overwrite=True,
            )  # fmt: skip
            torch.manual_seed(0)
            questions = list(task.questions)
            record = answer_questions(get_benchmark(task.benchmark), loaded.answerer(cell.config), options, questions)
            answering[cell.name].append(record.counts["seconds"])
            tokens[cell.name] = record.layer_averaged_tokens

        calls = {cell.name: lambda cell=cell: answer(cell) for cell in cells}
        times = time_in_turns(calls, "cpu", repeats=args.repeats, warmup=1)
    rows, figures = [], []
    for cell in cells:
        figure = _figures(cell, times, answering[cell.name], len(task.questions))
        ceiling = next((other.name for other in cells if (other.method, other.tokens) == (RANDOM, cell.tokens)), None)
        share = None
        if ceiling is not None:
            share = figure["speedup"].median / ratio(times[UNCOMPRESSED], times[ceiling]).median
        rows.append([cell.method, tokens[cell.name], *figure.values(), percent(share)])
        figures.append(
            {"name": cell.name, "visual_tokens": tokens[cell.name], "share_of_random": share} | timings_as_json(figure)
        )
    columns = ["", "visual tokens", "questions/s, whole run", "questions/s, answering", "speed-up", "of random's"]
    title = f"{loaded.model_id}, {task.name}, {len(task.questions)} questions, batch {args.batch_size}"
    return {"tables": [table(title, columns, rows)], "runs": figures, "skipped": [vars(one) for one in skipped]}


def _figures(cell: Cell, times: dict[str, list[float]], answering: list[float], count: int) -> dict[str, Timing]:
    return {
        "questions_per_second": Timing.of([count / spent * 1e3 for spent in times[cell.name]]),
        # The first run of each warmed up.
        "answering_per_second": Timing.of([count / spent for spent in answering[1:]]),
        "speedup": ratio(times[UNCOMPRESSED], times[cell.name]),
    }
