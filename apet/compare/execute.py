"""Answer and score cells: each (benchmark, cell) in its own folder, finished ones never again, interrupted ones go on.

A score is written after its run record says "complete", and both are kept with the answers:
`<out>/<benchmark>/<cell>/<benchmark>-<cell>.jsonl`, `.run.json`, `.score.json` (`apet.report` reads them too).
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apet.compare.plan import UNCOMPRESSED, Cell, Skip
from apet.compare.tasks import Task
from apet.eval.answerer import Answerer
from apet.eval.benchmarks import get_benchmark
from apet.eval.benchmarks.files import read_json
from apet.eval.loader import LoadedModel
from apet.eval.run_record import RunRecord, differing
from apet.eval.runner import RunOptions, run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A cell that was answered and scored on one benchmark.

    Attributes:
        cell: Method, budget and seed.
        task: The benchmark.
        record: Content of run.json.
        score: Content of score.json.
        answers: The answers file.
    """

    cell: Cell
    task: Task
    record: dict[str, Any]
    score: dict[str, Any]
    answers: Path


@dataclass(frozen=True)
class Place:
    """Where and how runs are carried out; none of it changes an answer."""

    out: Path
    batch_size: int = 1
    num_workers: int = 0

    def answers(self, task: Task, cell: Cell) -> Path:
        """The answers file of a cell on a benchmark."""
        return self.out / task.name / cell.name / f"{task.name}-{cell.name}.jsonl"


def execute(
    loaded: LoadedModel, cells: Sequence[Cell], tasks: Sequence[Task], place: Place
) -> tuple[list[Finished], list[Skip]]:
    """Run what is not finished, in the order of the cells.

    A cell that the model or the method refuses becomes a skip. The uncompressed cell must run: what is wrong with the
    data shows there and stops everything.
    """
    finished: list[Finished] = []
    skips: list[Skip] = []
    for cell in cells:
        try:
            # A list of its own: a cell counts only if it ran on every benchmark.
            finished += list(_run_cell(loaded, cell, tasks, place))
        except (ValueError, NotImplementedError) as error:
            if cell.method == UNCOMPRESSED or isinstance(error, _OtherSettings):
                raise
            logger.warning("skipped %s: %s", cell.name, error)
            skips.append(Skip(cell.method, cell.tokens, str(error)))
    return finished, list(dict.fromkeys(skips))


class _OtherSettings(ValueError):
    """A run below --out that was made with other settings."""


def _run_cell(loaded: LoadedModel, cell: Cell, tasks: Iterable[Task], place: Place) -> Iterable[Finished]:
    answerer = loaded.answerer(cell.config, share_tower=True)
    for task in tasks:
        answers = place.answers(task, cell)
        options = RunOptions(
            str(task.question_file), str(answers), str(task.image_folder),
            batch_size=place.batch_size, num_workers=place.num_workers, resume=True,
        )  # fmt: skip
        if not _is_finished(answerer, options):
            logger.info("%s: %s", task.name, cell.name)
            torch.manual_seed(cell.config.seed)
            run(get_benchmark(task.benchmark), answerer, options, list(task.questions), loaded.prompt_length)
        score = answers.with_suffix(".score.json")
        if not score.is_file() or score.stat().st_mtime < answers.stat().st_mtime:
            task.score(answers).write(score)
        yield Finished(cell, task, read_json(RunRecord.path_for(answers)), read_json(score), answers)


def _is_finished(answerer: Answerer, options: RunOptions) -> bool:
    """Whether the answers are there, complete, and of these settings.

    Raises:
        ValueError: They are of other settings.
    """
    path = RunRecord.path_for(options.answers_file)
    if not path.is_file() or not Path(options.answers_file).is_file():
        return False
    record = read_json(path)
    changed = differing(record["settings"], RunRecord.begin(options, answerer, 0).settings)
    if changed:
        raise _OtherSettings(f"{path} was made with other settings ({changed}); give another --out")
    return record["status"] == "complete"
