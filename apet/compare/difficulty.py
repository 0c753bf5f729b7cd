"""Easy and hard questions, as VTC-Bench (arXiv 2510.07143) tells them apart.

Of the questions that the uncompressed model answers, those that plain average pooling to the same budget answers too
test a method little. VTC-Bench scales the picture down; a tower of fixed input size scales it up again, so the pooled
features stand in here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from apet.compare.execute import Finished
from apet.compare.plan import UNCOMPRESSED
from apet.eval.metrics import percent

CHEAP = "avg_pool"
_RIGHT = 0.5  # correctness is a share where annotators disagree


@dataclass(frozen=True)
class SplitRow:
    """A method at a budget on one benchmark, among the questions the uncompressed model answers.

    Attributes:
        method: Registered name.
        budget: Tokens asked for.
        hard: Mean correctness in percent where average pooling fails; None without such questions.
        easy: The same where average pooling succeeds.
        n_hard: Number of these questions.
        n_easy: Number of those.
    """

    method: str
    budget: int
    hard: float | None
    easy: float | None
    n_hard: int
    n_easy: int


def split_by_difficulty(finished: Sequence[Finished]) -> dict[str, list[SplitRow]]:
    """Rows by benchmark, budget by budget, the best on hard questions first; seeds are pooled."""
    tables: dict[str, list[SplitRow]] = {}
    for name in dict.fromkeys(one.task.name for one in finished):
        runs: dict[tuple[str, int | None], list[Mapping[str, float]]] = {}
        for one in finished:
            if one.task.name == name:
                runs.setdefault((one.cell.method, one.cell.tokens), []).append(one.score["per_sample"])
        tables[name] = sorted(_rows(runs), key=lambda row: (-row.budget, -(row.hard or 0), row.method))
    return tables


def _rows(runs: Mapping[tuple[str, int | None], Sequence[Mapping[str, float]]]) -> Iterable[SplitRow]:
    (full,) = runs[UNCOMPRESSED, None]
    for (method, budget), samples in runs.items():
        if method in (UNCOMPRESSED, CHEAP) or (CHEAP, budget) not in runs:
            continue
        (cheap,) = runs[CHEAP, budget]
        answered = [key for key, value in full.items() if value >= _RIGHT]
        hard = [key for key in answered if cheap[key] < _RIGHT]
        easy = [key for key in answered if cheap[key] >= _RIGHT]
        shares = [percent(sample[key] for sample in samples for key in keys) for keys in (hard, easy)]
        yield SplitRow(method, budget, *shares, len(hard), len(easy))
