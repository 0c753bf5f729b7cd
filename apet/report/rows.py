"""Scored runs as rows of a table: a row is a checkpoint with one compression, a column is a benchmark.

Runs that differ in checkpoint, questions or settings are never set against each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from apet.eval.metrics import mean
from apet.report.runs import Column, Run


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
        return mean(run.tokens for run in self.runs.values() if run.tokens is not None)

    @property
    def speed(self) -> float | None:
        """Questions per second over all runs."""
        counts = [run.record["counts"] for run in self.runs.values()]
        seconds = sum(count["seconds"] for count in counts)
        return sum(count.get("measured", count["answers"]) for count in counts) / seconds if seconds else None

    @property
    def mean_percent(self) -> float | None:
        """Mean over the benchmarks that have an uncompressed run."""
        return mean(self.percent.values())


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
    references = {one.reference: one.score["value"] for one in runs if one.method == "none"}
    labels = _labels([next(iter(group.values())) for group in groups.values()])
    rows = []
    for group, label in zip(groups.values(), labels, strict=True):
        full = {column: references.get(one.reference) for column, one in group.items()}
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
