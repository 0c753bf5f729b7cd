"""What was measured for each answer, kept beside an answers file while it is written: `X.jsonl` -> `.X.jsonl.journal`.

A line stands here before its answer stands there, so counts of a run that was cut off anywhere follow from the answers
that are on disk. A finished run keeps the sums in its record and removes the journal.
"""

import json
import os
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

Counts = dict[str, float]
# Sums over the answers: all, those measured, their tokens, those that report visual tokens, seconds of answering.
NOTHING: Counts = {
    "answers": 0, "measured": 0, "new_tokens": 0, "visual_tokens": 0.0, "with_visual": 0, "seconds": 0.0,
}  # fmt: skip


def counts_of(new_tokens: int, visual_tokens: float | None, seconds: float) -> Counts:
    """The counts of one answer."""
    return {
        "answers": 1,
        "measured": 1,
        "new_tokens": new_tokens,
        "visual_tokens": visual_tokens or 0.0,
        "with_visual": int(visual_tokens is not None),
        "seconds": seconds,
    }


def total(counts: Collection[Counts]) -> Counts:
    """The sum of counts. Records from before answers and measured ones were told apart measured all."""
    every = [NOTHING | {"measured": one["answers"]} | one for one in counts]
    return {name: sum(one[name] for one in every) + zero for name, zero in NOTHING.items()}


class LineFile:
    """A file of JSON lines that is appended to; used from one thread at a time, closed from any.

    Every line goes to the operating system at once, so a killed process loses none that was written. One that does not
    fit on the disk is taken back, so the file ends with a whole line.

    Args:
        path: The file; made if it is not there.
        anew: Empty it first.
    """

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        self._file = path.open("wb" if anew else "ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._busy = threading.Lock()

    def append(self, value: Any) -> None:
        """Write one line.

        Raises:
            OSError: It cannot be written.
        """
        line = (json.dumps(value) + "\n").encode()
        with self._busy:
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                os.ftruncate(self._file.fileno(), self._size)
                raise
            self._size += len(line)

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        with self._busy:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing is appended any more."""
        with self._busy:
            self._file.close()


class Journal:
    """The journal of an answers file.

    Args:
        path: Of the journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: LineFile | None = None
        self._before = NOTHING

    def counts(self, keys: Collection[str], recorded: Counts) -> Counts:
        """Counts of the answers that are there; later lines are appended behind those that were read.

        Args:
            keys: Of those answers.
            recorded: Counts of the record. They stand for answers that the journal does not know, if they are of no
                more; otherwise nobody can tell of which, and these answers count as not measured.
        """
        lines, base = {}, recorded
        if self._path.is_file():
            for value in _whole_lines(self._path):
                if isinstance(value, dict):
                    base = value
                elif isinstance(value, list) and len(value) == 4 and value[0] in keys:
                    lines[value[0]] = counts_of(*value[1:])
        unknown = len(keys) - len(lines)
        self._before = total([base]) if base["answers"] <= unknown else NOTHING
        return total([self._before, *lines.values()]) | {"answers": len(keys)}

    def start_anew(self) -> None:
        """Forget what is there."""
        self.remove()
        self._before = NOTHING

    def append(self, key: str, new_tokens: int, visual_tokens: float | None, seconds: float) -> None:
        """Note what was measured for the answer that is written next."""
        if self._file is None:
            fresh = not self._path.is_file()
            self._file = LineFile(self._path)
            if fresh and self._before["answers"]:
                self._file.append(self._before)
        self._file.append([key, new_tokens, visual_tokens, seconds])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close the file and remove it."""
        self.close()
        self._path.unlink(missing_ok=True)


def _whole_lines(path: Path) -> list[Any]:
    """The values of a journal; a last line that was cut off is removed from it."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    values = []
    for line in whole.splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            continue  # of a power cut; its answer counts as not measured
    return values
