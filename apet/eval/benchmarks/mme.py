"""MME: two yes/no questions per picture in fourteen categories.

A category scores 100 * (accuracy + share of pictures with both answers right), so 200 at most. Ten categories make up
Perception, the number LLaVA papers quote, four Cognition; some papers quote the sum.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.base import SHORT_ANSWER, Benchmark, Score, register
from apet.eval.benchmarks.files import (
    PathLike,
    index_unique,
    listing,
    read_jsonl,
    read_text,
    require_complete,
    user_path,
    write_text_atomic,
)
from apet.eval.metrics import mme_yes_no

GROUPS = {
    "Perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
CATEGORIES = tuple(category for group in GROUPS.values() for category in group)
RELEASE = "MME_Benchmark_release_version"
_YES_NO = "Please answer yes or no."
_TRUTH = re.compile(r"(.*\S)\s+(Yes|No)\s*")


@dataclass(frozen=True)
class _Answered:
    """One line of a result file."""

    image: str
    question: str
    truth: str
    answer: str

    @property
    def correct(self) -> bool:
        return mme_yes_no(self.answer) == self.truth.lower()


@register
class Mme(Benchmark):
    """MME: 2,374 questions on 1,187 pictures; the question id is the picture's path."""

    name = "mme"

    def score(self, *, results_dir: PathLike, present_only: bool = False) -> Score:
        """Score a folder of `{category}.txt`, lines of file, question, truth and answer separated by tabs.

        Args:
            results_dir: The folder.
            present_only: Score the categories that are there, and say that the totals are none of MME.

        Raises:
            ValueError: A missing category file, a line without four cells, or lines that do not pair up by picture.
        """
        folder = user_path(results_dir)
        absent = [category for category in CATEGORIES if not (folder / f"{category}.txt").is_file()]
        if absent and (not present_only or len(absent) == len(CATEGORIES)):
            raise ValueError(
                f"{results_dir} has no {listing(f'{name}.txt' for name in absent)}: MME needs all 14 files "
                "(--present-only scores a part of them)"
            )
        lines = {name: _read_results(folder / f"{name}.txt") for name in CATEGORIES if name not in absent}
        scores = {category: _category_score(rows) for category, rows in lines.items()}
        totals = {group: sum(scores.get(category, 0.0) for category in names) for group, names in GROUPS.items()}
        per_sample = {
            f"{category}/{row.image} | {row.question}": float(row.correct)
            for category, rows in lines.items()
            for row in rows
        }
        return Score(
            name=self.name,
            metric=f"perception, {len(scores)} of 14 categories" if absent else "perception",
            value=totals["Perception"],
            n_questions=sum(map(len, lines.values())),
            details={**{group.lower(): total for group, total in totals.items()}, "scores": scores},
            per_sample=per_sample,
            report="".join(_block(group, totals[group], scores) for group in GROUPS) + _part(scores, absent),
        )


def _read_results(path: Path) -> list[_Answered]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        cells = line.split("\t")
        if len(cells) != 4 or cells[2].lower() not in ("yes", "no"):
            raise ValueError(
                f"{path} line {number}: expected file, question, Yes or No, answer with tabs, got {line!r}"
            )
        rows.append(_Answered(*cells))
    if not rows:
        raise ValueError(f"{path} is empty")
    if len(rows) % 2:
        raise ValueError(f"{path} has {len(rows)} lines; every picture has two questions, so one answer is missing")
    for number in range(0, len(rows), 2):
        if rows[number].image != rows[number + 1].image:
            pair = f"{rows[number].image!r} and {rows[number + 1].image!r}"
            raise ValueError(f"{path} lines {number + 1} and {number + 2}: a pair must be of one picture, got {pair}")
    return rows


def _category_score(rows: list[_Answered]) -> float:
    pictures = [rows[i].correct and rows[i + 1].correct for i in range(0, len(rows), 2)]
    accuracy = sum(row.correct for row in rows) / len(rows)
    return 100 * (accuracy + sum(pictures) / len(pictures))


def _block(group: str, total: float, scores: Mapping[str, float]) -> str:
    tasks = "".join(f"\t {name}  score: {scores[name]}\n" for name in GROUPS[group] if name in scores)
    return f"=========== {group} ===========\ntotal score: {total} \n\n{tasks}\n\n"


def _part(scores: Mapping[str, float], absent: list[str]) -> str:
    if not absent:
        return ""
    return f"note: only {len(scores)} of the 14 categories are there; the totals are sums over these, not MME scores\n"


def write_results(release: PathLike, answers_file: PathLike, target: PathLike, duplicates: str = "error") -> None:
    """Write `{target}/{category}.txt`, the files that are scored, from an answers file and the ground truth `release`.

    Raises:
        ValueError: Ground truth that cannot be read, or answers that are not those of all its questions.
    """
    truth = _read_truth(Path(release))
    keyed = [
        (number, _answer_key(row, f"{answers_file} line {number}"), row)
        for number, row in read_jsonl(answers_file, ("question_id", "prompt", "text"))
    ]
    answers = index_unique(keyed, answers_file, duplicates)
    require_complete(truth, answers, answers_file, release)
    lines: dict[str, list[str]] = defaultdict(list)
    for key, row in answers.items():
        category, file, question, label = truth[key]
        # A tab or line end inside an answer would break the table.
        answer = re.sub(r"[\t\r\n]", " ", row["text"])
        lines[category].append(f"{file}\t{question}\t{label}\t{answer}\n")
    for category, rows in lines.items():
        write_text_atomic(Path(target) / f"{category}.txt", "".join(rows))


def _key(category: str, file: str, question: str) -> str:
    """Category, file and question; some ground truths have two spaces before the yes-or-no request."""
    return f"{category}/{file} | {' '.join(question.split())}"


def _answer_key(row: Mapping[str, Any], where: str) -> str:
    path = str(row["question_id"]).split("/")
    if len(path) < 2:
        raise ValueError(f"{where}: question_id {row['question_id']!r} is no path category/picture")
    question = row["prompt"].replace(SHORT_ANSWER.strip(), "").strip()
    return _key(path[0], path[-1].split(".")[0] + ".txt", f"{question} {_YES_NO}")


def _read_truth(root: Path) -> dict[str, tuple[str, str, str, str]]:
    """Key -> (category, file, question, Yes or No) of every ground-truth line; both published layouts are known."""
    truth: dict[str, tuple[str, str, str, str]] = {}
    for category, path in truth_files(root):
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if not line.strip():
                continue
            match = _TRUTH.fullmatch(line)
            if match is None:
                raise ValueError(f"{path} line {number}: expected a question and Yes or No, got {line!r}")
            truth[_key(category, path.name, match[1])] = (category, path.name, match[1], match[2])
    if not truth:
        raise ValueError(f"{root} has no ground truth: expected {root.name}/<category>/*.txt, see data/README.md")
    return truth


def truth_files(root: Path) -> Iterable[tuple[str, Path]]:
    """(category, file) for `<category>/*.txt` and `<category>/questions_answers_YN/*.txt`, one level deeper too."""
    for base in (root, root / "MME_Benchmark"):
        for category in CATEGORIES:
            for folder in (base / category, base / category / "questions_answers_YN"):
                for path in sorted(folder.glob("*.txt")):
                    yield category, path
