"""The comparison as text: Markdown for people, CSV for programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apet.compare.bootstrap import RESAMPLES
from apet.compare.cost import ANSWER_TOKENS, ROUNDS, Cost
from apet.compare.difficulty import SplitRow
from apet.compare.execute import Finished
from apet.compare.plan import UNCOMPRESSED, Skip
from apet.compare.published import PUBLISHED, Agreement, agreement
from apet.compare.rows import AVERAGE, Interval, Row
from apet.eval.benchmarks.files import write_csv_atomic
from apet.measure import Timing
from apet.tables import markdown_table, number

_INTERVAL = "95 % (by picture)"
_HEADER = ("method", "budget", "tokens", "score", "% of none", _INTERVAL, "rank", "above random", _INTERVAL, "p, apet",
           "p, best peer", "seeds")  # fmt: skip
_COST_HEADER = ("TTFT, ms", "sooner than none", "than random", "questions/s", "/ none", "/ random", "memory, MiB")
_SPLIT_HEADER = ("method", "budget", "hard, %", "questions", "easy, %", "questions")
_CSV = ("benchmark", "metric", "method", "budget", "tokens", "score", "spread", "percent", "percent_low",
        "percent_high", "rank", "difference", "difference_low", "difference_high", "p_apet", "p_peer", "seeds",
        "questions", "pictures")  # fmt: skip
_CSV_COST = ("first_token_ms", "first_token_p10", "first_token_p90", "first_token_none", "first_token_random",
             "questions_per_second", "questions_per_second_p10", "questions_per_second_p90", "rate_none", "rate_random",
             "peak_bytes")  # fmt: skip


def markdown(
    tables: Mapping[str, Sequence[Row]],
    finished: Sequence[Finished],
    skips: Sequence[Skip],
    split: Mapping[str, Sequence[SplitRow]],
) -> str:
    """Caption, one table per benchmark, what the columns mean, the split by difficulty, and what was not run.

    Time and memory are in the first table: they are a method's and no benchmark's.
    """
    parts = [caption(finished), *(f"NOTE: {note}\n" for note in notes(finished))]
    measured, first = False, next(iter(tables.values()))
    for place, (name, rows) in enumerate(tables.items()):
        title = name if name == AVERAGE else f"{name} ({rows[0].metric}, {_counts(rows[0])})"
        lines: list[Sequence[str]] = [_HEADER, *map(_cells, rows)]
        if place == 0 and any(row.cost for row in rows):
            measured = True
            costs = [_COST_HEADER, *(_cost_cells(row.cost) for row in rows)]
            lines = [(*line, *cost) for line, cost in zip(lines, costs, strict=True)]
        parts.append(f"### {title}\n\n{markdown_table(lines[0], lines[1:])}")
    parts.append(_LEGEND + (_COST_LEGEND if measured else ""))
    for name, rows in split.items():
        cells = [(row.method, str(row.budget), number(row.hard, 1), str(row.n_hard), number(row.easy, 1),
                  str(row.n_easy)) for row in rows]  # fmt: skip
        parts.append(f"### {name}, by difficulty\n\n{markdown_table(_SPLIT_HEADER, cells)}")
    if split:
        parts.append(_SPLIT_LEGEND)
    agreements = list(filter(None, (_agreement(budget, first) for budget in PUBLISHED)))
    if agreements:
        parts.append("### Against published results\n\n" + "\n".join(map(str, agreements)))
    if skips:
        lines = "".join(f"- {method} at {budgets}: {reason}\n" for method, budgets, reason in _grouped(skips))
        parts.append(f"Not run:\n\n{lines}")
    return "\n".join(parts)


def _agreement(budget: int, rows: Sequence[Row]) -> Agreement | None:
    """How the first table orders the methods of a budget, against published results."""
    own = [row for row in rows if row.budget == budget and row.percent is not None]
    resamples = {row.method: row.percent_resamples for row in own} if all(row.pictures > 1 for row in own) else None
    return agreement(budget, {row.method: row.percent for row in own}, resamples)


def summary(tables: Mapping[str, Sequence[Row]], finished: Sequence[Finished]) -> str:
    """The first table in short: percent of the uncompressed model, a line per method, a column per budget.

    The best at the smallest budget comes first.
    """
    name, rows = next(iter(tables.items()))
    budgets = sorted({row.budget for row in rows if row.budget is not None}, reverse=True)
    cells = {(row.method, row.budget): row for row in rows if row.budget is not None}
    methods = list(dict.fromkeys(method for method, _ in cells))
    methods.sort(key=lambda method: [-_percent_or_less(cells.get((method, budget))) for budget in reversed(budgets)])
    lines = [(method, *(_share(cells.get((method, budget))) for budget in budgets)) for method in methods]
    full = next(row for row in rows if row.method == UNCOMPRESSED)
    what = "mean over the benchmarks" if name == AVERAGE else f"{name}, {full.metric}"
    title = (
        f"Percent of the uncompressed model ({what}; uncompressed: {full.score:.2f}) and 95 % interval, resampled by "
        f"picture ({_counts(full)}).\n"
    )
    header = ("method", *(f"{budget} tokens" for budget in budgets))
    return "\n".join([caption(finished), *(f"NOTE: {note}\n" for note in notes(finished)), title,
                      markdown_table(header, lines)])  # fmt: skip


def caption(finished: Sequence[Finished]) -> str:
    """Model, precision, device, batch size and versions, as the run records have them."""
    record = finished[0].record
    settings, environment = record["settings"], record["environment"]
    libraries = environment.get("libraries", {})
    facts = [
        f"dtype {settings.get('dtype', 'unknown')}",
        f"attention {settings['attn_implementation']}" if settings.get("attn_implementation") else "",
        f"device {environment['device']}",
        f"batch size {environment['batch_size']}",
        f"{environment['threads']} CPU threads" if environment["device"] == "cpu" else "",
        *(f"{name} {libraries[name]}" for name in ("torch", "transformers") if libraries.get(name)),
        f"commit {environment['commit'][:8]}" if environment.get("commit") else "",
    ]
    return f"**{settings['model_id']}**: {', '.join(fact for fact in facts if fact)}.\n"


def has_random_weights(finished: Sequence[Finished]) -> bool:
    """Whether the checkpoint says so itself."""
    return any(one.record["settings"].get("sample_weights") == "random" for one in finished)


def notes(finished: Sequence[Finished]) -> list[str]:
    """What a reader must know before using the numbers."""
    found = []
    if has_random_weights(finished):
        found.append("this checkpoint has random weights; its scores mean nothing")
    limited = [name for name in dict.fromkeys(one.task.name for one in finished) if "-first" in name]
    if limited:
        found.append(f"only the first questions were answered and scored ({', '.join(limited)})")
    devices = sorted({str(one.record["environment"].get("device")) for one in finished})
    if len(devices) > 1:
        found.append(f"the answers were given on different devices ({', '.join(devices)}), which round differently")
    failures = [one.answers.parent.name for one in finished if one.record["failures"]]
    if failures:
        found.append(f"questions without an answer in {', '.join(failures)}")
    return found


def write_csv(path: Path, tables: Mapping[str, Sequence[Row]]) -> None:
    """One line per row of all tables, numbers in full."""
    write_csv_atomic(path, (*_CSV, *_CSV_COST), (_record(row) for rows in tables.values() for row in rows))


def _record(row: Row) -> dict[str, Any]:
    values = {name: getattr(row, name, None) for name in _CSV}
    for name in ("percent", "difference"):
        bounds = getattr(row, f"{name}_interval") or (None, None)
        values |= {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}
    return values | ({} if row.cost is None else dict(zip(_CSV_COST, _costs(row.cost), strict=True)))


_LEGEND = f"""\
budget: visual tokens per question asked for, averaged over the decoder layers; tokens: the same as measured. none: the
uncompressed model. score: mean over the seeds, ± their standard deviation; on average the mean over the benchmarks, MME
in percent of its points. % of none: score in percent of the uncompressed model's; on average the mean of these.
95 %: paired bootstrap that draws pictures, each with all its questions ({RESAMPLES:,} resamples; random selection: mean
over its seeds in each).
rank: at the same budget, 1 is best. above random: points above random selection at the same budget.
p: two-sided p-value of no difference from `apet`, and from the best peer, at the same budget (same resamples, Holm's
correction over the methods of a budget).
"""
_COST_LEGEND = f"""\
TTFT: time from the prepared question to the first token, one question at a time, median (10th..90th percentile) of
{ROUNDS} rounds in which all methods take turns. questions/s: the same in one batch, {ANSWER_TOKENS} tokens each. Here
nothing is shared between methods. sooner, /: medians of the rounds' ratios. memory: at the worst moment of that batch,
beyond the loaded model.
"""
_SPLIT_LEGEND = """\
Only questions that the uncompressed model answers (correctness of at least 0.5). hard: average pooling to the same
budget fails; easy: it succeeds too, so these say little about a method. Mean correctness, random selection over its
seeds.
"""


def _counts(row: Row) -> str:
    return f"{row.questions:,} questions about {row.pictures:,} pictures"


def _cells(row: Row) -> list[str]:
    score = number(row.score, 2) + ("" if row.spread is None else f" ± {row.spread:.2f}")
    return [
        row.method,
        "all" if row.method == UNCOMPRESSED else str(row.budget),
        number(row.tokens, 1),
        score,
        number(row.percent, 1),
        _bounds(row.percent_interval, 1),
        "" if row.rank is None else str(row.rank),
        "" if row.difference is None else f"{row.difference:+.2f}",
        _bounds(row.difference_interval, 2),
        _p(row.p_apet),
        _p(row.p_peer),
        str(row.seeds),
    ]


def _p(value: float | None) -> str:
    return number(value, 3) if value is None or value >= 0.001 else "< 0.001"


def _cost_cells(cost: Cost | None) -> list[str]:
    if cost is None:
        return [""] * len(_COST_HEADER)
    return [
        _timing(cost.first_token),
        number(cost.first_token_none, 2, "x"),
        number(cost.first_token_random, 2, "x"),
        _timing(cost.rate),
        number(cost.rate_none, 2, "x"),
        number(cost.rate_random, 2, "x"),
        f"{cost.memory / 2**20:.1f}",
    ]


def _costs(cost: Cost) -> tuple[float | None, ...]:
    """In the order of `_CSV_COST`."""
    first, rate = ((one.median, one.p10, one.p90) for one in (cost.first_token, cost.rate))
    return (
        *first,
        cost.first_token_none,
        cost.first_token_random,
        *rate,
        cost.rate_none,
        cost.rate_random,
        cost.memory,
    )


def _timing(timing: Timing) -> str:
    return f"{timing.median:.1f} ({timing.p10:.1f}..{timing.p90:.1f})"


def _percent_or_less(row: Row | None) -> float:
    return -1.0 if row is None or row.percent is None else row.percent


def _share(row: Row | None) -> str:
    if row is None or row.percent is None:
        return ""
    low, high = row.percent_interval or (row.percent, row.percent)
    return f"{row.percent:.1f} ({low:.1f} .. {high:.1f})"


def _bounds(bounds: Interval, digits: int) -> str:
    return "" if bounds is None else f"{bounds[0]:.{digits}f} .. {bounds[1]:.{digits}f}"


def _grouped(skips: Sequence[Skip]) -> list[tuple[str, str, str]]:
    """(method, budgets, reason); reasons that name their budget stay apart."""
    groups: dict[tuple[str, str], list[str]] = {}
    for skip in skips:
        groups.setdefault((skip.method, skip.reason), []).append(str(skip.tokens))
    return [(method, ", ".join(budgets), reason) for (method, reason), budgets in groups.items()]
