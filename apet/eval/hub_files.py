"""The files of a benchmark written from the rows of a data set: questions as they were published, labels, pictures.

A row is a mapping of the columns that `apet.eval.hub.SOURCES` names; a picture in it is {"bytes": ..., "path": ...}.
Ids are those of the rows where they have one, else their place.
"""

import base64
import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.base import SHORT_ANSWER
from apet.eval.benchmarks.files import replacing, write_json_atomic, write_jsonl_atomic
from apet.eval.benchmarks.scienceqa import OPTIONS

Row = Mapping[str, Any]
Rows = Iterable[Row]

_PLAIN = re.compile(r"[\w.-]+")
_YES_NO = "Please answer yes or no."
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


@dataclass(frozen=True)
class Target:
    """Where a benchmark's files go.

    Attributes:
        folder: The benchmark's folder.
        files: Its files, as `apet.eval.data_check.DATA` lists them.
        images: Folder of its pictures; the benchmark's own where the question file holds them.
    """

    folder: Path
    files: Sequence[Path]
    images: Path


class _Pictures:
    """A folder of pictures; one that several questions show is written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: set[str] = set()

    def add(self, name: str, row: Row, number: int) -> str:
        """Write the row's picture under `name`, a path below the folder; returns the name."""
        if name not in self._written:
            data = _bytes(row, number)
            with replacing(self._folder / name) as temporary:
                temporary.write_bytes(data)
            self._written.add(name)
        return name


def write_pope(target: Target, rows: Rows) -> None:
    """Questions of all splits in one file, labels split by split."""
    pictures, questions, labels = _Pictures(target.images), [], defaultdict(list)
    for number, row in enumerate(rows, start=1):
        picture = pictures.add(_name(row, "image_source", number) + ".jpg", row, number)
        question, split = _text(row, "question", number).strip(), _name(row, "category", number).lower()
        label = _yes_or_no(row, number)
        questions.append(_question(number, picture, question + SHORT_ANSWER, split))
        labels[split].append({"question_id": number, "image": picture, "text": question, "label": label})
    write_jsonl_atomic(target.files[0], questions)
    for split, lines in labels.items():
        write_jsonl_atomic(target.folder / "coco" / f"coco_pope_{split}.json", lines)


def write_gqa(target: Target, rows: Rows, images: Rows) -> None:
    """Questions, the official question file as far as it is scored, and the pictures of another part."""
    pictures = _Pictures(target.images)
    known = {pictures.add(_name(row, "id", number) + ".jpg", row, number) for number, row in enumerate(images, start=1)}
    questions, official = [], {}
    for number, row in enumerate(rows, start=1):
        key, picture = _text(row, "id", number), _name(row, "imageId", number) + ".jpg"
        if picture not in known:
            raise ValueError(f"row {number}: there is no picture of imageId {row['imageId']!r}")
        questions.append(_question(key, picture, _text(row, "question", number) + SHORT_ANSWER))
        kept = ("imageId", "question", "answer", "isBalanced", "types", "semantic", "groups")
        official[key] = {column: row[column] for column in kept}
    write_jsonl_atomic(target.files[0], questions)
    write_json_atomic(target.files[1], official)


def write_textvqa(target: Target, rows: Rows) -> None:
    """Questions with their OCR tokens, and the annotations."""
    pictures, questions, annotations = _Pictures(target.images), [], []
    for number, row in enumerate(rows, start=1):
        image, asked = _name(row, "image_id", number), " ".join(_text(row, "question", number).split())
        picture = pictures.add(image + ".jpg", row, number)
        text = f"{asked.capitalize()}\nReference OCR token: {', '.join(row['ocr_tokens'])}{SHORT_ANSWER}"
        questions.append(_question(image, picture, text))
        annotations.append(
            {
                "image_id": image, "question_id": row["question_id"], "question": asked,
                "answers": list(row["answers"]),
            }
        )  # fmt: skip
    write_jsonl_atomic(target.files[0], questions)
    write_json_atomic(target.files[1], {"data": annotations})


