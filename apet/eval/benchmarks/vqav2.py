"""VQAv2: the test answers are with the server; annotated splits (val) are scored here with the official rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.base import Benchmark, Score, Submission, register
from apet.eval.benchmarks.files import (
    LooseAnswers,
    PathLike,
    index_annotations,
    index_unique,
    read_answers,
    read_json,
    read_jsonl,
    require_complete,
    require_rows,
    user_path,
)
from apet.eval.metrics import percent, soft_accuracy, vqa_normalize, vqa_process_digit_article, vqa_process_punctuation

FULL_TEST = "llava_vqav2_mscoco_test2015.jsonl"
_BREAKDOWNS = {"perQuestionType": "question_type", "perAnswerType": "answer_type"}


@register
class VqaV2(Benchmark):
    """VQAv2 test-dev: 107,394 questions of the 447,793 in test2015."""

    name = "vqav2"

    def submission(self, *, folder: PathLike, ckpt: str, split: str) -> Submission:
        """The upload: `[{"question_id", "answer"}]` for the whole of test2015, "" where nothing was asked.

        Reads `answers/{split}/{ckpt}/merge.jsonl` and the full question list in `folder`. If `{split}.jsonl` is there
        too, each of its questions must be answered: a lost chunk would otherwise go in as empty answers, in silence.
        """
        folder = user_path(folder)
        result_file = folder / "answers" / split / ckpt / "merge.jsonl"
        answers = LooseAnswers.read(result_file)
        full = _ids(folder / FULL_TEST)
        split_file = folder / f"{split}.jsonl"
        if split_file.is_file():
            require_complete(_ids(split_file), answers.by_id, result_file, split_file, exact=False)
        empty = [key for key in full if key not in answers.by_id]
        if len(empty) == len(full):
            require_complete(full, answers.by_id, result_file, folder / FULL_TEST)
        rows = [
            {"question_id": number, "answer": vqa_normalize(answers.by_id[key]["text"]) if key in answers.by_id else ""}
            for key, number in full.items()
        ]
        notes = answers.notes()
        if empty:
            unchecked = "" if split_file.is_file() else f" ({split_file} is not there to tell whether that is right)"
            notes.append(f"{len(empty)} of {len(full)} questions have no answer and go in empty{unchecked}")
        return Submission(rows, answers.report(len(full)), "; ".join(notes))

    def score(self, *, annotation_file: PathLike, result_file: PathLike, duplicates: str = "error") -> Score:
        """Official VQA accuracy over an annotated split.

        Args:
            annotation_file: `{"annotations": [{"question_id", "question_type", "answer_type", "answers"}]}`.
            result_file: The answers file (`.jsonl`), or an upload file (`[{"question_id", "answer"}]`).
            duplicates: "error", or "last" to let a later answer to a question win.
        """
        keys = ("question_id", "question_type", "answer_type", "answers")
        annotations = index_annotations(read_json(annotation_file), keys, annotation_file, "annotations")
        predicted = _read_predictions(result_file, duplicates)
        require_complete(annotations, predicted, result_file, annotation_file)
        per_sample = {key: _accuracy(predicted[key], row["answers"]) for key, row in annotations.items()}
        overall = round(percent(per_sample.values()), 2)
        details: dict[str, Any] = {"overall": overall}
        for name, column in _BREAKDOWNS.items():
            groups = defaultdict(list)
            for key, row in annotations.items():
                groups[row[column]].append(per_sample[key])
            details[name] = {group: round(percent(values), 2) for group, values in groups.items()}
        return Score(
            name=self.name,
            metric="accuracy",
            value=overall,
            n_questions=len(per_sample),
            details=details,
            per_sample=per_sample,
            report=_report(details, len(per_sample)),
        )


def _ids(path: Path) -> dict[str, Any]:
    return {str(row["question_id"]): row["question_id"] for _, row in read_jsonl(path, ("question_id",))}


def _read_predictions(path: PathLike, duplicates: str) -> dict[str, str]:
    if Path(path).suffix == ".jsonl":
        return {key: row["text"] for key, row in read_answers(path, duplicates).items()}
    rows = require_rows(read_json(path), ("question_id", "answer"), path)
    keyed = ((number, str(row["question_id"]), row) for number, row in enumerate(rows, start=1))
    return {key: row["answer"] for key, row in index_unique(keyed, path, duplicates).items()}


def _accuracy(prediction: str, answers: Iterable[Mapping[str, str]]) -> float:
    """Soft accuracy; both sides are normalised only if the annotators disagree (the official rule)."""
    texts = [prediction, *(answer["answer"] for answer in answers)]
    texts = [text.replace("\n", " ").replace("\t", " ").strip() for text in texts]
    if len(set(texts[1:])) > 1:
        texts = [vqa_process_digit_article(vqa_process_punctuation(text)) for text in texts]
    return soft_accuracy(texts[0], texts[1:])


def _report(details: Mapping[str, Any], n_questions: int) -> str:
    lines = [f"Overall accuracy: {details['overall']:.2f}% ({n_questions} questions)"]
    for name, title in (("perAnswerType", "answer type"), ("perQuestionType", "question type")):
        lines += ["", f"Accuracy / {title}:"]
        lines += [f"  {group}: {value:.2f}%" for group, value in sorted(details[name].items())]
    return "\n".join(lines) + "\n"
