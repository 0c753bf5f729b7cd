"""SEED-Bench: four options, on images and video frames; right is the exact letter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from apet.eval.benchmarks.base import Benchmark, Score, register
from apet.eval.benchmarks.files import (
    PathLike,
    index_annotations,
    read_answers,
    read_json,
    require_complete,
    require_keys,
    write_jsonl_atomic,
)
from apet.eval.metrics import exact_match, percent

_KEYS = ("question_id", "answer", "question_type_id", "data_type")


@register
class Seed(Benchmark):
    """SEED-Bench: 19,242 questions, twelve types, of images and of videos."""

    name = "seed"

    def score(self, *, annotation_file: PathLike, result_file: PathLike, duplicates: str = "error") -> Score:
        """Score an answers file.

        Args:
            annotation_file: `{"questions": [...], "question_type": {name: id}}`.
            result_file: The answers file; ids may be numbers or strings.
            duplicates: "error", or "last" to let a later answer to a question win.
        """
        questions, names = _read_annotations(annotation_file)
        answers = read_answers(result_file, duplicates)
        require_complete(questions, answers, result_file, annotation_file)
        correct = {key: exact_match(answers[key]["text"], row["answer"]) for key, row in questions.items()}
        by_type = _by(questions, correct, "question_type_id")
        by_data = _by(questions, correct, "data_type")
        types = {name: by_type[number] for name, number in names.items() if number in by_type}
        total = percent(correct.values())
        lines = [f"{name}: {value:.2f}%" for name, value in types.items()]
        lines.append(f"Total accuracy: {total:.2f}%")
        for data in ("image", "video"):
            lines.append(f"{data} accuracy: " + (f"{by_data[data]:.2f}%" if data in by_data else "n/a (no question)"))
        return Score(
            name=self.name,
            metric="accuracy",
            value=total,
            n_questions=len(correct),
            details={"types": types, "data_types": by_data},
            per_sample=correct,
            report="\n".join(lines) + "\n",
        )


def convert(
    annotation_file: PathLike, result_file: PathLike, result_upload_file: PathLike, duplicates: str = "error"
) -> Score:
    """Write the upload, JSON lines of `question_id` and `prediction` in the annotation's order; returns the score."""
    score = Seed().score(annotation_file=annotation_file, result_file=result_file, duplicates=duplicates)
    questions, _ = _read_annotations(annotation_file)
    answers = read_answers(result_file, duplicates)
    rows = ({"question_id": row["question_id"], "prediction": answers[key]["text"]} for key, row in questions.items())
    write_jsonl_atomic(result_upload_file, rows)
    return score


def _read_annotations(path: PathLike) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Questions by id, and type name -> type id."""
    content = read_json(path)
    questions = index_annotations(content, _KEYS, path, "questions")
    require_keys(content, ("question_type",), str(path))
    return questions, content["question_type"]


def _by(questions: Mapping[str, Mapping[str, Any]], correct: Mapping[str, float], column: str) -> dict[Any, float]:
    groups: dict[Any, list[float]] = defaultdict(list)
    for key, row in questions.items():
        groups[row[column]].append(correct[key])
    return {group: percent(values) for group, values in groups.items()}
