"""Compare runs: ``python -m apet.report DIR...`` prints one table of scores, tokens and speed.

Reads every `X.score.json` below the folders and the run record `X.run.json` beside it. Scores are given in percent of
the uncompressed run of the same model and benchmark, where one is among the runs.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.files import read_json
from apet.eval.scoring_cli import Parser, run

_COLUMNS = ("benchmark", "model", "method", "visual tokens", "score", "metric", "% of none", "questions/s", "seconds", "questions")


@dataclass(frozen=True)
class Run:
    """One scored run.

    Attributes:
        benchmark: Name of the benchmark.
        metric: What the score is.
        score: Headline score.
        questions: Questions scored.
        settings: Settings of the run record.
        tokens: Visual tokens per question, averaged over decoder layers; None if not recorded.
        speed: Questions per second of answering; None if not recorded.
        seconds: Seconds of answering.
    """

    benchmark: str
    metric: str
    score: float
    questions: int
    settings: dict[str, Any]
    tokens: float | None
    speed: float | None
    seconds: float

    @property
    def method(self) -> str:
        """Compression method, "none" where no budget is below the image's tokens."""
        compression = self.settings["compression"]
        limited = compression["visual_token_num"] not in (None, 576) or compression["image_token_ratio"]
        return compression["method"] if limited or compression["layer_list"] else "none"


def find_runs(folders: Sequence[str]) -> list[Run]:
    """All scored runs below some folders, by benchmark, then falling token count.

    Raises:
        ValueError: A folder without any scored run, or a score without its run record.
    """
    runs = []
    for folder in folders:
        scores = sorted(Path(folder).rglob("*.score.json"))
        if not scores:
            raise ValueError(f"{folder} holds no *.score.json; run a benchmark script first")
        runs.extend(_read(path) for path in scores)
    return sorted(runs, key=lambda run: (run.benchmark, run.settings["model_id"], -(run.tokens or 0), run.method))


def table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Rows of the report, texts by column name."""
    full = {(run.benchmark, run.settings["model_id"]): run.score for run in runs if run.method == "none"}
    rows = []
    for one in runs:
        reference = full.get((one.benchmark, one.settings["model_id"]))
        values = (
            one.benchmark,
            one.settings["model_id"],
            one.method,
            "" if one.tokens is None else f"{one.tokens:.1f}",
            f"{one.score:.2f}",
            one.metric,
            f"{100 * one.score / reference:.1f}" if reference else "",
            "" if one.speed is None else f"{one.speed:.2f}",
            f"{one.seconds:.1f}",
            str(one.questions),
        )
        rows.append(dict(zip(_COLUMNS, values, strict=True)))
    return rows


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """The rows as an aligned Markdown table."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in _COLUMNS}
    lines = [" | ".join(name.ljust(widths[name]) for name in _COLUMNS)]
    lines.append(" | ".join("-" * widths[name] for name in _COLUMNS))
    lines += [" | ".join(row[name].ljust(widths[name]) for name in _COLUMNS) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _read(path: Path) -> Run:
    score = read_json(path)
    record_path = path.with_name(path.name.removesuffix(".score.json") + ".run.json")
    if not record_path.is_file():
        raise ValueError(f"{path} has no run record {record_path.name} beside it")
    record = read_json(record_path)
    return Run(
        score["name"],
        score["metric"],
        score["value"],
        score["n_questions"],
        record["settings"],
        record["layer_averaged_tokens"],
        record["samples_per_second"],
        record["counts"]["seconds"],
    )


def _report(args: argparse.Namespace) -> None:
    runs = find_runs(args.folders)
    rows = table(runs)
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print(markdown(rows), end="")
    if any(run.settings.get("sample_weights") == "random" for run in runs):
        print("\nNOTE: runs of a checkpoint with random weights are among these; their scores mean nothing")


def parser() -> Parser:
    """The program's flags."""
    flags = Parser(prog="python -m apet.report", description=__doc__.partition(":")[0])
    flags.add_argument("folders", nargs="+", help="folders with *.score.json and *.run.json")
    flags.add_argument("--csv", help="write the table here too")
    return flags


if __name__ == "__main__":
    sys.exit(run(parser(), _report))