def write_mme(target: Target, rows: Rows) -> None:
    """Questions, the two of a picture behind each other; ground truth and pictures by category."""
    pictures, questions, truth = _Pictures(target.images), [], defaultdict(list)
    for number, row in enumerate(rows, start=1):
        path, asked = _text(row, "question_id", number), _text(row, "question", number).strip()
        parts = path.split("/")
        if len(parts) != 2 or not all(_is_plain(part) for part in parts):
            raise ValueError(f"row {number}: question_id {path!r} is no path category/picture")
        if not asked.endswith(_YES_NO):
            raise ValueError(f"row {number}: the question {asked!r} must end in {_YES_NO!r}")
        pictures.add(path, row, number)
        questions.append(_question(path, path, asked.removesuffix(_YES_NO).strip() + SHORT_ANSWER, parts[0]))
        answer = _yes_or_no(row, number).capitalize()
        truth[Path(parts[0], parts[1].split(".")[0] + ".txt")].append(f"{asked}\t{answer}\n")
    questions.sort(key=lambda question: question["image"])
    for path, lines in truth.items():
        with replacing(target.images / path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    write_jsonl_atomic(target.files[0], questions)


def write_scienceqa(target: Target, rows: Rows) -> None:
    """Questions with and without a picture, and the problems with their answers; the rows have no id."""
    pictures, questions, problems = _Pictures(target.images), [], {}
    for number, row in enumerate(rows, start=1):
        key, hint, choices = str(number), row["hint"] or "", list(row["choices"])
        if not 0 <= row["answer"] < len(choices) <= len(OPTIONS):
            raise ValueError(
                f"row {number}: answer {row['answer']!r} of {len(choices)} choices; at most {len(OPTIONS)} are known"
            )
        lines = [f"Context: {hint}"] * bool(hint) + [_text(row, "question", number)]
        lines += [f"{letter}. {choice}" for letter, choice in zip(OPTIONS, choices, strict=False)]
        image = {"image": pictures.add(f"{key}/image.png", row, number)} if row["image"] is not None else {}
        lines = ["<image>"] * bool(image) + lines
        questions.append({"id": key, **image, "conversations": [{"from": "human", "value": "\n".join(lines)}]})
        problems[key] = {
            "question": row["question"], "choices": choices, "answer": row["answer"], "hint": hint,
            "image": "image.png" if image else None, "split": "test",
        }  # fmt: skip
    write_json_atomic(target.files[0], questions)
    write_json_atomic(target.files[1], problems)
    write_json_atomic(target.files[2], {"test": list(problems)})


def write_mmbench(target: Target, rows: Rows) -> None:
    """The table; a picture is a cell of it."""
    with (
        replacing(target.files[0]) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        for number, row in enumerate(rows, start=1):
            if number == 1:
                writer.writerow(column.lower() if len(column) > 1 else column for column in row)
            cells = {**row, "image": base64.b64encode(_bytes(row, number)).decode()}
            writer.writerow("" if cell is None else cell for cell in cells.values())


def write_vizwiz(target: Target, rows: Rows) -> None:
    """Questions; their answers are with the server."""
    pictures, questions = _Pictures(target.images), []
    for number, row in enumerate(rows, start=1):
        picture = pictures.add(_name(row, "question_id", number) + ".jpg", row, number)
        text = _text(row, "question", number) + _UNANSWERABLE + SHORT_ANSWER
        questions.append(_question(number - 1, picture, text))
    write_jsonl_atomic(target.files[0], questions)


def write_vqav2(target: Target, rows: Rows, test: Rows) -> None:
    """Questions of test-dev with their pictures, and the list of all test questions."""
    pictures = _Pictures(target.images)
    asked = []
    for number, row in enumerate(rows, start=1):
        asked.append(_coco_question(row, number))
        pictures.add(asked[-1]["image"], row, number)
    write_jsonl_atomic(target.files[0], asked)
    write_jsonl_atomic(target.files[1], (_coco_question(row, number) for number, row in enumerate(test, start=1)))


def _coco_question(row: Row, number: int) -> dict[str, Any]:
    picture = f"COCO_test2015_{int(row['image_id']):012d}.jpg"
    return _question(row["question_id"], picture, _text(row, "question", number) + SHORT_ANSWER)


def _question(key: int | str, image: str, text: str, category: str = "default") -> dict[str, Any]:
    """A line of a question file."""
    return {"question_id": key, "image": image, "text": text, "category": category}


def _bytes(row: Row, number: int) -> bytes:
    picture = row["image"]
    if not isinstance(picture, Mapping) or not picture.get("bytes"):
        raise ValueError(f"row {number}: column image holds no encoded picture")
    return picture["bytes"]


def _text(row: Row, column: str, number: int) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"row {number}: {column} is {row[column]!r}, expected text")
    return row[column]


def _yes_or_no(row: Row, number: int) -> str:
    """The row's answer without case."""
    word = _text(row, "answer", number).strip().lower()
    if word not in ("yes", "no"):
        raise ValueError(f"row {number}: answer {row['answer']!r} must be yes or no")
    return word


def _name(row: Row, column: str, number: int) -> str:
    """A part of a file name, as it is in the data set."""
    text = _text(row, column, number).strip()
    if not _is_plain(text):
        raise ValueError(f"row {number}: {text!r} cannot be part of a file name; letters, digits, _ - . are allowed")
    return text.removesuffix(".jpg")


def _is_plain(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None and not text.startswith(".")
