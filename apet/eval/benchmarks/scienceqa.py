"""ScienceQA: multiple choice on school science, with and without a picture.

The number papers quote is the accuracy over the questions with a picture (IMG-Accuracy); a question is one of them if
its saved prompt contains `<image>`, so that marker is part of the answers file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apet.eval.benchmarks.base import OPTION_LETTER, Benchmark, Question, Score, register
from apet.eval.benchmarks.files import (
    PathLike,
    listing,
    read_answers,
    read_json,
    require_complete,
    require_keys,
    require_types,
    user_path,
    write_json_atomic,
)
from apet.eval.metrics import scienceqa_letter

OPTIONS = ("A", "B", "C", "D", "E")
MISSING_RULES = ("error", "wrong")
_FAILED = "FAILED"


@dataclass(frozen=True)
class Record:
    """What one answer was read as.

    Attributes:
        parsed: The letter, or "FAILED".
        truth: The right letter.
        prompt: The saved prompt; "Unknown" without an answer.
        text: The answer; "FAILED" without one.
        index: Position of the letter among the problem's choices, -1 for none of them.
        unanswered: There was no answer line.
    """

    parsed: str
    truth: str
    prompt: str
    text: str
    index: int
    unanswered: bool

    @property
    def correct(self) -> bool:
        return self.index >= 0 and self.parsed == self.truth

    @property
    def is_multimodal(self) -> bool:
        return "<image>" in self.prompt

    def published(self, question_id: str) -> dict[str, Any]:
        """The record as the published analysis file has it."""
        return {
            "question_id": question_id,
            "parsed_ans": self.parsed,
            "ground_truth": self.truth,
            "question": self.prompt,
            "pred": self.text,
            "is_multimodal": self.is_multimodal,
        }


@register
class ScienceQa(Benchmark):
    """ScienceQA test: 4,241 questions, 2,017 of them with a picture."""

    name = "scienceqa"

    def read(self, question_file: PathLike, single_pred_prompt: bool = False) -> list[Question]:
        """Read the JSON list of `{"id", "image"?, "conversations": [{"from", "value"}, ...]}`.

        Args:
            question_file: The list; `image` is `<id>/<file>`, or the bare file name.
            single_pred_prompt: Add the instruction to answer with a letter (asked and saved).
        """
        rows = read_json(question_file)
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{question_file}: expected a non-empty JSON list of questions")
        instruction = f"\n{OPTION_LETTER}" if single_pred_prompt else ""
        questions: dict[str, Question] = {}
        for number, row in enumerate(rows, start=1):
            where = f"{question_file} entry {number}"
            require_keys(row, ("id", "conversations"), where)
            require_types(row, {"id": (str, int), "conversations": (list,)}, where)
            if row.get("image") is not None:
                require_types(row, {"image": (str,)}, where)
            turn = row["conversations"][0] if row["conversations"] else None
            if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
                raise ValueError(f"{where}: conversations must start with a question under 'value'")
            if row["id"] in questions:
                raise ValueError(f"{where}: id {row['id']!r} is there twice")
            questions[row["id"]] = _question(row, instruction)
        return list(questions.values())

    def analyse(
        self,
        *,
        base_dir: PathLike,
        result_file: PathLike,
        split: str = "test",
        options: Sequence[str] = OPTIONS,
        missing: str = "error",
        duplicates: str = "error",
    ) -> dict[str, Record]:
        """What each answer says and whether that is right, by question id in the split's order.

        Args:
            base_dir: Folder with `problems.json` and `pid_splits.json`.
            result_file: The answers file; it may hold other splits' answers too.
            split: A key of `pid_splits.json`.
            options: The letters, in the order of a problem's choices.
            missing: What an unanswered question does: "error", or "wrong" to count it as a wrong answer, not as a
                picture question (what the published script does, in silence).
            duplicates: "error", or "last" to let a later answer to a question win.
        """
        if missing not in MISSING_RULES:
            raise ValueError(f"missing={missing!r} is not one of {', '.join(MISSING_RULES)}")
        problems = read_split(base_dir, split)
        answers = read_answers(result_file, duplicates)
        if missing == "error" or not any(key in answers for key in problems):
            require_complete(problems, answers, result_file, f"the {split} split of {base_dir}", exact=False)
        return {key: _record(row, answers.get(key), options) for key, row in problems.items()}

    def score(self, **files: Any) -> Score:
        """Score an answers file over one split; arguments as for `analyse`."""
        return score_records(self.analyse(**files))


def score_records(records: Mapping[str, Record]) -> Score:
    """Accuracy over all questions and over those with a picture."""
    correct = sum(record.correct for record in records.values())
    pictured = [record.correct for record in records.values() if record.is_multimodal]
    unanswered = [key for key, record in records.items() if record.unanswered]
    accuracy = 100 * correct / len(records)
    image_accuracy = 100 * sum(pictured) / len(pictured) if pictured else None
    of_images = "n/a (no question with an image)" if image_accuracy is None else f"{image_accuracy:.2f}%"
    report = f"Total: {len(records)}, Correct: {correct}, Accuracy: {accuracy:.2f}%, IMG-Accuracy: {of_images}\n"
    if unanswered:
        report += f"Note: {len(unanswered)} questions have no answer and count as wrong: {listing(unanswered)}\n"
    return Score(
        name=ScienceQa.name,
        metric="accuracy" if image_accuracy is None else "IMG-Accuracy",
        value=accuracy if image_accuracy is None else image_accuracy,
        n_questions=len(records),
        details={
            "accuracy": accuracy,
            "img_accuracy": image_accuracy,
            "correct": correct,
            "n_images": len(pictured),
            "unanswered": unanswered,
        },
        per_sample={key: float(record.correct) for key, record in records.items()},
        report=report,
    )


def _question(row: Mapping[str, Any], instruction: str) -> Question:
    prompt = row["conversations"][0]["value"].replace("<image>", "").strip() + instruction
    image = row.get("image")
    if image is None:
        return Question(row["id"], text=prompt, prompt=prompt)
    path = image if "/" in image else f"{row['id']}/{image}"
    return Question(row["id"], text=f"<image>\n{prompt}", prompt=prompt, image=path)


def read_split(base_dir: PathLike, split: str) -> dict[str, dict[str, Any]]:
    """Problems of a split by id, in the split's order.

    Raises:
        ValueError: An unknown or empty split, or an id that `problems.json` does not have.
    """
    folder = user_path(base_dir)
    splits = read_json(folder / "pid_splits.json")
    if split not in splits:
        raise ValueError(f"{folder / 'pid_splits.json'} has no split {split!r}; it has {listing(splits)}")
    problems = read_json(folder / "problems.json")
    unknown = [key for key in splits[split] if key not in problems]
    if unknown or not splits[split]:
        what = f"ids that problems.json does not have: {listing(unknown)}" if unknown else "no ids"
        raise ValueError(f"split {split!r} of {folder} has {what}")
    return {key: problems[key] for key in splits[split]}


def _record(problem: Mapping[str, Any], answer: Mapping[str, Any] | None, options: Sequence[str]) -> Record:
    text = answer["text"] if answer else _FAILED
    letter = scienceqa_letter(text, options)
    offered = list(options[: len(problem["choices"])])
    return Record(
        parsed=letter or _FAILED,
        truth=options[problem["answer"]],
        prompt=answer.get("prompt", "") if answer else "Unknown",
        text=text,
        index=offered.index(letter) if letter in offered else -1,
        unanswered=answer is None,
    )


def write_analysis(records: Mapping[str, Record], output_file: PathLike | None, output_result: PathLike | None) -> None:
    """Write the two files of the published script.

    Args:
        records: What `ScienceQa.analyse` returned.
        output_file: `{"correct": [...], "incorrect": [...]}` with one record per question.
        output_result: `{"acc", "correct", "count", "results": {id: index}, "outputs": {id: text}}`.
    """
    halves: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    for key, record in records.items():
        halves["correct" if record.correct else "incorrect"].append(record.published(key))
    if output_file:
        write_json_atomic(output_file, halves, indent=2)
    if output_result:
        result = {
            "acc": 100 * len(halves["correct"]) / len(records),
            "correct": len(halves["correct"]),
            "count": len(records),
            "results": {key: record.index for key, record in records.items()},
            "outputs": {key: record.text for key, record in records.items()},
        }
        write_json_atomic(output_result, result, indent=2)
