"""From finished cells to rows: score, percent of the uncompressed model with its interval, rank, tokens, cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from apet.compare.bootstrap import interval, resampled_scores
from apet.compare.cost import Cost, Key
from apet.compare.execute import Finished
from apet.compare.plan import BASELINE, UNCOMPRESSED
from apet.compare.rows import AVERAGE, Row
from apet.compare.significance import with_p_values
from apet.eval.metrics import mean


def rows_of(finished: Sequence[Finished], costs: Mapping[Key, Cost] | None = None) -> dict[str, list[Row]]:
    """Rows by benchmark; with more than one benchmark the average comes first.

    Within a benchmark the uncompressed model comes first, then budget by budget, the best method first.
    """
    tables = {}
    for task in dict.fromkeys(one.task.name for one in finished):
        tables[task] = _benchmark_rows([one for one in finished if one.task.name == task])
    if len(tables) > 1:
        tables = {AVERAGE: _average_rows(list(tables.values())), **tables}
    return {
        name: [
            replace(row, cost=(costs or {}).get((row.method, row.budget)))
            for row in _ordered(with_p_values(_ranked(_compared(rows))))
        ]
        for name, rows in tables.items()
    }


def _benchmark_rows(finished: Sequence[Finished]) -> list[Row]:
    task = finished[0].task
    outcomes = [one.task.outcome(one.score["per_sample"], one.answers) for one in finished]
    for one, outcome in zip(finished, outcomes, strict=True):
        assert abs(outcome.score - one.score["value"]) < 0.01, f"{one.answers}: the headline is not what is resampled"
    values = resampled_scores(task.name, outcomes)
    groups: dict[Key, list[int]] = {}
    for index, one in enumerate(finished):
        groups.setdefault((one.cell.method, one.cell.tokens), []).append(index)
    maximum, pictures = outcomes[0].maximum, sum(map(len, outcomes[0].clusters))
    return [
        _row([finished[index] for index in members], values[members].mean(0), maximum, pictures)
        for members in groups.values()
    ]


def _row(members: Sequence[Finished], values: np.ndarray, maximum: float, pictures: int) -> Row:
    first = members[0]
    scores = [one.score["value"] for one in members]
    return Row(
        benchmark=first.task.name,
        metric=first.score["metric"],
        method=first.cell.method,
        budget=first.cell.tokens,
        score=float(np.mean(scores)),
        tokens=mean(one.record["layer_averaged_tokens"] for one in members),
        questions=first.score["n_questions"],
        pictures=pictures,
        seeds=len(members),
        maximum=maximum,
        spread=float(np.std(scores, ddof=1)) if len(members) > 1 else None,
        resamples=values,
    )


def _average_rows(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """Means over the benchmarks of the methods that have all of them."""
    by_key: dict[Key, list[Row]] = {}
    for row in (row for rows in tables for row in _compared(rows)):
        by_key.setdefault((row.method, row.budget), []).append(row)
    averages = []
    for (method, budget), rows in by_key.items():
        if len(rows) < len(tables):
            continue
        averages.append(
            Row(
                benchmark=AVERAGE,
                metric="mean of the benchmarks",
                method=method,
                budget=budget,
                score=float(np.mean([100 * row.score / row.maximum for row in rows])),
                tokens=mean(row.tokens for row in rows),
                questions=sum(row.questions for row in rows),
                pictures=sum(row.pictures for row in rows),
                seeds=rows[0].seeds,
                percent=mean(row.percent for row in rows),
                resamples=np.mean([100 * row.resamples / row.maximum for row in rows], axis=0),
                percent_resamples=np.mean([row.percent_resamples for row in rows], axis=0),
            )
        )
    return averages


def _compared(rows: Sequence[Row]) -> list[Row]:
    """Rows set against the uncompressed row and against random selection at the same budget."""
    full = next(row for row in rows if row.method == UNCOMPRESSED)
    baselines = {row.budget: row for row in rows if row.method == BASELINE}
    return [_against(row, full, baselines.get(row.budget)) for row in rows]


def _against(row: Row, full: Row, baseline: Row | None) -> Row:
    percents, percent = row.percent_resamples, row.percent
    if percents is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            percents = 100 * row.resamples / full.resamples
        percent = 100 * row.score / full.score if full.score else None
    known = row.pictures > 1  # of a single picture every resample is the same
    row = replace(
        row,
        score_interval=interval(row.resamples) if known else None,
        percent=percent,
        percent_resamples=percents,
        percent_interval=interval(percents) if known and row is not full and percent is not None else None,
    )
    if baseline is None or row.method == BASELINE:
        return row
    return replace(
        row,
        difference=row.score - baseline.score,
        difference_interval=interval(row.resamples - baseline.resamples) if known else None,
    )


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Ranks among the methods of each budget: by score, on average by mean percentage."""
    values = {id(row): row.score if row.benchmark != AVERAGE or row.percent is None else row.percent for row in rows}
    ranked = []
    for row in rows:
        # Rounded: two ways of adding up the same answers must not make two ranks.
        better = [
            other for other in rows
            if other.budget == row.budget and round(values[id(other)], 6) > round(values[id(row)], 6)
        ]  # fmt: skip
        ranked.append(row if row.method == UNCOMPRESSED else replace(row, rank=1 + len(better)))
    return ranked


def _ordered(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.budget is not None, -(row.budget or 0), row.rank or 0, row.method))
