"""The one owner of an answers file: who may write it, how it is started, continued or replaced, and what is on disk.

Answers that are there are never emptied: a file that holds some is continued (`--resume`), replaced as soon as the
first new answer is there (`--overwrite`), or left alone with a sentence. One process writes it (`FileLock`). Whatever
ends the process and wherever, `--resume` goes on from whole lines, and the counts are those of the answers in the file.
"""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apet.eval.answerer import Answer
from apet.eval.benchmarks import Question
from apet.eval.benchmarks.files import refuse_inputs, replacing
from apet.eval.file_lock import FileLock, lock_path
from apet.eval.journal import Journal, LineFile
from apet.eval.run_options import RunOptions
from apet.eval.run_record import RunRecord, unwritable

logger = logging.getLogger(__name__)


def question_key(question: Question) -> str:
    """What identifies a question in its file: id, text and (MMBench) round. Ids alone repeat in TextVQA."""
    return json.dumps([question.question_id, question.text, question.fields.get("round_id")])


def written_files(answers_file: str | Path) -> list[Path]:
    """Everything a run writes: answers, record, journal, lock."""
    given = Path(answers_file).expanduser()
    path = Path(os.path.realpath(given))
    return [given, RunRecord.path_for(given), _journal_path(path), lock_path(path)]


