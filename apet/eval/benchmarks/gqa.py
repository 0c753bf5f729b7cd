"""GQA: short open and binary questions about a scene, scored by exact string match.

The official script asks for scene graphs and answer choices that do not exist for test-dev; this scorer reads only
`{tier}_questions.json` and the predictions and prints the same report. Validity and plausibility need those files, so
they read 0.00%, as in every published run without them. The number papers quote is Accuracy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.base import Benchmark, Score, register
from apet.eval.benchmarks.files import (
    PathLike,
    index_unique,
    read_json,
    read_jsonl,
    require_complete,
    require_keys,
    require_rows,
)
from apet.eval.metrics import exact_match, percent

_QUESTION_KEYS = ("question", "answer", "isBalanced", "types", "semantic", "groups")
_NOT_A_STEP = ("exist", "query: name", "choose name")


@register
class Gqa(Benchmark):
    """GQA test-dev balanced: 12,578 questions on 398 images in the published file."""

    name = "gqa"

    def submission(self, answers_file: PathLike) -> list[dict[str, Any]]:
        """Predictions in the official format: text without trailing dots, lower-cased, nothing else."""
        rows = read_jsonl(answers_file, ("question_id", "text"))
        return [{"questionId": row["question_id"], "prediction": row["text"].rstrip(".").lower()} for _, row in rows]

    def score(self, *, questions: PathLike, predictions: PathLike, duplicates: str = "error") -> Score:
        """Score predictions over the balanced questions of a tier.

        Args:
            questions: `{tier}_questions.json`, id -> question with answer, types, groups and semantic program.
            predictions: `[{"questionId", "prediction"}]`, or an answers file (`.jsonl`) to convert first.
            duplicates: "error", or "last" to let a later prediction for a question win.
        """
        balanced = _read_balanced(questions)
        if Path(predictions).suffix == ".jsonl":
            rows = self.submission(predictions)
        else:
            rows = require_rows(read_json(predictions), ("questionId", "prediction"), predictions)
        keyed = ((number, str(row["questionId"]), row) for number, row in enumerate(rows, start=1))
        found = index_unique(keyed, predictions, duplicates)
        # Questions outside the balanced set may be answered or not: they never score.
        require_complete(balanced, found, predictions, questions, exact=False)
        predicted = {key: found[key]["prediction"] for key in balanced}
        correct = {key: exact_match(predicted[key], row["answer"]) for key, row in balanced.items()}
        summary = _summary(balanced, correct, predicted)
        tables = {name: _by(balanced, correct, group) for name, group in _TABLES.items()}
        return Score(
            name=self.name,
            metric="accuracy",
            value=summary["Accuracy"],
            n_questions=len(balanced),
            details={"summary": summary, **tables},
            per_sample=correct,
            report=_report(summary, tables),
        )


def _read_balanced(path: PathLike) -> dict[str, dict[str, Any]]:
    questions = read_json(path)
    if not isinstance(questions, dict) or not questions:
        raise ValueError(f"{path}: expected a JSON object of question id -> question, with at least one question")
    for key, row in questions.items():
        require_keys(row, _QUESTION_KEYS, f"{path} question {key!r}")
        require_keys(row["types"], ("structural", "semantic"), f"{path} question {key!r} types")
    balanced = {key: row for key, row in questions.items() if row["isBalanced"]}
    if not balanced:
        raise ValueError(f"{path}: none of the {len(questions)} questions has isBalanced = true, and only those score")
    return balanced


def _steps(row: Mapping[str, Any]) -> int:
    operations = (f"{step['operation']}: {step['argument']}" for step in row["semantic"])
    return sum(not any(word in operation for word in _NOT_A_STEP) for operation in operations)


_TABLES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "structural type": lambda row: row["types"]["structural"],
    "semantic type": lambda row: row["types"]["semantic"],
    "steps number": _steps,
    "words number": lambda row: len(row["question"].split()),
}


def _by(balanced: Mapping[str, Any], correct: Mapping[str, float], group: Callable) -> dict[str, dict[str, float]]:
    """Accuracy and count per group, groups sorted by their own type (numbers as numbers)."""
    members: dict[Any, list[float]] = defaultdict(list)
    for key, row in balanced.items():
        members[group(row)].append(correct[key])
    return {str(k): {"accuracy": percent(members[k]), "questions": len(members[k])} for k in sorted(members)}


def _summary(balanced: Mapping[str, Any], correct: Mapping[str, float], predicted: Mapping[str, str]) -> dict[str, Any]:
    is_open = {key: row["types"]["structural"] == "query" for key, row in balanced.items()}
    return {
        "Binary": percent(correct[key] for key in balanced if not is_open[key]),
        "Open": percent(correct[key] for key in balanced if is_open[key]),
        "Accuracy": percent(correct.values()),
        "Validity": 0.0,
        "Plausibility": 0.0,
        "Distribution": _distribution(balanced, predicted),
    }


def _distribution(balanced: Mapping[str, Any], predicted: Mapping[str, str]) -> float | None:
    """Chi-square of predicted against gold answers per global group, weighted by group size, over 100.

    None when no question has a global group (the official script divides by zero there).
    """
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for key, row in balanced.items():
        if (group := row["groups"].get("global")) is not None:
            gold[group][row["answer"]] += 1
            given[group][predicted[key]] += 1
    total = sum(counts.total() for counts in gold.values())
    if not total:
        return None
    weighted = sum(
        sum((given[group][answer] - expected) ** 2 / expected for answer, expected in counts.items()) * counts.total()
        for group, counts in gold.items()
    )
    return weighted / total / 100


def _report(summary: Mapping[str, Any], tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    lines = [""]
    for name, value in summary.items():
        if value is None:
            lines.append(f"{name}: n/a (no question of this kind)")
        elif name == "Distribution":
            lines.append(f"{name}: {value:.2f} (lower is better)")
        else:
            lines.append(f"{name}: {value:.2f}%")
    for name, table in tables.items():
        lines += ["", f"Accuracy / {name}:"]
        lines += [
            f"  {group}: {cell['accuracy']:.2f}% ({cell['questions']} questions)" for group, cell in table.items()
        ]
    return "\n".join(lines) + "\n"
