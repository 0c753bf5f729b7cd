"""The record of a run, written beside its answers: `X.jsonl` -> `X.run.json`.

Settings (everything that can change an answer), environment, counts and times. A resumed run must have the same
settings, and a score can be traced back to what produced it.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apet.eval.answerer import Answer, Answerer
from apet.eval.benchmarks.files import read_json, record_path, write_json_atomic
from apet.eval.journal import NOTHING, Counts, counts_of, total
from apet.eval.run_options import RunOptions

_LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "pillow", "numpy")
_SECONDS_BETWEEN_SAVES = 2.0


@dataclass
class RunRecord:
    """What `run.json` holds.

    Attributes:
        path: The record's file.
        settings: What can change an answer; compared when a run is resumed.
        environment: Versions, commit, device, host CPU.
        questions: Questions of this shard.
        status: "running" or "complete".
        counts: answers in the file; over those measured (all, unless the journal of a killed run was lost) sums of
            new_tokens, visual_tokens, seconds (of answering, not loading).
        failures: Questions without an answer, with the reason.
        replaces: SHA-256 of an answers file of another run that this one is about to replace; None afterwards.
    """

    path: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    questions: int
    status: str = "running"
    counts: Counts = field(default_factory=NOTHING.copy)
    failures: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    answers_file: str | None = None
    replaces: str | None = None
    _saved: float = 0.0

    @staticmethod
    def path_for(answers_file: str | Path) -> Path:
        """Where the record of an answers file is."""
        return record_path(answers_file)

    @staticmethod
    def answers_file_of(path: Path) -> Path | None:
        """The answers file that a record names; None without a record, or in one from before they had names."""
        name = _content(path).get("answers_file") if path.is_file() else None
        return None if name is None else path.with_name(name)

    @classmethod
    def begin(cls, options: RunOptions, answerer: Answerer, questions: int) -> "RunRecord":
        """Record of a run that starts now."""
        digest = hashlib.sha256(Path(options.question_file).expanduser().read_bytes()).hexdigest()
        settings = dict(answerer.settings()) | {"question_file_sha256": digest}
        environment = machine(answerer.device) | {
            "batch_size": options.batch_size,
            "num_workers": options.num_workers,
            "chunk": [options.chunk_idx, options.num_chunks],
            "limit": options.limit,
        }
        path = cls.path_for(options.answers_file)
        return cls(path, settings, environment, questions, answers_file=Path(options.answers_file).name)

    def continue_from(self, answers_file: Path) -> dict[str, Any]:
        """Content of the record that the run left which began the answers file; its start is taken over.

        Raises:
            ValueError: No record beside the answers, or one with other settings.
        """
        if not self.path.is_file():
            raise ValueError(
                f"{answers_file} has no record {self.path.name} beside it, so nobody can tell what produced it; give "
                "another --answers-file, or replace it with --overwrite"
            )
        before = _content(self.path)
        differences = differing(before["settings"], self.settings)
        if differences:
            raise ValueError(
                f"{answers_file} was made with other settings ({differences}); give another --answers-file, or replace "
                "it with --overwrite"
            )
        self.started = before["started"]
        return before

    def add(self, answer: Answer, seconds: float) -> None:
        """Count an answer that was written."""
        self.counts = total([self.counts, counts_of(answer.new_tokens, answer.visual_tokens, seconds)])

    @property
    def digest(self) -> str:
        """SHA-256 of the settings: equal for runs whose answers are."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def layer_averaged_tokens(self) -> float | None:
        """Visual tokens per question, averaged over decoder layers and questions with images."""
        measured = self.counts["with_visual"]
        return self.counts["visual_tokens"] / measured if measured else None

    @property
    def samples_per_second(self) -> float | None:
        """Answers per second of answering; opening images in workers overlaps with it."""
        return self.counts["measured"] / self.counts["seconds"] if self.counts["seconds"] else None

    def save(self) -> None:
        """Write the record, whole or not at all.

        Raises:
            OSError: It cannot be written; the one before stays.
        """
        self._saved = time.monotonic()
        try:
            write_json_atomic(self.path, self.to_json(), indent=1)
        except OSError as error:
            raise unwritable(self.path, error, "--resume" if self.replaces is None else "--overwrite") from error

    def save_sometimes(self) -> None:
        """Write the record unless it was written a moment ago."""
        if time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            self.save()

    def finish(self) -> None:
        """Mark the run as complete (every question answered or listed as a failure) and save."""
        self.status = "complete"
        self.save()

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        content = {
            "status": self.status,
            "settings": self.settings,
            "environment": self.environment,
            "questions": self.questions,
            "counts": self.counts,
            "layer_averaged_tokens": self.layer_averaged_tokens,
            "samples_per_second": self.samples_per_second,
            "failures": self.failures,
            "started": self.started,
            "wall_seconds": time.time() - self.started,
            "answers_file": self.answers_file,
        }
        return content if self.replaces is None else content | {"replaces": self.replaces}

    @classmethod
    def read(cls, answers_file: str | Path) -> "RunRecord":
        """The record beside an answers file.

        Raises:
            ValueError: There is none.
        """
        path = cls.path_for(answers_file)
        if not path.is_file():
            raise ValueError(f"{answers_file} has no record {path.name} beside it; run its chunk first")
        content = _content(path)
        names = ("settings", "environment", "questions", "status", "failures", "started")
        return cls(path, counts=total([content["counts"]]), **{name: content[name] for name in names})

    @classmethod
    def read_finished(cls, answers_file: str | Path) -> "RunRecord":
        """The record of a shard that is complete.

        Raises:
            ValueError: It is missing or still running.
        """
        record = cls.read(answers_file)
        if record.status != "complete":
            raise ValueError(f"{answers_file} is not finished (status {record.status}); run its chunk with --resume")
        return record

    @classmethod
    def joined(cls, records: Sequence["RunRecord"], target: str | Path) -> "RunRecord":
        """The record of a merged answers file: of a run in one piece.

        Raises:
            ValueError: The records are not those of all chunks of one run.
        """
        first = records[0]
        _check_chunks(records)
        counts = total([record.counts for record in records])
        failures = [failure for record in records for failure in record.failures]
        questions = sum(record.questions for record in records)
        environment = first.environment | {"chunk": [0, 1]}
        started = min(record.started for record in records)
        return cls(
            cls.path_for(target), first.settings, environment, questions, "complete", counts, failures, started,
            Path(target).name,
        )  # fmt: skip

    @property
    def chunk(self) -> tuple[int, int]:
        """Which of how many chunks, from 0."""
        index, count = self.environment["chunk"]
        return index, count


