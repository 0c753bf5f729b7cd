"""Benchmarks as the comparison runs them: where their files are, their scorer, and what a score is made of.

With a limit, the first N questions and the annotations that belong to them are written to files of their own, so that
the scorers, which refuse partial answers, score exactly these questions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apet.compare.bootstrap import Outcome
from apet.eval.benchmarks import Question, Score, get_benchmark
from apet.eval.benchmarks.files import (
    iterate_jsonl,
    read_answers,
    read_json,
    user_path,
    write_json_atomic,
    write_jsonl_atomic,
    write_text_atomic,
)
from apet.eval.benchmarks.gqa import Gqa
from apet.eval.benchmarks.mme import GROUPS, RELEASE, Mme, truth_files, write_results
from apet.eval.benchmarks.pope import Pope
from apet.eval.benchmarks.textvqa import TextVqa, question_of_prompt
from apet.eval.data_check import find_data
from apet.eval.metrics import pope_yes_no


@dataclass(frozen=True)
class Task:
    """A benchmark, or its first questions, ready to be answered and scored.

    Attributes:
        name: The benchmark; with a limit "gqa-first100", which is also the folder of its runs.
        benchmark: Registered name.
        folder: Folder of the annotations.
        question_file: Questions.
        image_folder: Folder that image paths are relative to.
        questions: What the question file holds.
    """

    name: str
    benchmark: str
    folder: Path
    question_file: Path
    image_folder: Path
    questions: tuple[Question, ...]

    def score(self, answers: Path) -> Score:
        """Score an answers file."""
        return _SCORERS[self.benchmark](self, answers)

    def outcome(self, per_sample: Mapping[str, float], answers: Path) -> Outcome:
        """What the headline score is computed from, question by question."""
        if self.benchmark == "mme":
            return _mme_outcome(per_sample)
        ids = tuple(per_sample)
        correct = np.array([per_sample[key] for key in ids], dtype=float)
        shown = self._pictures()
        pictures = tuple(shown[key] for key in ids)
        if self.benchmark != "pope":
            return Outcome(ids, correct, pictures=pictures)
        said = {key: pope_yes_no(row["text"]) == "yes" for key, row in read_answers(answers).items()}
        splits = {str(row["question_id"]): row["category"] for _, row in iterate_jsonl(self.question_file)}
        names = sorted(set(splits.values()))
        # An answer is "yes" and right, or "no" and wrong: then the truth is "yes".
        truth = np.array([said[key] == (per_sample[key] > 0.5) for key in ids])
        strata = np.array([names.index(splits[key]) for key in ids])
        return Outcome(ids, correct, truth, strata, pictures=pictures)

    def _pictures(self) -> Mapping[str, str]:
        """The picture that each question of a score is about."""
        if self.benchmark == "textvqa":
            rows = read_json(self.folder / _TEXTVQA_ANSWERS)["data"]
            return {str(row["question_id"]): str(row["image_id"]) for row in rows}
        return {str(question.question_id): question.image for question in self.questions}


def open_task(benchmark: str, data: str, out: Path, limit: int | None) -> Task:
    """The benchmark's files below `data`; with `limit` its first questions, written below `out`.

    Raises:
        ValueError: A benchmark without a scorer here, or files that are not there.
    """
    if benchmark not in _SCORERS:
        raise ValueError(f"cannot compare on benchmark {benchmark!r}; available: {', '.join(_SCORERS)}")
    entry = find_data(benchmark)
    folder = user_path(data) / entry.folder
    question_file = folder / entry.files[0].path
    images = [folder / path for path in entry.images]
    for path in (question_file, next((path for path in images if path.is_dir()), images[0])):
        if not path.exists():
            raise ValueError(f"{benchmark}: {path} is not there; --data must name the folder data/README.md describes")
    image_folder = next(path for path in images if path.is_dir())
    questions = get_benchmark(benchmark).read(question_file)
    if limit is not None and benchmark == "mme":
        limit += limit % 2  # both questions of a picture, or none
    if limit is None or limit >= len(questions):
        return Task(benchmark, benchmark, folder, question_file, image_folder, tuple(questions))
    name = f"{benchmark}-first{limit}"
    subset = out / "questions" / name
    first = [row for _, row in iterate_jsonl(question_file)][:limit]
    write_jsonl_atomic(subset / question_file.name, first)
    _SUBSETS[benchmark](folder, subset, questions[:limit])
    return Task(name, benchmark, subset, subset / question_file.name, image_folder, tuple(questions[:limit]))


_GQA_ANSWERS = "testdev_balanced_questions.json"
_TEXTVQA_ANSWERS = "TextVQA_0.5.1_val.json"


def _gqa_subset(source: Path, target: Path, questions: list[Question]) -> None:
    rows = read_json(source / _GQA_ANSWERS)
    asked = [str(question.question_id) for question in questions]
    write_json_atomic(target / _GQA_ANSWERS, {key: rows[key] for key in asked if key in rows})


def _pope_subset(source: Path, target: Path, questions: list[Question]) -> None:
    ids = {str(question.question_id) for question in questions}
    rows = [row for path in target.glob("*.jsonl") for _, row in iterate_jsonl(path)]
    for split in {row["category"] for row in rows if str(row["question_id"]) in ids}:
        name = f"coco/coco_pope_{split}.json"
        write_text_atomic(target / name, (source / name).read_text(encoding="utf-8"))


def _textvqa_subset(source: Path, target: Path, questions: list[Question]) -> None:
    asked = {(str(question.question_id), question_of_prompt(question.text)) for question in questions}
    content = read_json(source / _TEXTVQA_ANSWERS)
    rows = [row for row in content["data"] if (str(row["image_id"]), row["question"].lower()) in asked]
    write_json_atomic(target / _TEXTVQA_ANSWERS, {**content, "data": rows})


def _mme_subset(source: Path, target: Path, questions: list[Question]) -> None:
    asked = {str(Path(str(question.question_id)).with_suffix("")) for question in questions}
    for category, path in truth_files(source / RELEASE):
        if f"{category}/{path.stem}" in asked:
            write_text_atomic(target / RELEASE / category / path.name, path.read_text(encoding="utf-8"))


def _mme_outcome(per_sample: Mapping[str, float]) -> Outcome:
    """Pictures of the Perception categories: the headline is Perception."""
    pictures: dict[str, list[float]] = {}
    for key, correct in per_sample.items():
        pictures.setdefault(key.partition(" | ")[0], []).append(correct)
    categories = {name: number for number, name in enumerate(GROUPS["Perception"])}
    kept = {key: both for key, both in pictures.items() if key.partition("/")[0] in categories}
    if not kept:
        raise ValueError("MME's headline is Perception, but none of the questions is of its ten categories")
    points = np.array([(first + second) / 2 + first * second for first, second in kept.values()])
    return Outcome(
        tuple(kept), points, strata=np.array([categories[key.partition("/")[0]] for key in kept]), summed=True
    )


def _score_mme(task: Task, answers: Path) -> Score:
    results = answers.parent / "results"
    write_results(task.folder / RELEASE, answers, results)
    return Mme().score(results_dir=results, present_only=True)


_SCORERS: dict[str, Callable[[Task, Path], Score]] = {
    "gqa": lambda task, answers: Gqa().score(questions=task.folder / _GQA_ANSWERS, predictions=answers),
    "mme": _score_mme,
    "pope": lambda task, answers: Pope().score(
        annotation_dir=task.folder / "coco", question_file=task.question_file, result_file=answers
    ),
    "textvqa": lambda task, answers: TextVqa().score(
        annotation_file=task.folder / _TEXTVQA_ANSWERS, result_file=answers
    ),
}
_SUBSETS: dict[str, Callable[[Path, Path, list[Question]], Any]] = {
    "gqa": _gqa_subset, "mme": _mme_subset, "pope": _pope_subset, "textvqa": _textvqa_subset,
}  # fmt: skip
