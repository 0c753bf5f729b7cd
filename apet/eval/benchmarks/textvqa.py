"""TextVQA: questions about text in the picture, scored by VQA soft accuracy over ten human answers.

The question file's ids are image ids and not unique, so an answer finds its annotation by image id and by the question
recovered from the saved prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.base import Benchmark, Question, Score, register
from apet.eval.benchmarks.files import PathLike, index_unique, read_json, read_jsonl, require_complete, require_rows
from apet.eval.metrics import soft_accuracy, vqa_normalize

_OCR_HINT = "Reference OCR token: "
_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_ANSWERS_PER_QUESTION = 10


@register
class TextVqa(Benchmark):
    """TextVQA 0.5.1 val: 5,000 questions on 3,166 images."""

    name = "textvqa"

    def read(self, question_file: PathLike, ocr: bool = True) -> list[Question]:
        """Read the question file; `ocr=False` drops the "Reference OCR token" line.

        LLaVA-1.5 numbers are with those tokens, LLaVA-1.6 numbers without.
        """
        questions = super().read(question_file)
        return questions if ocr else [_without_ocr(question) for question in questions]

    def score(self, *, annotation_file: PathLike, result_file: PathLike, duplicates: str = "error") -> Score:
        """Score an answers file.

        Args:
            annotation_file: `{"data": [{"image_id", "question_id", "question", "answers": [10 strings]}]}`.
            result_file: The answers file; `question_id` is the image id (or the annotation's question id).
            duplicates: "error", or "last" to let a later answer to a question win.
        """
        annotations = _read_annotations(annotation_file)
        answers = _read_answers(result_file, annotations, duplicates)
        require_complete(annotations, answers, result_file, annotation_file)
        per_sample = {
            str(row["question_id"]): soft_accuracy(
                vqa_normalize(answers[key]["text"]), [vqa_normalize(truth) for truth in row["answers"]]
            )
            for key, row in annotations.items()
        }
        accuracy = sum(per_sample.values()) / len(per_sample)
        return Score(
            name=self.name,
            metric="accuracy",
            value=100 * accuracy,
            n_questions=len(per_sample),
            details={"accuracy": accuracy},
            per_sample=per_sample,
            report=f"{Path(result_file).stem}\nSamples: {len(per_sample)}\nAccuracy: {100 * accuracy:.2f}%\n\n",
        )


def _without_ocr(question: Question) -> Question:
    text = "\n".join(line for line in question.text.split("\n") if not line.startswith(_OCR_HINT.rstrip()))
    return replace(question, text=text, prompt=text)


def question_of_prompt(prompt: str) -> str:
    """The lower-cased question inside a saved prompt.

    Known prompts: `OCR tokens: ... Question: q Short answer:`; three lines with a "Reference OCR token: " line before
    or after the question; question and instruction on two lines.

    Raises:
        ValueError: The prompt has none of these shapes.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = _OLD_PROMPT.search(prompt)
        question = match[1] if match else None
    elif _OCR_HINT in prompt and len(lines) == 3:
        question = lines[1] if prompt.startswith(_OCR_HINT) else lines[0]
    else:
        question = lines[0] if len(lines) == 2 else None
    if question is None:
        raise ValueError(
            f"cannot find the question in the prompt {prompt!r}: expected question and instruction on two lines, "
            f'a third "{_OCR_HINT}" line, or "OCR tokens: ... Question: ... Short answer:"'
        )
    return question.lower()


def _key(owner: object, question: str, occurrence: int) -> str:
    """Image id (or question id) and question; `occurrence` tells apart a question asked twice of one image."""
    return f"{owner} | {question}" + (f" #{occurrence + 1}" if occurrence else "")


def _read_annotations(path: PathLike) -> dict[str, dict[str, Any]]:
    """Annotations by `_key` of image id and question, in file order."""
    rows = require_rows(read_json(path), ("image_id", "question_id", "question", "answers"), path, "data")
    annotations: dict[str, dict[str, Any]] = {}
    asked: Counter[tuple[object, str]] = Counter()
    ids: set[object] = set()
    for number, row in enumerate(rows, start=1):
        where = f"{path} entry {number}"
        if len(row["answers"]) != _ANSWERS_PER_QUESTION:
            raise ValueError(
                f"{where}: {len(row['answers'])} answers, TextVQA has {_ANSWERS_PER_QUESTION} per question"
            )
        if row["question_id"] in ids:
            raise ValueError(f"{where}: question_id {row['question_id']!r} is there twice")
        ids.add(row["question_id"])
        pair = (row["image_id"], row["question"].lower())
        annotations[_key(*pair, asked[pair])] = row
        asked[pair] += 1
    return annotations


def _read_answers(path: PathLike, annotations: Mapping[str, Mapping[str, Any]], duplicates: str) -> dict[str, Any]:
    """Answer lines by the key of their annotation, or by a key no annotation has."""
    # Some tools save the annotation's question id where LLaVA saves the image id: accept both.
    asked: Counter[tuple[str, str]] = Counter()
    image_of: dict[tuple[str, str], str] = {}
    for row in annotations.values():
        question = row["question"].lower()
        asked[str(row["image_id"]), question] += 1
        image_of[str(row["question_id"]), question] = str(row["image_id"])
    seen: Counter[tuple[str, str]] = Counter()
    keyed = []
    for number, row in read_jsonl(path, ("question_id", "prompt", "text")):
        try:
            question = question_of_prompt(row["prompt"])
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
        pair = (str(row["question_id"]), question)
        if pair not in asked:
            pair = (image_of.get(pair, pair[0]), question)
        keyed.append((number, _key(*pair, seen[pair] % max(asked[pair], 1)), row))
        seen[pair] += 1
    return index_unique(keyed, path, duplicates)