class AnswersFile:
    """An answers file and what stands beside it; a context manager that holds its lock.

    Args:
        options: Of the run.
        key_names: Where a line has the question's id and its text.
    """

    def __init__(self, options: RunOptions, key_names: tuple[str, str]) -> None:
        self._given = Path(options.answers_file).expanduser()
        self.path = Path(os.path.realpath(self._given))  # a link is written through, not replaced
        self._options = options
        self._id_name, self._text_name = key_names
        self._lock = FileLock(self.path)
        self._journal = Journal(_journal_path(self.path))
        self._record: RunRecord | None = None
        self._file: LineFile | None = None
        self._replaces = False

    def __enter__(self) -> "AnswersFile":
        """Take the lock, and refuse what must not be written.

        Raises:
            ValueError: The file or its record is an input, holds answers without a word about them, or is none.
            OSError: It cannot be written, or another run is writing it.
        """
        options = self._options
        try:
            refuse_inputs(written_files(options.answers_file), [options.question_file, *options.inputs])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                raise ValueError(f"{self._given} is no file that answers can go to; give another --answers-file")
            self._lock.__enter__()
        except BlockingIOError:
            raise
        except OSError as error:
            raise unwritable(self._given, error) from error
        try:
            self._refuse_unasked()
            self._remove_leftovers()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._lock.__exit__()

    def begin(self, questions: Sequence[Question], record: RunRecord) -> set[int]:
        """Start, continue or prepare to replace; returns the indices of questions that already have an answer.

        A last line that a killed run left half-written is cut off.

        Raises:
            ValueError: The file to continue belongs to other settings or to other questions.
            OSError: It, or the record, cannot be written.
        """
        self._record = record
        try:
            return self._begin(questions, record)
        except OSError as error:
            raise unwritable(self._given, error, self.goes_on_with) from error

    def append(self, question: Question, row: dict[str, Any], answer: Answer, seconds: float) -> None:
        """Write one line and hand it to the operating system, so that a killed process loses nothing written.

        Raises:
            OSError: It cannot be written. The file ends with the answer before.
        """
        measured = (_short(question_key(question)), answer.new_tokens, answer.visual_tokens, seconds)
        try:
            if self._replaces:
                self._replace(row, measured)
            else:
                self._journal.append(*measured)
                if self._file is None:
                    self._file = LineFile(self.path)
                self._file.append(row)
        except OSError as error:
            raise unwritable(self._given, error, self.goes_on_with) from error
        self._record.add(answer, seconds)

    @property
    def goes_on_with(self) -> str:
        """The flag that continues a run which ends early."""
        return "--overwrite" if self._replaces else "--resume"

    def keep(self) -> None:
        """Close the file of a run that ends early, and write down how far it came."""
        try:
            self._lock.give_reserve_back()
            self._close()
            if not self._replaces:
                self._record.save()
        except OSError as error:
            # What ended the run is being reported; --resume derives the record from the answers.
            logger.warning("%s", error)

    def finish(self, questions: Sequence[Question]) -> None:
        """Sort the file into question order and mark its record as complete.

        Raises:
            ValueError: There is nothing that could replace the answers that are there.
            OSError: The disk is full; the answers are all there, perhaps not in order.
        """
        if self._replaces:
            failed = f"; the first failure: {self._record.failures[0]['error']}" if self._record.failures else ""
            raise ValueError(f"the run gave no answer, so {self._given} keeps those it has{failed}")
        try:
            self._lock.give_reserve_back()
            self._close()
            self._put_in_order(questions)
            self._record.finish()
            self._journal.remove()
        except OSError as error:
            raise unwritable(self._given, error, self.goes_on_with) from error

    def _begin(self, questions: Sequence[Question], record: RunRecord) -> set[int]:
        done: set[int] = set()
        if self._holds_answers() and self._options.resume:
            before = record.continue_from(self._given)
            self._replaces = before.get("replaces") is not None and before["replaces"] == _digest(self.path)
            if not self._replaces:
                done = self._repair(questions)
                keys = {_short(question_key(questions[index])) for index in done}
                record.counts = self._journal.counts(keys, before["counts"])
        else:
            self._replaces = self._holds_answers()
        if not self._replaces:
            if not done:
                self._journal.start_anew()
            record.save()
        return done

    def _holds_answers(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size > 0

    def _refuse_unasked(self) -> None:
        """Raise ValueError where answers would be lost that nobody gave up, or a file that holds none."""
        record = RunRecord.path_for(self._given)
        other = RunRecord.answers_file_of(record)
        if other is not None and other != self._given and other.is_file():
            raise ValueError(f"{record} is the record of {other}; give another --answers-file")
        if not self._holds_answers() or self._options.resume:
            return
        if not self._options.overwrite:
            raise ValueError(
                f"{self._given} holds answers already; continue them with --resume, replace them with --overwrite, or "
                "give another --answers-file"
            )
        with self.path.open("rb") as file:
            first = _parsed(file.readline())
        if not record.is_file() and (first is None or self._id_name not in first):
            raise ValueError(f"{self._given} is no answers file, it is not overwritten; give another --answers-file")

    def _remove_leftovers(self) -> None:
        """Remove files that a killed run was about to rename; the lock says that there is no other run."""
        for target in (self.path, RunRecord.path_for(self._given)):
            for path in target.parent.glob(f".[0-9]*.{glob.escape(target.name)}"):
                if path.name.split(".")[1].isdecimal():
                    path.unlink(missing_ok=True)

    def _replace(self, row: dict[str, Any], measured: tuple) -> None:
        """Put a file with a first answer in the place of the old one.

        In between, the record names the answers it does not describe: a run killed there replaces them when resumed.
        """
        record = self._record
        with replacing(self.path) as beside:
            self._file = LineFile(beside, anew=True)
            self._file.append(row)
            record.replaces = _digest(self.path)
            record.save()
            self._journal.start_anew()
            self._journal.append(*measured)
        self._replaces, record.replaces = False, None

    def _close(self) -> None:
        self._journal.close()
        if self._file is not None:
            self._file.sync()
            self._file.close()
            self._file = None

    def _put_in_order(self, questions: Sequence[Question]) -> None:
        if not self.path.is_file():
            self.path.touch()  # no question, or none that could be answered
        lines = self.path.read_bytes().splitlines(keepends=True)
        place = {question_key(question): index for index, question in enumerate(questions)}
        order = [place[self._key(json.loads(line))] for line in lines]
        if order != sorted(order):
            self._rewrite([line for _, line in sorted(zip(order, lines, strict=True))])

    def _repair(self, questions: Sequence[Question]) -> set[int]:
        """Indices of the answered questions; cuts off a half-written last line, keeps the first of several answers."""
        place = {question_key(question): index for index, question in enumerate(questions)}
        lines = self.path.read_bytes().splitlines(keepends=True)
        if not lines[-1].endswith(b"\n") or _parsed(lines[-1]) is None:
            os.truncate(self.path, sum(map(len, lines[:-1])))
            lines.pop()
        answers: dict[int, bytes] = {}
        for number, line in enumerate(lines, start=1):
            row = _parsed(line)
            if row is None:
                raise ValueError(f"{self._given} line {number} is not JSON; remove the line and resume")
            index = place.get(self._key(row))
            if index is None:
                raise ValueError(
                    f"{self._given} line {number} answers question {row.get(self._id_name)!r}, which is not among the "
                    "questions of this run; give another --answers-file, or replace the file with --overwrite"
                )
            answers.setdefault(index, line)
        if len(answers) < len(lines):
            self._rewrite(list(answers.values()))
        return set(answers)

    def _rewrite(self, lines: list[bytes]) -> None:
        with replacing(self.path) as beside:
            beside.write_bytes(b"".join(lines))

    def _key(self, row: dict[str, Any]) -> str:
        return json.dumps([row.get(self._id_name), row.get(self._text_name), row.get("round_id")])


def _journal_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.journal")


def _short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None where it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
