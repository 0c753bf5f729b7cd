"""Files of questions, answers and labels: read with errors that say where, joined with nothing lost, written whole.

A score over part of the questions, or over another question file's answers, looks like a score and is none.
So everything here that joins two files refuses what does not fit, and says which ids and what to do.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]
DUPLICATE_RULES = ("error", "last")


def user_path(path: PathLike) -> Path:
    """The path with a leading ~ or ~user replaced; ValueError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no user of that name; write the path out") from None


def read_text(path: PathLike) -> str:
    """The UTF-8 text of a file (a byte-order mark is dropped); ValueError naming the file if it is not UTF-8."""
    try:
        return user_path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): is it the right file?") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is broken (`json.JSONDecodeError`), or no text of it could be sent or written: nested too deep,
            a number too long, half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        if r"\ud" in text.lower():  # the escape of half a surrogate pair; two of them are a character
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {error.object[error.start]!r}, which is half a character") from None
    except ValueError:  # Python converts no longer ones
        raise ValueError("it holds a number of thousands of digits") from None
    return value


def read_json(path: PathLike) -> Any:
    """The value of a JSON file; ValueError naming file, line and column if it is broken."""
    text = read_text(path)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def iterate_jsonl(path: PathLike, broken: list[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based line number, object) for every line of a JSON-lines file; blank lines are skipped.

    Args:
        path: The file.
        broken: None raises on a line that is not a JSON object; a list collects the numbers of such lines instead.
    """
    # Not str.splitlines: text inside a JSON string may hold U+2028 and other separators it would split at.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            problem = None if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}"
        except json.JSONDecodeError as error:
            problem = f"not JSON ({error.msg} at column {error.colno})"
        except ValueError as error:
            problem = str(error)
        if problem is None:
            yield number, row
        elif broken is not None:
            broken.append(number)
        else:
            raise ValueError(
                f"{path} line {number}: {problem}: {_clip(line)}; mend or delete the line (--resume answers again what "
                "an interrupted run left half written)"
            )


def read_jsonl(
    path: PathLike, required: Collection[str] = (), broken: list[int] | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """All lines of a JSON-lines file as (line number, object).

    Raises:
        ValueError: A broken line, a line without one of the `required` keys, one whose required "text" or "prompt" is
            no string, or a file without any line.
    """
    rows = list(iterate_jsonl(path, broken))
    if not rows:
        raise ValueError(f"{path} is empty: it holds no JSON line")
    for number, row in rows:
        require_keys(row, required, f"{path} line {number}")
        for key in ("text", "prompt"):
            if key in required and not isinstance(row[key], str):
                raise ValueError(f"{path} line {number}: {key!r} is {row[key]!r}, expected str")
    return rows


def shown(words: PathLike) -> str:
    """Words of a file, or its path, for a message of one line: what does not print, such as a line end, is escaped."""
    text = str(words)
    return text if text.isprintable() else repr(text)[1:-1]


def require_keys(row: Any, required: Collection[str], where: str) -> None:
    """ValueError unless `row` is an object with these keys; names the missing ones and those present."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    missing = [key for key in required if key not in row]
    if missing:
        raise ValueError(
            f"{where}: no {' and no '.join(map(repr, missing))} (keys there: {', '.join(map(shown, row)) or 'none'})"
        )


def require_rows(content: Any, required: Collection[str], path: PathLike, under: str = "") -> list[dict[str, Any]]:
    """The objects of a JSON list that has some, or of the list under a key of a JSON object.

    Raises:
        ValueError: `content` has another form, or an object lacks one of the `required` keys.
    """
    rows = content.get(under) if under and isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or (under and rows is content):
        form = f'JSON object with a non-empty list under "{under}"' if under else "non-empty JSON list"
        raise ValueError(f"{path}: expected a {form}: at least one object with {' and '.join(required)}")
    for number, row in enumerate(rows, start=1):
        require_keys(row, required, f"{path} entry {number}")
    return rows


def require_types(row: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: str) -> None:
    """ValueError unless each key's value is of one of its types; the types are named as JSON files have them."""
    for key, allowed in types.items():
        # bool is an int to Python, not to these files
        if not isinstance(row[key], allowed) or isinstance(row[key], bool):
            names = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{where}: {key!r} is {row[key]!r}, expected {names}")


def read_answers(path: PathLike, duplicates: str = "error") -> dict[str, dict[str, Any]]:
    """Answer lines by `str(question_id)`, for benchmarks whose question ids are unique.

    Args:
        path: JSON lines with at least `question_id` and `text`.
        duplicates: What a second answer to a question does: "error", or "last" to let it win.
    """
    rows = read_jsonl(path, ("question_id", "text"))
    return index_unique(((number, str(row["question_id"]), row) for number, row in rows), path, duplicates)


@dataclass(frozen=True)
class LooseAnswers:
    """Answers as the published VizWiz and VQAv2 converters take them: the last one wins, broken lines are counted."""

    by_id: Mapping[str, Mapping[str, Any]]
    repeated: int
    broken: int

    @classmethod
    def read(cls, path: PathLike) -> LooseAnswers:
        broken: list[int] = []
        rows = read_jsonl(path, ("question_id", "text"), broken)
        by_id = {str(row["question_id"]): row for _, row in rows}
        return cls(by_id, repeated=len(rows) - len(by_id), broken=len(broken))

    def report(self, n_questions: int) -> str:
        """The line those converters print."""
        return f"total results: {len(self.by_id)}, total split: {n_questions}, error_line: {self.broken}\n"

    def notes(self) -> list[str]:
        """What that line does not say."""
        return [f"{self.repeated} answers are followed by another to the same question and left out"] * bool(
            self.repeated
        )


def index_unique(
    rows: Iterable[tuple[int, str, dict[str, Any]]], path: PathLike, duplicates: str = "error"
) -> dict[str, dict[str, Any]]:
    """Rows by id; a repeated id is an error naming both places, or with `duplicates="last"` the later row wins."""
    if duplicates not in DUPLICATE_RULES:
        raise ValueError(f"duplicates={duplicates!r} is not one of {', '.join(DUPLICATE_RULES)}")
    index: dict[str, dict[str, Any]] = {}
    first: dict[str, int] = {}
    for number, key, row in rows:
        if key in first and duplicates == "error":
            raise ValueError(
                f"{path}: question {key!r} is answered twice, at {first[key]} and {number} (counted from 1); "
                "remove one answer, or let the later one win with --duplicates last"
            )
        first.setdefault(key, number)
        index[key] = row
    return index


def index_annotations(content: Any, required: Collection[str], path: PathLike, under: str) -> dict[str, dict[str, Any]]:
    """The objects under a key by `str(question_id)`, as `require_rows`; ValueError for an id that is there twice."""
    rows = require_rows(content, required, path, under)
    index = {str(row["question_id"]): row for row in rows}
    if len(index) != len(rows):
        raise ValueError(f"{path}: {len(rows) - len(index)} question ids are there twice")
    return index


def require_complete(
    expected: Collection[str], found: Collection[str], answers: PathLike, questions: PathLike, *, exact: bool = True
) -> None:
    """ValueError unless every expected id is among the found ones (and, if `exact`, no other id is)."""
    missing = [key for key in expected if key not in found]
    strange = [key for key in found if key not in expected]
    if missing and len(missing) == len(expected):
        raise ValueError(
            f"{answers} answers none of the {len(expected)} questions of {questions} "
            f"(it has {listing(found)}, they have {listing(expected)}): is it of another split or benchmark?"
        )
    if missing:
        raise ValueError(
            f"{answers} has no answer for {len(missing)} of the {len(expected)} questions of {questions}: "
            f"{listing(missing)}; finish the run (--resume continues it) before scoring"
        )
    if exact and strange:
        raise ValueError(
            f"{answers} answers {len(strange)} questions that {questions} does not have: {listing(strange)}; "
            "score it against the question file it was made from"
        )


def listing(ids: Iterable[object], limit: int = 5) -> str:
    """The first ids, for a message: `'1', '2', ... (300 in all)`."""
    ids = [repr(key) for key in ids]
    return ", ".join(ids[:limit]) + (f", ... ({len(ids)} in all)" if len(ids) > limit else "")


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block succeeds and vanishes when it fails; makes the folder.

    A reader never sees half a file, and a failed write leaves the old one, also when the power fails.
    """
    target = user_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Named after the process, so that two writers do not share it; the suffix stays, writers choose formats by it.
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: PathLike, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: PathLike, value: Any, indent: int | None = None) -> None:
    """`write_text_atomic` of a value as JSON, ASCII-escaped as the published tools write it."""
    write_text_atomic(path, json.dumps(value, indent=indent))


def write_jsonl_atomic(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_csv_atomic(path: PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file with a header, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def record_path(answers_file: PathLike) -> Path:
    """Where the record of a run stands: `X.jsonl` and `X.json` -> `X.run.json`, any other name `X` -> `X.run.json`."""
    return beside(answers_file, ".run.json")


def beside(answers_file: PathLike, ending: str) -> Path:
    """A name that belongs to an answers file: its own without `.jsonl` or `.json`, and an ending.

    Other suffixes stay, they are no file formats: `out/llava-v1.5` and `out/llava-v1.6` are two runs.
    """
    path = Path(answers_file).expanduser()
    stem = path.stem if path.suffix in (".jsonl", ".json") else path.name
    return path.with_name(stem + ending)


def refuse_inputs(outputs: Iterable[PathLike], inputs: Iterable[PathLike]) -> None:
    """ValueError for a file that would be written and is read: the same under another name, through a link too."""
    read = [Path(path).expanduser() for path in inputs]
    for output in outputs:
        target = Path(output).expanduser()
        for source in read:
            same = os.path.realpath(target) == os.path.realpath(source)
            if same or (target.exists() and source.exists() and target.samefile(source)):
                raise ValueError(f"{output} would be written, but it is an input ({source}); give another output file")


def _clip(line: str, limit: int = 80) -> str:
    return repr(line if len(line) <= limit else line[:limit] + "...")
