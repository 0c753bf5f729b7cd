"""What a benchmark is: how its questions are read, its answers written, and its answers scored; and the registry.

A benchmark file defines one `Benchmark` subclass and registers it. The runner calls `read` and `answer_line`, the
command lines call `score` or `submission`; neither needs to know which benchmark it serves.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from apet.eval.benchmarks.files import PathLike, read_jsonl, require_types, write_json_atomic

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question as the model is asked it and as its answer line records it.

    Attributes:
        question_id: The file's id (int or string, kept as it is).
        text: Saved under "prompt" in the answer line.
        prompt: Asked after the image token; usually equal to `text`.
        image: Path below the image folder, or None.
        image_base64: The encoded image itself, for files that carry their images.
        video: Path of a video below the folder, with or without its extension, or None.
        fields: Further keys of the answer line, in the order in which the line has them.
        occurrence: How many questions of the file have this id and stand before; the runner counts.
    """

    question_id: int | str
    text: str
    prompt: str
    image: str | None = None
    image_base64: str | None = None
    video: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)
    occurrence: int = 0


@dataclass(frozen=True)
class Score:
    """The result of scoring one answers file.

    Attributes:
        name: The benchmark.
        metric: What the headline number is, e.g. "mean F1".
        value: The headline number as papers quote it: percentages on 0..100, MME in points.
        n_questions: Questions scored.
        details: The other numbers, JSON types only.
        per_sample: Question id -> correctness in 0..1, for paired comparison of two runs.
        report: The text the command line prints, line ends included.
    """

    name: str
    metric: str
    value: float
    n_questions: int
    details: Mapping[str, Any]
    per_sample: Mapping[str, float]
    report: str

    def write(self, path: PathLike) -> None:
        """Write everything but the report as JSON, whole or not at all."""
        keys = ("name", "metric", "value", "n_questions", "details", "per_sample")
        write_json_atomic(path, {key: getattr(self, key) for key in keys}, indent=1)


@dataclass(frozen=True)
class Submission:
    """A server's upload, and what its converter says about it.

    Attributes:
        rows: What the server takes.
        report: The text the converter prints, line end included.
        note: What else the user should know; empty if nothing.
    """

    rows: list[dict[str, Any]]
    report: str
    note: str = ""

    def write(self, path: PathLike) -> None:
        """Write the rows as one JSON list, whole or not at all."""
        write_json_atomic(path, self.rows)


class Benchmark:
    """Base class: the JSON-lines question format most benchmarks share. Subclasses override what differs."""

    name: ClassVar[str]
    # Keys of Question.fields that stand before "prompt" in the answer line; all others follow "text".
    leading_fields: ClassVar[tuple[str, ...]] = ()
    # Where the answer line has a question's id and its text.
    key_names: ClassVar[tuple[str, str]] = ("question_id", "prompt")

    def read(self, question_file: PathLike) -> list[Question]:
        """Read JSON lines with `question_id`, `image` (path below the image folder) and `text`.

        Ids may repeat (TextVQA's are image ids), pairs of id and text may not: resuming and scoring go by them.

        Raises:
            ValueError: A broken line, a missing key, a repeated question or an empty file, with file and line.
        """
        questions: list[Question] = []
        lines: dict[tuple[int | str, str], int] = {}
        for number, row in read_jsonl(question_file, ("question_id", "image", "text")):
            where = f"{question_file} line {number}"
            question = self.question(row, where)
            key = (question.question_id, question.text)
            if key in lines:
                raise ValueError(
                    f"{where}: question_id {key[0]!r} with the same text is already on line {lines[key]}; "
                    "remove one of the two lines"
                )
            lines[key] = number
            questions.append(question)
        return questions

    def question(self, row: Mapping[str, Any], where: str) -> Question:
        """The question of one line; `where` names file and line for errors."""
        require_types(row, {"question_id": (int, str), "image": (str,)}, where)
        return Question(row["question_id"], text=row["text"], prompt=row["text"], image=row["image"])

    def answer_line(self, question: Question, answer: str, *, answer_id: str, model_id: str) -> dict[str, Any]:
        """The answer line as a dict whose key order is the published one."""
        leading = {key: question.fields[key] for key in self.leading_fields}
        trailing = {key: value for key, value in question.fields.items() if key not in leading}
        line = {"question_id": question.question_id, **leading, "prompt": question.text, "text": answer, **trailing}
        return {**line, "answer_id": answer_id, "model_id": model_id, "metadata": {}}

    def score(self, **files: Any) -> Score:
        """Score an answers file; each benchmark names the files it needs."""
        raise ValueError(f"{self.name} has no local scorer; local scores exist for {', '.join(scored_benchmarks())}")


_REGISTRY: dict[str, type[Benchmark]] = {}


def register(benchmark: type[Benchmark]) -> type[Benchmark]:
    """Class decorator: make a benchmark known under its lower-case `name`."""
    if benchmark.name != benchmark.name.lower() or benchmark.name in _REGISTRY:
        raise ValueError(f"benchmark name {benchmark.name!r} must be lower-case and not taken")
    _REGISTRY[benchmark.name] = benchmark
    return benchmark


def available_benchmarks() -> list[str]:
    """Registered names, sorted."""
    return sorted(_REGISTRY)


def scored_benchmarks() -> list[str]:
    """Names of the benchmarks with a local scorer, sorted."""
    return [name for name in available_benchmarks() if _REGISTRY[name].score is not Benchmark.score]


def get_benchmark(name: str) -> Benchmark:
    """The benchmark registered under `name`; ValueError with the nearest and all known names otherwise."""
    benchmark = _REGISTRY.get(name.lower())
    if benchmark is None:
        nearest = difflib.get_close_matches(name.lower(), _REGISTRY, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ValueError(f"unknown benchmark {name!r}{hint}; available: {', '.join(available_benchmarks())}")
    return benchmark()


@register
class PlainVqa(Benchmark):
    """Any question file in the common format, without a scorer."""

    name = "vqa"
