"""Compare scored runs: ``python -m apet.report DIR...`` prints one table of scores, tokens and speed.

Reads every `X.score.json` below the folders and the run record `X.run.json` beside it. A row of the table is a
checkpoint with one compression, a column is a benchmark. Scores are also given in percent of the uncompressed run with
the same checkpoint, questions and settings; runs that differ in any of these are never set against each other.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.files import listing, read_json, require_keys, user_path
from apet.eval.scoring_cli import Parser, run

_BUDGET_FIELDS = (
    "visual_token_num", "image_token_ratio", "video_token_num", "video_budget_per", "layer_list", "image_token_list",
    "image_token_ratio_list",
)  # fmt: skip
_ALL_TOKENS = 576  # of LLaVA-1.5, whose runs may have them as a budget: no compression
_SCORE_KEYS = ("name", "metric", "value", "n_questions")
_RECORD_KEYS = (
    "status", "settings", "environment", "counts", "layer_averaged_tokens", "samples_per_second", "failures",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """What scores must have in common to be compared: a benchmark's name, metric, question file and question count."""

    benchmark: str
    metric: str
    questions: str
    n_questions: int


@dataclass(frozen=True)
class Run:
    """One scored run: the files `X.score.json` and `X.run.json`.

    Attributes:
        path: The score file.
        score: Its content.
        record: Content of the run record.
    """

    path: Path
    score: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def column(self) -> Column:
        """What the score may be compared with."""
        digest = self.record["settings"]["question_file_sha256"]
        return Column(self.score["name"], self.score["metric"], digest, self.score["n_questions"])

    @property
    def model(self) -> str:
        """Name of the checkpoint."""
        return self.record["settings"]["model_id"]

    @property
    def compression(self) -> Mapping[str, Any]:
        """The compression settings."""
        return self.record["settings"]["compression"]

    @cached_property
    def vision_budget(self) -> Any:
        """Count or share that the vision stage keeps; None for all."""
        ratio, count = self.compression.get("image_token_ratio"), self.compression.get("visual_token_num")
        if ratio not in (None, 1.0):
            return ratio
        llava = "family" not in self.record["settings"] and self.compression.get("budget_per", "crop") == "crop"
        return None if llava and isinstance(count, int) and count >= _ALL_TOKENS else count

    @property
    def video_budget(self) -> str:
        """The budget of videos as text, where they have their own."""
        count, per = self.compression.get("video_token_num"), self.compression.get("video_budget_per", "auto")
        unit = "" if per == "auto" else f" per {per}"
        return "" if count is None else f"video {count}{unit}"

    @property
    def method(self) -> str:
        """Compression method, "none" where no budget is below the image's tokens."""
        limited = self.vision_budget is not None or self.video_budget or self.compression.get("layer_list")
        return self.compression["method"] if limited else "none"

    @property
    def budget(self) -> str:
        """The budgets as text: "96, 32 after layer 16"."""
        if self.method == "none":
            return "all"
        cuts = self.compression.get("image_token_list") or self.compression.get("image_token_ratio_list") or []
        layers = self.compression.get("layer_list") or []
        after = [f"{cut} after layer {layer}" for layer, cut in zip(layers, cuts, strict=False)]
        vision = "" if self.vision_budget is None else str(self.vision_budget)
        return ", ".join(filter(None, [vision, self.video_budget, *after]))

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """All settings but the compression and the names of files: what a run shares with its uncompressed one."""
        left_out = ("model_path", "model_id", "question_file_sha256", "compression", "sample_weights")
        return _flat({key: value for key, value in self.record["settings"].items() if key not in left_out})

    @cached_property
    def options(self) -> dict[str, Any]:
        """Options of the compression beside method and budgets; none for an uncompressed run."""
        if self.method == "none":
            return {}
        return _flat({key: value for key, value in self.compression.items() if key not in (*_BUDGET_FIELDS, "method")})

    @property
    def row(self) -> str:
        """Key of the table row. Programs differ in max_new_tokens, so that benchmarks of one row may, too."""
        protocol = {key: value for key, value in self.protocol.items() if key != "max_new_tokens"}
        return json.dumps([self.model, protocol, self.method, self.budget, self.options], sort_keys=True)

    @property
    def tokens(self) -> float | None:
        """Visual tokens per question, averaged over decoder layers."""
        return self.record["layer_averaged_tokens"]

    @property
    def speed(self) -> float | None:
        """Questions answered per second."""
        return self.record["samples_per_second"]


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the table: the runs of one checkpoint with one compression.

    Attributes:
        runs: By column.
        percent: Score in percent of the uncompressed run, by column, where there is one.
        label: Settings in which the row differs from others of the table.
    """

    runs: Mapping[Column, Run]
    percent: Mapping[Column, float]
    label: str

    @property
    def first(self) -> Run:
        """Any run: they share model, method and budget."""
        return next(iter(self.runs.values()))

    @property
    def method(self) -> str:
        """Method, with the settings that set the row apart."""
        return f"{self.first.method} ({self.label})" if self.label else self.first.method

    @property
    def tokens(self) -> float | None:
        """Mean over the runs of the layer-averaged tokens."""
        return _mean(run.tokens for run in self.runs.values() if run.tokens is not None)

    @property
    def speed(self) -> float | None:
        """Questions per second over all runs."""
        counts = [run.record["counts"] for run in self.runs.values()]
        seconds = sum(count["seconds"] for count in counts)
        return sum(count.get("measured", count["answers"]) for count in counts) / seconds if seconds else None

    @property
    def mean_percent(self) -> float | None:
        """Mean over the benchmarks that have an uncompressed run."""
        return _mean(self.percent.values())


def find_runs(places: Sequence[str]) -> list[Run]:
    """All scored runs below some folders; a run that two of them hold counts once.

    Raises:
        ValueError: A folder without any scored run, a score without its run record, or a broken one.
    """
    paths: dict[Path, None] = {}
    for place in places:
        path = user_path(place)
        found = [path] if path.name.endswith(".score.json") else sorted(path.rglob("*.score.json"))
        if not found:
            raise ValueError(f"{place} holds no *.score.json; run a benchmark script first")
        paths |= dict.fromkeys(path.resolve() for path in found)
    return [_read(path) for path in paths]


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Runs as rows: by checkpoint, uncompressed first, then by method and falling token count.

    Raises:
        ValueError: Two runs of one benchmark with the same settings.
    """
    groups: dict[str, dict[Column, Run]] = {}
    for one in runs:
        other = groups.setdefault(one.row, {}).setdefault(one.column, one)
        if other is not one:
            raise ValueError(
                f"{other.path} and {one.path} are runs of the same settings on the same questions; leave one out"
            )
    references = {_reference_key(one): one.score["value"] for one in runs if one.method == "none"}
    labels = _labels([next(iter(group.values())) for group in groups.values()])
    rows = []
    for group, label in zip(groups.values(), labels, strict=True):
        full = {column: references.get(_reference_key(one)) for column, one in group.items()}
        percent = {column: 100 * group[column].score["value"] / value for column, value in full.items() if value}
        rows.append(Row(group, percent, label))
    return sorted(rows, key=lambda row: (row.first.model, row.first.method != "none", row.method, -(row.tokens or 0)))