_NAMES = {
    "settings": dict, "environment": dict, "counts": dict, "failures": list, "questions": int, "status": str,
    "started": float | int,
}  # fmt: skip


def _content(path: Path) -> dict[str, Any]:
    """What a record's file holds; ValueError where that is no record."""
    content = read_json(path)
    held = content if isinstance(content, dict) else {}
    wrong = [name for name, kind in _NAMES.items() if not isinstance(held.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} is no run record: {wrong[0]!r} is {held.get(wrong[0])!r}; move it away to start anew")
    return content


def _check_chunks(records: Sequence[RunRecord]) -> None:
    """Raise ValueError unless the records are those of chunks 0..n-1 of one run, in this order."""
    first, count = records[0], len(records)
    for record in records:
        differences = differing(first.settings, record.settings)
        if differences:
            raise ValueError(
                f"{record.path} and {first.path} were made with different settings ({differences}); run one of them "
                "anew"
            )
        limits = [one.environment.get("limit") for one in (first, record)]
        if limits[0] != limits[1]:
            raise ValueError(f"{first.path} was run with --limit {limits[0]}, {record.path} with --limit {limits[1]}")
        if record.chunk[1] != count:
            raise ValueError(f"{record.path} is a chunk of {record.chunk[1]}, but {count} are to be joined; give all")
    numbers = [record.chunk[0] for record in records]
    if numbers != list(range(count)):
        raise ValueError(
            f"the files to be joined are chunks {', '.join(map(str, numbers))}; give 0..{count - 1}, each once"
        )
    size, extra = divmod(sum(record.questions for record in records), count)
    for index, record in enumerate(records):
        if record.questions != size + (index < extra):
            raise ValueError(f"{record.path} has {record.questions} questions, not its share of one question file")


def differing(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between the settings of two runs, as text; empty if nothing does."""
    wanted = json.loads(json.dumps(new))
    changed = sorted(name for name in old.keys() | wanted.keys() if old.get(name) != wanted.get(name))
    return "; ".join(f"{name}: {old.get(name)!r} there, {wanted.get(name)!r} now" for name in changed)


def unwritable(path: Path, error: OSError, go_on: str | None = None) -> OSError:
    """An error that says in a sentence what cannot be written; one that says so already is returned as it is.

    Args:
        path: The file.
        error: What the system said.
        go_on: The flag that continues; None where there is nothing yet.
    """
    if error.strerror is None:
        return error
    kept = f"what is in it stays valid: mend that and go on with {go_on}"
    return OSError(f"{path} cannot be written: {error.strerror}; {kept if go_on else 'give another --answers-file'}")


def machine(device: str) -> dict[str, Any]:
    """What times depend on beside the settings, as far as it may be written down."""
    return {
        "device": device,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of ApET's own source tree; None when installed without one, wherever that is."""
    root = Path(__file__).resolve().parents[2]
    # A git hook sets GIT_DIR and more, which would lead to the repository it runs in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"],
            cwd=root, env=environment, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    own = len(lines) == 2 and Path(lines[0]).resolve() == root
    return lines[1] if done.returncode == 0 and own else None
