"""Open-ended questions about videos with one short answer each: MSVD-QA, MSRVTT-QA, TGIF-QA and ActivityNet-QA.

Files as the Video-ChatGPT evaluation published them: `test_q.json`, a list of objects with video_name, question and
question_id, and `test_a.json`, a list with the answers, joined by question_id where it has them and by place otherwise.
An answer line holds id, question, answer and pred, so that it can be scored alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

from apet.eval.benchmarks.base import Benchmark, Question, Score, register
from apet.eval.benchmarks.files import (
    PathLike,
    index_unique,
    iterate_jsonl,
    read_json,
    record_path,
    require_keys,
    require_rows,
    require_types,
)
from apet.eval.metrics import exact_match, vqa_normalize

LINE_KEYS = ("id", "question", "answer", "pred")


class VideoQa(Benchmark):
    """The common format; subclasses say how video files are named.

    Attributes:
        prefix: In front of a video_name in the name of its file.
    """

    prefix: ClassVar[str] = ""
    key_names = ("id", "question")

    def read(self, question_file: PathLike, answer_file: PathLike) -> list[Question]:
        """Questions with their answers.

        Raises:
            ValueError: Broken files, a repeated question id, or answers that do not fit the questions.
        """
        asked = require_rows(read_json(question_file), ("video_name", "question", "question_id"), question_file)
        types = {"video_name": (str,), "question": (str,), "question_id": (int, str)}
        for number, row in enumerate(asked, start=1):
            require_types(row, types, f"{question_file} entry {number}")
        answers = _answers(answer_file, [row["question_id"] for row in asked], question_file)
        seen: dict[str, int] = {}
        for number, row in enumerate(asked, start=1):
            if seen.setdefault(str(row["question_id"]), number) != number:
                raise ValueError(
                    f"{question_file} entry {number}: question_id {row['question_id']!r} is already that of entry "
                    f"{seen[str(row['question_id'])]}; remove one of the two"
                )
        return [
            Question(
                row["question_id"], text=row["question"], prompt=row["question"],
                video=self.prefix + row["video_name"], fields={"answer": answer},
            )
            for row, answer in zip(asked, answers, strict=True)
        ]  # fmt: skip

    def answer_line(self, question: Question, answer: str, *, answer_id: str, model_id: str) -> dict[str, Any]:
        """The published line; it has no place for who answered, which the run record says."""
        return {
            "id": question.question_id, "question": question.text, "answer": question.fields["answer"], "pred": answer,
        }  # fmt: skip

    def score(self, *, pred_path: PathLike) -> Score:
        """Share of predictions whose normal form is that of the answer (EvalAI's rules for VQA).

        Strict: a sentence that contains the answer does not count, it is in `details` as `contains`. Published numbers
        for long answers come from a judge (`apet.eval.judge`).

        Raises:
            ValueError: A broken, empty or incomplete file.
        """
        rows, failures = read_predictions(pred_path)
        pairs = {key: (vqa_normalize(row["pred"]), vqa_normalize(row["answer"])) for key, row in rows.items()}
        right = {key: exact_match(pred, answer) for key, (pred, answer) in pairs.items()}
        contained = sum(f" {answer} " in f" {pred} " for pred, answer in pairs.values())
        raw = sum(exact_match(row["pred"], row["answer"]) for row in rows.values())
        value = 100 * sum(right.values()) / len(rows)
        details = {
            "exact_match": 100 * raw / len(rows), "contains": 100 * contained / len(rows), "unanswered": failures,
        }  # fmt: skip
        report = (
            f"Samples: {len(rows)}\nNormalised accuracy: {value:.2f}%\nExact match: {details['exact_match']:.2f}%\n"
            f"Answer contained in prediction: {details['contains']:.2f}%\n{unanswered_line(failures)}"
        )
        return Score(self.name, "normalised accuracy", value, len(rows), details, right, report)


@register
class MsvdQa(VideoQa):
    """MSVD-QA test: 13,157 questions."""

    name = "msvd"


@register
class MsrvttQa(VideoQa):
    """MSRVTT-QA test: 72,821 questions."""

    name = "msrvtt"


@register
class TgifQa(VideoQa):
    """TGIF-QA, the questions of its test split about a single frame."""

    name = "tgif"


@register
class ActivityNetQa(VideoQa):
    """ActivityNet-QA test: 8,000 questions; the video of `x` is `v_x`."""

    name = "activitynet"
    prefix = "v_"


def read_predictions(path: PathLike) -> tuple[dict[str, dict[str, Any]], int]:
    """Answer lines by id, and how many questions have none because their video cannot be read.

    Raises:
        ValueError: A broken line, a repeated id, no line at all, or a run that is not complete.
    """
    lines = []
    for number, row in iterate_jsonl(path):
        require_keys(row, LINE_KEYS, f"{path} line {number}")
        lines.append((number, str(row["id"]), row))
    rows = index_unique(lines, path)
    if not rows:
        raise ValueError(f"{path} holds no answers; run llava.eval.video_qa first")
    beside = record_path(path)
    if not beside.is_file():
        return rows, 0
    record = read_json(beside)
    failures = len(record["failures"])
    if record["status"] != "complete" or len(rows) + failures != record["questions"]:
        raise ValueError(
            f"{path} has {len(rows)} of {record['questions']} answers (status {record['status']}); run the questions "
            "again with --resume before they are scored"
        )
    return rows, failures


def unanswered_line(failures: int) -> str:
    """What a report says about questions without an answer."""
    return f"Not counted: {failures} questions whose video cannot be read\n" if failures else ""


def _answers(path: PathLike, ids: list[Any], question_file: PathLike) -> list[str]:
    """One answer per question, in the order of the questions."""
    rows = require_rows(read_json(path), ("answer",), path)
    answered = [row.get("question_id") for row in rows]
    if None in answered and any(one is not None for one in answered):
        raise ValueError(
            f"{path} entry {answered.index(None) + 1} has no question_id, while others have one; give all answers an "
            "id, or none"
        )
    if None not in answered:
        by_id = {}
        for number, row in enumerate(rows, start=1):
            if by_id.setdefault(str(row["question_id"]), row["answer"]) != row["answer"]:
                raise ValueError(
                    f"{path} entry {number}: another answer for question_id {row['question_id']!r}; remove one of them"
                )
        missing = [key for key in ids if str(key) not in by_id]
        if missing:
            raise ValueError(
                f"{path} has no answer to {len(missing)} questions of {question_file}, the first is {missing[0]!r}"
            )
        return [str(by_id[str(key)]) for key in ids]
    if len(rows) != len(ids):
        raise ValueError(
            f"{path} has {len(rows)} answers without question_id for the {len(ids)} questions of {question_file}; "
            "without ids they are paired by place, so there must be as many"
        )
    return [str(row["answer"]) for row in rows]