def columns_of(runs: Iterable[Run]) -> dict[Column, str]:
    """Columns and their headings; different question sets of one benchmark are columns of their own."""
    columns = sorted({one.column for one in runs}, key=lambda column: (column.benchmark, -column.n_questions))
    headings = {}
    for column in columns:
        same = [other for other in columns if other.benchmark == column.benchmark]
        extra = [f"{column.n_questions} questions"] if len({other.n_questions for other in same}) > 1 else []
        if len({(other.questions, other.n_questions) for other in same}) > len({other.n_questions for other in same}):
            extra.append(f"file {column.questions[:6]}")
        headings[column] = f"{column.benchmark}, {column.metric}" + (f" [{', '.join(extra)}]" if extra else "")
    return headings


def markdown(rows: Sequence[Row], headings: Mapping[Column, str]) -> str:
    """The table, aligned."""
    header = ["model", "method", "budget", "tokens", *headings.values(), "% of uncompressed", "questions/s"]
    lines = []
    for row in rows:
        scores = [_cell(row, column) for column in headings]
        mean = "" if row.mean_percent is None else f"{row.mean_percent:.1f}"
        if mean and len(headings) > len(row.percent):
            mean += f" (of {len(row.percent)})"
        start = [row.first.model, row.method, row.first.budget, _number(row.tokens, 1)]
        lines.append([*start, *scores, mean, _number(row.speed, 2)])
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    table = [header, ["-" * width for width in widths], *lines]
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |\n" for line in table
    )


def notes(runs: Sequence[Run], headings: Mapping[Column, str]) -> list[str]:
    """What the table does not show and a reader must know."""
    found = [_unfinished(one) for one in runs] + [_stale(one) for one in runs]
    if any(one.record["settings"].get("sample_weights") == "random" for one in runs):
        found.append("runs of a checkpoint with random weights are among these; their scores mean nothing")
    if len({column.benchmark for column in headings}) < len(headings):
        found.append("a benchmark was run on different questions: these are columns of their own, never compared")
    references = {_reference_key(one) for one in runs if one.method == "none"}
    without = [f"{one.path.name} ({one.column.benchmark})" for one in runs if _reference_key(one) not in references]
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
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = None
        for line in (_record(row, column) for row in rows for column in row.runs):
            if writer is None:
                writer = csv.DictWriter(file, list(line))
                writer.writeheader()
            writer.writerow(line)


