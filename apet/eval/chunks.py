"""A run in several processes: one per chunk of the questions, each on its share of the GPUs, with a log of its own.

Who may write an answers file and where a run goes on is not decided here: the processes do that
(`apet.eval.answers_file`). A process that fails is told of at once, and the others go on, since their answers will be
needed. Ctrl-C, SIGTERM and SIGHUP end all of them.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apet.eval.interrupts import raising

_ENDING = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
_POLL_SECONDS = 0.1
_LAST_LINES = 5


@dataclass(frozen=True)
class Chunk:
    """A process that answers a part of the questions.

    Attributes:
        command: Program and arguments, without those of the chunk.
        index: Which chunk this is, from 0.
        count: Of how many.
        answers: Answers file of the whole run.
        gpus: Its share of the GPUs as CUDA_VISIBLE_DEVICES has them; "" to leave that variable alone.
    """

    command: Sequence[str]
    index: int
    count: int
    answers: Path
    gpus: str = ""

    @property
    def part(self) -> Path:
        """Its own answers file."""
        if self.count == 1:
            return self.answers
        return self.answers.with_name(f"{self.answers.stem}.{self.count}_{self.index}.jsonl")

    @property
    def log(self) -> Path | None:
        """Where its output goes; None for the terminal, where there is only one process."""
        return None if self.count == 1 else self.part.with_suffix(".log")

    @property
    def words(self) -> list[str]:
        """The whole command."""
        own = ["--answers-file", str(self.part), "--num-chunks", str(self.count), "--chunk-idx", str(self.index)]
        return [*self.command, *own]

    def __str__(self) -> str:
        """The command as it can be typed."""
        return shlex.join([*(["env", f"CUDA_VISIBLE_DEVICES={self.gpus}"] if self.gpus else []), *self.words])

    def start(self) -> subprocess.Popen:
        """Start it; Ctrl-C in the terminal reaches it through us alone."""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpus} if self.gpus else {})
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a new process starts with
        try:
            if self.log is None:
                return subprocess.Popen(self.words, env=environment)
            with self.log.open("wb") as log:
                return subprocess.Popen(self.words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        finally:
            signal.signal(signal.SIGINT, before)

    def last_lines(self) -> str:
        """The end of its log; a progress bar's carriage returns end a line too."""
        lines = re.split("[\r\n]+", self.log.read_text(encoding="utf-8", errors="replace"))
        return "".join(f"{line}\n" for line in [line for line in lines if line.strip()][-_LAST_LINES:])


def make_chunks(command: Sequence[str], answers: Path, count: int, gpus: Sequence[str]) -> list[Chunk]:
    """The chunks of a run: each gets an equal share of the GPUs, or they take turns if there are more of them.

    Args:
        command: Program and arguments.
        answers: Answers file of the whole run.
        count: Number of processes.
        gpus: What CUDA_VISIBLE_DEVICES lists; a single process keeps all of them.
    """

    def share(index: int) -> str:
        if count == 1 or not gpus:
            return ""
        if count >= len(gpus):
            return gpus[index % len(gpus)]
        return ",".join(gpus[index * len(gpus) // count : (index + 1) * len(gpus) // count])

    return [Chunk(command, index, count, answers, share(index)) for index in range(count)]


def unfinished_count(answers: Path, count: int) -> int | None:
    """In how many chunks an earlier run was left unfinished, if it were others; its answers are not taken over."""
    if answers.exists():
        return None
    for part in sorted(answers.parent.glob(f"{answers.stem}.*_0.jsonl")):
        number = part.name[len(answers.stem) + 1 : -len("_0.jsonl")]
        if number.isdecimal() and int(number) != count:
            return int(number)
    return None


def run_chunks(chunks: Sequence[Chunk]) -> bool:
    """Run all chunks to their end.

    Returns:
        Whether all succeeded.

    Raises:
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; the processes have ended.
    """
    running: dict[int, subprocess.Popen] = {}
    succeeded = True
    with raising(KeyboardInterrupt, *_ENDING):
        try:
            for chunk in chunks:
                running[chunk.index] = chunk.start()
            if len(chunks) > 1:
                logs = str(chunks[0].log).removesuffix("_0.log") + "_*.log"
                print(f"{len(chunks)} processes; logs: {logs}", flush=True)
            while running:
                for index in [index for index, process in running.items() if process.poll() is not None]:
                    if running.pop(index).returncode != 0:
                        succeeded = False
                        _report_failure(chunks[index])
                time.sleep(_POLL_SECONDS)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return succeeded


def _report_failure(chunk: Chunk) -> None:
    if chunk.log is not None:
        head = f"chunk {chunk.index} of {chunk.count} (counted from 0) failed; the end of {chunk.log}:"
        print(f"{head}\n{chunk.last_lines()}", end="", file=sys.stderr, flush=True)
