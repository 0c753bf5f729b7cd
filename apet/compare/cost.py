"""Time and memory: a pass of its own over a few questions, all methods in turns, nothing shared between them.

The accuracy runs are no measurement: they share the vision tower's output and answer at different moments of a long
night. Here every method encodes the picture itself and writes equally many tokens.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from apet.compare.execute import Finished
from apet.compare.plan import BASELINE, UNCOMPRESSED, Cell
from apet.compare.tasks import Task
from apet.eval.answerer import Answerer
from apet.eval.benchmarks.files import read_json, write_json_atomic
from apet.eval.images import Pictures
from apet.eval.loader import LoadedModel
from apet.eval.run_record import machine
from apet.measure import Timing, cuda_peak_bytes, ratio, time_in_turns

logger = logging.getLogger(__name__)

ROUNDS = 5
ANSWER_TOKENS = 8
Key = tuple[str, int | None]  # method, budget
Rounds = Mapping[str, list[float]]  # "first_token_ms" and "batch_ms", one value per round


@dataclass(frozen=True)
class Cost:
    """What a method costs at a budget.

    Attributes:
        first_token: Milliseconds to the first token of one question, over the rounds.
        rate: Questions per second, all of them in one batch, answers of `ANSWER_TOKENS` tokens.
        memory: Bytes at the worst moment of that batch beyond what the loaded model takes.
        first_token_none: How many times sooner than the uncompressed model, median of the rounds.
        first_token_random: How many times sooner than random selection at the same budget; None if it was not run.
        rate_none: `rate` relative to the uncompressed model.
        rate_random: `rate` relative to random selection at the same budget.
    """

    first_token: Timing
    rate: Timing
    memory: int
    first_token_none: float
    first_token_random: float | None
    rate_none: float
    rate_random: float | None


def measure_costs(
    loaded: LoadedModel, finished: Sequence[Finished], tasks: Sequence[Task], questions: int, path: Path
) -> dict[Key, Cost]:
    """Measure what was answered, or read the measurement of the same things on the same machine at `path`.

    A measurement with other methods or budgets is made anew as a whole: only turns of one process compare.

    Args:
        loaded: The checkpoint.
        finished: The cells that ran; of several seeds the first is measured.
        tasks: Where the questions are taken from, evenly.
        questions: How many.
        path: A JSON file of all rounds.
    """
    cells: dict[Key, Cell] = {}
    for one in finished:
        cells.setdefault((one.cell.method, one.cell.tokens), one.cell)
    asked = spread(tasks, questions)
    subject = {
        "cells": {cell.name: dict(loaded.answerer(cell.config).settings()) for cell in cells.values()},
        "questions": [[task.name, str(task.questions[index].question_id), index] for task, index in asked],
        "machine": machine(loaded.answerer(next(iter(cells.values())).config).device),
        "rounds": ROUNDS,
    }
    subject = json.loads(json.dumps(subject))
    content = read_json(path) if path.is_file() else {}
    if content.get("subject") != subject:
        logger.info("time and memory: %d questions, %d times %d rounds", len(asked), len(cells), ROUNDS)
        content = {"subject": subject, "measured": _measure(loaded, list(cells.values()), asked)}
        write_json_atomic(path, content, indent=1)
    measured = content["measured"]
    return {key: _cost(key, measured, {other: cell.name for other, cell in cells.items()}, len(asked)) for key in cells}


def spread(tasks: Sequence[Task], count: int) -> list[tuple[Task, int]]:
    """`count` questions (task, number), as many of every task and far apart within it; fewer where there are fewer."""
    shares = [count // len(tasks) + (number < count % len(tasks)) for number in range(len(tasks))]
    chosen = []
    for task, share in zip(tasks, shares, strict=True):
        total = len(task.questions)
        chosen += [(task, index) for index in dict.fromkeys(turn * total // max(share, 1) for turn in range(share))]
    return chosen


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes allocated at the worst moment of a call beyond those before it; on a CPU, by torch's allocator.

    The process's resident set would not do: memory that an earlier call gave back is used again unseen.
    """
    if device.type == "cuda":
        return cuda_peak_bytes(call, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


def _measure(
    loaded: LoadedModel, cells: Sequence[Cell], asked: Sequence[tuple[Task, int]]
) -> dict[str, dict[str, Any]]:
    """Rounds and peak of every cell, by name."""
    preparer = loaded.answerer(cells[0].config).preparer
    prepared = [
        preparer.prepare(task.questions[index], Pictures(task.questions[index], str(task.image_folder)))
        for task, index in asked
    ]
    singles = {cell.name: _Asked(loaded, cell, 1, [[one] for one in prepared]) for cell in cells}
    batches = {cell.name: _Asked(loaded, cell, ANSWER_TOKENS, [prepared]) for cell in cells}
    calls = {f"{name} {kind}": call for kind, group in (("single", singles), ("batch", batches))
             for name, call in group.items()}  # fmt: skip
    around = {name: call.patched for name, call in calls.items()}
    times = time_in_turns(calls, loaded.model.device, repeats=ROUNDS, warmup=1, around=around)
    found = {}
    for cell in cells:
        with batches[cell.name].patched():
            peak = peak_bytes(batches[cell.name], loaded.model.device)
        found[cell.name] = {
            "first_token_ms": [spent / len(prepared) for spent in times[f"{cell.name} single"]],
            "batch_ms": times[f"{cell.name} batch"],
            "peak_bytes": peak,
        }
    return found


class _Asked:
    """Batches asked of a cell, with answers of a fixed length; the model must be `patched` around a call."""

    def __init__(self, loaded: LoadedModel, cell: Cell, new_tokens: int, batches: Sequence[Sequence[Any]]) -> None:
        self._answerer: Answerer | None = None
        self._make = lambda: loaded.answerer(cell.config, new_tokens=new_tokens)
        self._batches = batches

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Patch the model with the cell's compression."""
        self._answerer = self._make()
        yield

    def __call__(self) -> None:
        for batch in self._batches:
            self._answerer.answer(batch)


def _cost(key: Key, measured: Mapping[str, Rounds], names: Mapping[Key, str], questions: int) -> Cost:
    own = measured[names[key]]
    full = measured[names[UNCOMPRESSED, None]]
    random = measured[names[BASELINE, key[1]]] if (BASELINE, key[1]) in names else None

    def versus(other: Rounds | None, what: str) -> float | None:
        return None if other is None else ratio(other[what], own[what]).median

    return Cost(
        Timing.of(own["first_token_ms"]),
        Timing.of([1e3 * questions / spent for spent in own["batch_ms"]]),
        own["peak_bytes"],
        versus(full, "first_token_ms"),
        versus(random, "first_token_ms"),
        versus(full, "batch_ms"),
        versus(random, "batch_ms"),
    )
