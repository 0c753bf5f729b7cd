"""POPE: "Is there a X in the image?", yes or no, in three splits (random, popular, adversarial).

Answers are joined to labels by image and question, never by position: one missing answer shifts every later label.
The number papers quote is the mean of the three F1 scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.base import Benchmark, Score, register
from apet.eval.benchmarks.files import PathLike, listing, read_answers, read_jsonl, require_complete, user_path
from apet.eval.metrics import BinaryCounts, pope_yes_no

SPLITS = ("random", "popular", "adversarial")
_LABEL_FILE = re.compile(r"coco_pope_(\w+)\.json")


@register
class Pope(Benchmark):
    """POPE on COCO val2014: 3,000 questions per split, 2,910 in the random split of August 2023."""

    name = "pope"

    def score(
        self, *, annotation_dir: PathLike, question_file: PathLike, result_file: PathLike, duplicates: str = "error"
    ) -> Score:
        """Score an answers file against the label files of `annotation_dir`.

        Args:
            annotation_dir: Folder with `coco_pope_{split}.json`, JSON lines of image, text, label; others are ignored.
            question_file: JSON lines of question_id, image, text, category (the split).
            result_file: The answers file; it must answer every question once.
            duplicates: "error", or "last" to let a later answer to a question win.
        """
        questions = _read_questions(question_file)
        answers = read_answers(result_file, duplicates)
        asked = {key: row for rows in questions.values() for key, row in rows.items()}
        require_complete(asked, answers, result_file, question_file)
        labels = _read_labels(annotation_dir, question_file, questions)
        splits = [*SPLITS, *sorted(set(questions) - set(SPLITS))]
        results: dict[str, BinaryCounts] = {}
        per_sample: dict[str, float] = {}
        notes: list[str] = []
        for split in (split for split in splits if split in questions):
            truth = _join(questions[split], labels[split], question_file, notes)
            given = {key: pope_yes_no(answers[key]["text"]) == "yes" for key in truth}
            results[split] = BinaryCounts.of(list(given.values()), list(truth.values()))
            per_sample |= {key: float(given[key] == truth[key]) for key in truth}
            if not any(given.values()):
                notes.append(f"{split}: no answer reads as yes, so precision and F1 are 0 by definition")
        return _score(self.name, results, per_sample, notes)


def _read_questions(path: PathLike) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Split -> question id -> row."""
    questions: dict[str, dict[str, Mapping[str, Any]]] = {}
    seen: dict[str, int] = {}
    for number, row in read_jsonl(path, ("question_id", "image", "text", "category")):
        key = str(row["question_id"])
        if key in seen:
            raise ValueError(f"{path} line {number}: question_id {key!r} is already on line {seen[key]}")
        seen[key] = number
        questions.setdefault(row["category"], {})[key] = row
    return questions


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    """What joins a question to its label: image and first line; older files say "imange" after "an"."""
    return row["image"], " ".join(row["text"].split("\n")[0].replace("imange", "image").split())


def _read_labels(
    folder: PathLike, question_file: PathLike, splits: Mapping[str, Any]
) -> dict[str, tuple[Path, dict[tuple[str, str], bool]]]:
    """Split -> (label file, (image, question) -> is the answer yes); one file per split of the questions, no more."""
    files = {match[1]: path for path in sorted(user_path(folder).iterdir())
             if (match := _LABEL_FILE.fullmatch(path.name))}  # fmt: skip
    if set(files) != set(splits):
        raise ValueError(
            f"{folder} has label files coco_pope_*.json for the splits {listing(sorted(files)) or 'none'}, but the "
            f"questions of {question_file} are of {listing(sorted(splits))}; both must have the same splits"
        )
    return {split: (path, _read_label_file(path)) for split, path in files.items()}


def _read_label_file(path: Path) -> dict[tuple[str, str], bool]:
    labels: dict[tuple[str, str], bool] = {}
    for number, row in read_jsonl(path, ("image", "text", "label")):
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"{path} line {number}: label {row['label']!r} is neither 'yes' nor 'no'")
        label = row["label"] == "yes"
        if labels.setdefault(_key(row), label) != label:
            raise ValueError(f"{path} line {number}: the same image and question carries both labels: {_key(row)}")
    return labels


def _join(
    rows: Mapping[str, Mapping[str, Any]],
    labelled: tuple[Path, Mapping[tuple[str, str], bool]],
    question_file: PathLike,
    notes: list[str],
) -> dict[str, bool]:
    """Question id -> true label; adds a note when labels are left without a question (a 3,000-line random file)."""
    path, labels = labelled
    missing = [key for key, row in rows.items() if _key(row) not in labels]
    if missing:
        raise ValueError(
            f"{path} has no label for {len(missing)} of {len(rows)} questions of {question_file}: {listing(missing)}; "
            "the two files are of different POPE versions"
        )
    unasked = len(labels) - len({_key(row) for row in rows.values()})
    if unasked:
        notes.append(
            f"{path.name}: {unasked} of {len(labels)} labels have no question in the question file, not scored"
        )
    return {key: labels[_key(row)] for key, row in rows.items()}


def _score(name: str, results: Mapping[str, BinaryCounts], per_sample: Mapping[str, float], notes: list[str]) -> Score:
    # fsum: the mean must not depend on the order of the splits, not even in the last bit
    mean_f1 = math.fsum(counts.f1 for counts in results.values()) / len(results)
    mean_accuracy = math.fsum(counts.accuracy for counts in results.values()) / len(results)
    absent = [split for split in SPLITS if split not in results]
    if absent:
        notes = [*notes, f"not in the question file and not in the mean: {', '.join(absent)}"]
    blocks = "".join(_block(split, counts) for split, counts in results.items())
    mean = f"Mean of {', '.join(results)}: F1 {100 * mean_f1:.2f}, accuracy {100 * mean_accuracy:.2f}\n"
    details = {split: _numbers(counts) for split, counts in results.items()}
    return Score(
        name=name,
        metric="mean F1",
        value=100 * mean_f1,
        n_questions=len(per_sample),
        details={"splits": details, "mean_F1": mean_f1, "mean_accuracy": mean_accuracy, "notes": notes},
        per_sample=per_sample,
        report=blocks + "".join(f"Note: {note}\n" for note in notes) + mean,
    )


def _numbers(counts: BinaryCounts) -> dict[str, Any]:
    return {
        "samples": counts.total,
        "TP_FP_TN_FN": [counts.tp, counts.fp, counts.tn, counts.fn],
        "Accuracy": counts.accuracy,
        "Precision": counts.precision,
        "Recall": counts.recall,
        "F1 score": counts.f1,
        "Yes ratio": counts.yes_ratio,
    }


def _block(split: str, counts: BinaryCounts) -> str:
    numbers = _numbers(counts)
    ratios = {key: numbers[key] for key in ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")}
    short = (counts.f1, counts.accuracy, counts.precision, counts.recall, counts.yes_ratio)
    return "\n".join(
        [
            f"Category: {split}, # samples: {counts.total}",
            "TP\tFP\tTN\tFN\t",
            "\t".join(map(str, numbers["TP_FP_TN_FN"])),
            *(f"{key}: {value}" for key, value in ratios.items()),
            ", ".join(f"{value:.3f}" for value in short),
            "====================================\n",
        ]
    )
