"""The table of scored runs as Markdown, CSV and curves, and what a reader must know beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from apet.eval.benchmarks.files import listing, user_path, write_csv_atomic
from apet.plots import Panel, Series, check_matplotlib
from apet.plots import write_png as draw
from apet.report.rows import Row
from apet.report.runs import Column, Run
from apet.tables import markdown_table, number


def markdown(rows: Sequence[Row], headings: Mapping[Column, str]) -> str:
    """The table, aligned."""
    header = ["model", "method", "budget", "tokens", *headings.values(), "% of uncompressed", "questions/s"]
    lines = []
    for row in rows:
        scores = [_cell(row, column) for column in headings]
        mean = "" if row.mean_percent is None else f"{row.mean_percent:.1f}"
        if mean and len(headings) > len(row.percent):
            mean += f" (of {len(row.percent)})"
        start = [row.first.model, row.method, row.first.budget, number(row.tokens, 1)]
        lines.append([*start, *scores, mean, number(row.speed, 2)])
    return markdown_table(header, lines)


def notes(runs: Sequence[Run], headings: Mapping[Column, str]) -> list[str]:
    """What the table does not show and a reader must know."""
    found = [_unfinished(one) for one in runs] + [_stale(one) for one in runs]
    if any(one.record["settings"].get("sample_weights") == "random" for one in runs):
        found.append("runs of a checkpoint with random weights are among these; their scores mean nothing")
    if len({column.benchmark for column in headings}) < len(headings):
        found.append("a benchmark was run on different questions: these are columns of their own, never compared")
    references = {one.reference for one in runs if one.method == "none"}
    without = [f"{one.path.name} ({one.column.benchmark})" for one in runs if one.reference not in references]
    if without:
        found.append(
            "no uncompressed run with the same checkpoint, questions and settings, so no percentage: "
            + ", ".join(without[:5])
            + (f", ... ({len(without)} in all)" if len(without) > 5 else "")
        )
    if len({_hardware(one) for one in runs}) > 1:
        found.append("questions/s were measured on different devices or with different batch sizes")
    return [note for note in found if note]


def write_csv(path: str, rows: Sequence[Row]) -> None:
    """One line per run, numbers in full."""
    lines = [_record(row, column) for row in rows for column in row.runs]
    write_csv_atomic(path, list(lines[0]), lines)


def write_png(path: str, rows: Sequence[Row], headings: Mapping[Column, str]) -> None:
    """Curves of score against layer-averaged tokens, a panel per benchmark and one of the mean percentage.

    Raises:
        ValueError: matplotlib is not installed, or no run recorded its tokens.
    """
    check_matplotlib("leave out --png")
    if all(row.tokens is None for row in rows):
        raise ValueError("--png: none of the runs recorded how many tokens it kept")
    panels = [_panel(heading, {row: _point(row, column) for row in rows}) for column, heading in headings.items()]
    means = _mean_points(rows)
    if len(headings) > 1 and any(means.values()):
        panels.insert(0, _panel("mean, % of uncompressed", means))
    draw(user_path(path), panels)


def _panel(heading: str, points: Mapping[Row, tuple[float, float] | None]) -> Panel:
    several = len({row.first.model for row in points}) > 1
    series: dict[str, list[tuple[float, float]]] = {}
    references = set()
    for row, point in points.items():
        method = row.method
        if row.first.method == "none":
            method = method.replace("none", "uncompressed", 1)
        name = f"{row.first.model}, {method}" if several else method
        series.setdefault(name, []).extend([point] if point else [])
        references |= {name} if row.first.method == "none" else set()
    curves = [Series(name, values, reference=name in references) for name, values in series.items()]
    return Panel(heading, "visual tokens, averaged over layers", "%" if "%" in heading else "score", curves)


def _point(row: Row, column: Column) -> tuple[float, float] | None:
    """(tokens, score) of a run, None if there is none or its tokens are not recorded."""
    one = row.runs.get(column)
    return None if one is None or one.tokens is None else (one.tokens, one.score["value"])


def _mean_points(rows: Sequence[Row]) -> dict[Row, tuple[float, float] | None]:
    """(tokens, mean percentage) of the rows with the most benchmarks: a mean over others is not comparable."""
    fullest = max(rows, key=lambda row: len(row.percent)).percent.keys()
    same = {row: row.tokens is not None and len(fullest) > 0 and row.percent.keys() == fullest for row in rows}
    return {row: (row.tokens, row.mean_percent) if same[row] else None for row in rows}


def _unfinished(one: Run) -> str:
    if one.record["status"] != "complete":
        return f"{one.path}: its run is not finished (status {one.record['status']}); the score is of an earlier one"
    failures = one.record["failures"]
    if failures:
        ids = listing([failure.get("question_id") for failure in failures])
        return f"{one.path}: {len(failures)} questions have no answer: {ids}"
    return ""


def _stale(one: Run) -> str:
    answers = one.path.with_name(one.path.name.removesuffix(".score.json") + ".jsonl")
    if answers.is_file() and answers.stat().st_mtime > one.path.stat().st_mtime:
        return f"{one.path} is older than its answers; score them again"
    return ""


def _hardware(one: Run) -> tuple[Any, ...]:
    environment = one.record["environment"]
    return tuple(str(environment.get(key)) for key in ("device", "batch_size", "threads"))


def _record(row: Row, column: Column) -> dict[str, Any]:
    one = row.runs[column]
    return {
        "model": one.model,
        "method": row.method,
        "budget": one.budget,
        "benchmark": column.benchmark,
        "metric": column.metric,
        "questions": column.n_questions,
        "question_file": column.questions,
        "score": one.score["value"],
        "percent_of_uncompressed": row.percent.get(column),
        "mean_percent_of_uncompressed": row.mean_percent,
        "layer_averaged_tokens": one.tokens,
        "questions_per_second": one.speed,
        "seconds": one.record["counts"]["seconds"],
        "device": one.record["environment"].get("device"),
        "batch_size": one.record["environment"].get("batch_size"),
        "file": str(one.path),
    }


def _cell(row: Row, column: Column) -> str:
    if column not in row.runs:
        return ""
    percent = f" ({row.percent[column]:.1f}%)" if column in row.percent and row.first.method != "none" else ""
    return f"{row.runs[column].score['value']:.2f}{percent}"