def write_png(path: str, rows: Sequence[Row], headings: Mapping[Column, str]) -> None:
    """Curves of score against layer-averaged tokens, a panel per benchmark and one of the mean percentage.

    Raises:
        ValueError: matplotlib is not installed, or no run recorded its tokens.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from None
    if all(row.tokens is None for row in rows):
        raise ValueError("--png: none of the runs recorded how many tokens it kept")
    panels = {heading: {row: _point(row, column) for row in rows} for column, heading in headings.items()}
    means = _mean_points(rows)
    if len(headings) > 1 and any(means.values()):
        panels = {"mean, % of uncompressed": means, **panels}
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.6 * across, 3.6 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, (heading, points) in zip(axes, panels.items(), strict=False):
        _draw(axis, heading, points)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    figure.savefig(path, format="png", dpi=150)


def _point(row: Row, column: Column) -> tuple[float, float] | None:
    """(tokens, score) of a run, None if there is none or its tokens are not recorded."""
    one = row.runs.get(column)
    return None if one is None or one.tokens is None else (one.tokens, one.score["value"])


def _mean_points(rows: Sequence[Row]) -> dict[Row, tuple[float, float] | None]:
    """(tokens, mean percentage) of the rows with the most benchmarks: a mean over others is not comparable."""
    fullest = max(rows, key=lambda row: len(row.percent)).percent.keys()
    same = {row: row.tokens is not None and len(fullest) > 0 and row.percent.keys() == fullest for row in rows}
    return {row: (row.tokens, row.mean_percent) if same[row] else None for row in rows}


def _draw(axis: Any, heading: str, points: Mapping[Row, tuple[float, float] | None]) -> None:
    """One panel; a method keeps its colour and marker in all of them, so methods without a point count too."""
    several = len({row.first.model for row in points}) > 1
    series: dict[str, list[tuple[float, float]]] = {}
    for row, point in points.items():
        method = row.method.replace("none", "uncompressed", 1) if row.first.method == "none" else row.method
        name = f"{row.first.model}, {method}" if several else method
        series.setdefault(name, []).extend([point] if point else [])
    for number, (name, values) in enumerate(series.items()):
        tokens, scores = zip(*sorted(values), strict=True) if values else ((), ())
        full = "uncompressed" in name
        style = {"color": f"C{number % 10}", "label": name, "marker": "s" if full else "o^vDPX*"[number % 7]}
        axis.plot(tokens, scores, linestyle="none" if full else "-", **style)
        for height in scores if full else ():
            axis.axhline(height, color=style["color"], linestyle="--", linewidth=1)
    axis.set(title=heading, xlabel="visual tokens, averaged over layers", ylabel="%" if "%" in heading else "score")
    axis.grid(alpha=0.3)


def _read(path: Path) -> Run:
    record_path = path.with_name(path.name.removesuffix(".score.json") + ".run.json")
    if not record_path.is_file():
        raise ValueError(f"{path} has no run record {record_path.name} beside it")
    score, record = (_read_object(file, keys) for file, keys in ((path, _SCORE_KEYS), (record_path, _RECORD_KEYS)))
    if isinstance(score["value"], bool) or not isinstance(score["value"], int | float):
        raise ValueError(f"{path}: value {score['value']!r} is not a number")
    require_keys(record["settings"], ("model_id", "compression", "question_file_sha256"), f"{record_path} settings")
    require_keys(record["settings"]["compression"], ("method",), f"{record_path} compression")
    require_keys(record["counts"], ("answers", "seconds"), f"{record_path} counts")
    return Run(path, score, record)


def _read_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    require_keys(content, keys, str(path))
    return content


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without nesting: {"generation": {"temperature": 0}} becomes {"temperature": 0}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return flat


def _reference_key(one: Run) -> str:
    return json.dumps([one.model, list(vars(one.column).values()), one.protocol], sort_keys=True)


def _labels(runs: Sequence[Run]) -> list[str]:
    """For each run what sets it apart: protocol settings from all others, options from those of its method."""
    labels = []
    for one in runs:
        parts = []
        for kind, others in (("protocol", runs), ("options", [other for other in runs if other.method == one.method])):
            own = getattr(one, kind)
            for name, value in own.items():
                if name != "max_new_tokens" and any(getattr(other, kind).get(name) != value for other in others):
                    parts.append(f"{name}={value}")
        labels.append(", ".join(parts))
    return labels


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


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _report(args: argparse.Namespace) -> None:
    runs = find_runs(args.folders)
    rows, headings = rows_of(runs), columns_of(runs)
    if args.csv:
        write_csv(args.csv, rows)
    if args.png:
        write_png(args.png, rows, headings)
    print(markdown(rows, headings), end="")
    for note in notes(runs, headings):
        print(f"\nNOTE: {note}")


def parser() -> Parser:
    """The program's flags."""
    flags = Parser(prog="python -m apet.report", description=__doc__.partition(":")[0])
    flags.add_argument("folders", nargs="+", help="folders with *.score.json and *.run.json, or score files")
    flags.add_argument("--csv", metavar="FILE", help="write one line per run here")
    flags.add_argument("--png", metavar="FILE", help="draw score against tokens here (needs matplotlib)")
    return flags


if __name__ == "__main__":
    sys.exit(run(parser(), _report))
