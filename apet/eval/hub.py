"""A benchmark from a hub data set, or from a folder of its parquet files, written in the layout that DATA has.

What follows is what always follows: the same programs read the same files. `datasets` does the reading (``pip install
'apet[hub]'``); which columns a data set must have is in `SOURCES`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.files import replacing, user_path
from apet.eval.data_check import find_data

_PROMPT = "\nAnswer the question using a single word or phrase."
_PLAIN = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Source:
    """How a benchmark stands on the hub.

    Attributes:
        dataset: Its usual id.
        split: Split of the questions.
        columns: Columns that are read, the picture's last.
    """

    dataset: str
    split: str
    columns: tuple[str, ...]


SOURCES: Mapping[str, Source] = {
    "pope": Source("lmms-lab/POPE", "test", ("question", "answer", "category", "image_source", "image")),
}


def write_benchmark(benchmark: str, root: str | Path, dataset: str | None = None) -> Path:
    """Write the question, label and picture files of a benchmark below `root`; files that are there are replaced.

    Args:
        benchmark: Key of `SOURCES`.
        root: The folder that the programs call DATA.
        dataset: Hub id (ORG/NAME), or a folder with parquet files; None for the usual id.

    Returns:
        The benchmark's folder.

    Raises:
        ValueError: A benchmark or data set that is not known, a missing column, a picture without a plain name, or
            `datasets` is not installed.
    """
    if benchmark not in SOURCES:
        raise ValueError(f"benchmark {benchmark!r} is not read from data sets; known: {', '.join(SOURCES)}")
    rows = _rows(SOURCES[benchmark], dataset)
    folder = user_path(root) / find_data(benchmark).folder
    return _write_pope(rows, folder)


def _rows(source: Source, dataset: str | None) -> Iterable[Mapping[str, Any]]:
    """Rows with the picture as it is stored: {"bytes": ..., "path": ...}."""
    if find_spec("datasets") is None:
        raise ValueError("--dataset needs the package datasets: pip install 'apet[hub]'")
    import datasets  # optional

    name = dataset or source.dataset
    files = sorted(str(file) for file in Path(name).glob("**/*.parquet"))
    if Path(name).is_dir() and not files:
        raise ValueError(f"{name} has no parquet file")
    try:
        loaded = (
            datasets.load_dataset("parquet", data_files=files, split="train")
            if files
            else datasets.load_dataset(name, split=source.split)
        )
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data set {name!r} cannot be read: {error}; give a hub id or a folder of parquet files"
        ) from error
    missing = [column for column in source.columns if column not in loaded.column_names]
    if missing:
        has = ", ".join(loaded.column_names)
        raise ValueError(f"data set {name!r} has no column {', '.join(missing)}; it has {has}")
    return loaded.select_columns(list(source.columns)).cast_column(source.columns[-1], datasets.Image(decode=False))


def _write_pope(rows: Iterable[Mapping[str, Any]], folder: Path) -> Path:
    """Questions of all splits in one file, labels split by split, every picture once."""
    questions, labels = [], defaultdict(list)
    images = folder / "val2014"
    images.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows, start=1):
        picture = _name(row["image_source"], number) + ".jpg"
        with replacing(images / picture) as temporary:
            temporary.write_bytes(row["image"]["bytes"])
        question, split = row["question"].strip(), row["category"].strip().lower()
        label = row["answer"].strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"row {number}: answer {row['answer']!r} must be yes or no")
        text = question + _PROMPT
        questions.append({"question_id": number, "image": picture, "text": text, "category": split})
        labels[split].append({"question_id": number, "image": picture, "text": question, "label": label})
    _write_lines(folder / "llava_pope_test.jsonl", questions)
    for split, lines in labels.items():
        _write_lines(folder / "coco" / f"coco_pope_{_name(split, 0)}.json", lines)
    return folder


def _name(text: str, number: int) -> str:
    """A part of a file name, as it is in the data set."""
    if not _PLAIN.fullmatch(text) or text.startswith("."):
        raise ValueError(f"row {number}: {text!r} cannot be part of a file name; letters, digits, _ - . are allowed")
    return text.removesuffix(".jpg")


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
