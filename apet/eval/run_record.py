"""The record of a run, written beside its answers: `X.jsonl` -> `X.run.json`.

Settings (everything that can change an answer), environment, counts and times. A resumed run must have the same
settings, and a score can be traced back to what produced it.
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apet.eval.answerer import Answer, Answerer
from apet.eval.benchmarks.files import read_json, write_json_atomic
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
        counts: Sums over the answers measured: answers, new_tokens, visual_tokens, seconds (of answering, not loading).
        failures: Questions without an answer, with the reason.
    """

    path: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    questions: int
    status: str = "running"
    counts: dict[str, float] = field(
        default_factory=lambda: {"answers": 0, "new_tokens": 0, "visual_tokens": 0.0, "with_visual": 0, "seconds": 0.0}
    )
    failures: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    _saved: float = 0.0

    @staticmethod
    def path_for(answers_file: str | Path) -> Path:
        """Where the record of an answers file is."""
        return Path(answers_file).expanduser().with_suffix(".run.json")

    @classmethod
    def begin(cls, options: RunOptions, answerer: Answerer, questions: int) -> "RunRecord":
        """Record of a run that starts now."""
        digest = hashlib.sha256(Path(options.question_file).expanduser().read_bytes()).hexdigest()
        settings = dict(answerer.settings()) | {"question_file_sha256": digest}
        environment = machine(answerer.device) | {
            "batch_size": options.batch_size,
            "num_workers": options.num_workers,
            "chunk": [options.chunk_idx, options.num_chunks],
        }
        return cls(cls.path_for(options.answers_file), settings, environment, questions)

    def continue_from(self, answers_file: Path) -> None:
        """Take over the counts of the run that left a partial answers file.

        Raises:
            ValueError: No record beside the answers, or one with other settings.
        """
        if not self.path.is_file():
            raise ValueError(
                f"{answers_file} has no record {self.path.name} beside it, so nobody can tell what produced it; give "
                "another --answers-file, or leave out --resume to start anew"
            )
        before = read_json(self.path)
        old = before.get("settings", {})
        wanted = json.loads(json.dumps(self.settings))
        changed = sorted(name for name in old.keys() | wanted.keys() if old.get(name) != wanted.get(name))
        if changed:
            differences = "; ".join(f"{name}: {old.get(name)!r} there, {wanted.get(name)!r} now" for name in changed)
            raise ValueError(
                f"{answers_file} was made with other settings ({differences}); give another --answers-file, or leave "
                "out --resume to start anew"
            )
        self.counts = before["counts"]
        self.started = before["started"]

    def add(self, answers: Sequence[Answer], seconds: float) -> None:
        """Count a batch."""
        visual = [answer.visual_tokens for answer in answers if answer.visual_tokens is not None]
        increments = {
            "answers": len(answers),
            "new_tokens": sum(answer.new_tokens for answer in answers),
            "visual_tokens": sum(visual),
            "with_visual": len(visual),
            "seconds": seconds,
        }
        self.counts = {name: self.counts[name] + value for name, value in increments.items()}

    @property
    def layer_averaged_tokens(self) -> float | None:
        """Visual tokens per question, averaged over decoder layers and questions with images."""
        measured = self.counts["with_visual"]
        return self.counts["visual_tokens"] / measured if measured else None

    @property
    def samples_per_second(self) -> float | None:
        """Answers per second of answering; opening images in workers overlaps with it."""
        return self.counts["answers"] / self.counts["seconds"] if self.counts["seconds"] else None

    def save(self) -> None:
        """Write the record, whole or not at all."""
        self._saved = time.monotonic()
        write_json_atomic(self.path, self.to_json(), indent=1)

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
        return {
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
        }

    @classmethod
    def read(cls, answers_file: str | Path) -> "RunRecord":
        """The record beside an answers file.

        Raises:
            ValueError: There is none.
        """
        path = cls.path_for(answers_file)
        if not path.is_file():
            raise ValueError(f"{answers_file} has no record {path.name} beside it; run its chunk first")
        content = read_json(path)
        names = ("settings", "environment", "questions", "status", "counts", "failures", "started")
        return cls(path, **{name: content[name] for name in names})

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
        """The record of a merged answers file.

        Raises:
            ValueError: The shards were made with different settings.
        """
        first = records[0]
        for record in records[1:]:
            if record.settings != first.settings:
                raise ValueError(
                    f"{record.path} and {first.path} were made with different settings; run one of them anew"
                )
        counts = {name: sum(record.counts[name] for record in records) for name in first.counts}
        failures = [failure for record in records for failure in record.failures]
        questions = sum(record.questions for record in records)
        environment = first.environment | {"chunk": [0, len(records)]}
        started = min(record.started for record in records)
        return cls(cls.path_for(target), first.settings, environment, questions, "complete", counts, failures, started)


def machine(device: str) -> dict[str, Any]:
    """What times depend on beside the settings, as far as it may be written down."""
    return {
        "device": device,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree; None when installed without one."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
