"""From prepared questions to batches on the device: grouped in a thread, ahead of the model, of a size that fits.

The thread takes questions from the worker processes, forms the next batch and starts its upload while the model answers
the one before. Where a batch does not fit into the memory of the device, its halves are answered instead.
"""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from apet.eval.images import ImageError

AUTO = "auto"
# `auto` without a GPU: memory does not end there, it swaps, so there is nothing to find out.
CPU_BATCH_SIZE = 8
_FIRST, _MOST = 8, 256

T = TypeVar("T")


class BatchSize:
    """How many questions the next batch has.

    Args:
        wanted: A number, or "auto": on a GPU 8, twice as many after every batch that fitted (at most 256), and half as
            many for good after one that did not; elsewhere `CPU_BATCH_SIZE`.
        device: Where the model is.
    """

    def __init__(self, wanted: int | str, device: str) -> None:
        self.auto = wanted == AUTO
        self._grows = self.auto and torch.device(device).type == "cuda"
        self.now = wanted if not self.auto else _FIRST if self._grows else CPU_BATCH_SIZE

    def fitted(self, count: int) -> None:
        """A batch of `count` was answered."""
        if self._grows and count == self.now:
            self.now = min(2 * self.now, _MOST)

    def overflowed(self, count: int) -> None:
        """A batch of `count` did not fit.

        Raises:
            ValueError: One question does not fit, or the size was chosen by the user.
        """
        if not self.auto:
            raise ValueError(
                f"a batch of {count} does not fit into the memory of the device; lower --batch_size {self.now}, or "
                "give --batch_size auto"
            )
        if count == 1:
            raise ValueError("a single question does not fit into the memory of the device; free some, or use another")
        self._grows = False
        self.now = min(self.now, count // 2)


@dataclass
class Batch:
    """Prepared questions that are answered together.

    Attributes:
        ready: (index, prepared question).
        failures: (index, reason) of questions whose image cannot be used.
        loaded: What `load` made of the prepared questions; None before, and where that did not fit into memory.
    """

    ready: list[tuple[int, Any]] = field(default_factory=list)
    failures: list[tuple[int, ImageError]] = field(default_factory=list)
    loaded: Any = None

    def __len__(self) -> int:
        return len(self.ready) + len(self.failures)

    def halves(self) -> list["Batch"]:
        """Two batches of the ready questions, not yet loaded."""
        middle = len(self.ready) // 2
        return [Batch(self.ready[:middle]), Batch(self.ready[middle:])]

    def load(self, load: Callable[[Sequence[Any]], Any]) -> "Batch":
        """Upload the prepared questions, once; returns itself."""
        if self.ready and self.loaded is None:
            try:
                self.loaded = load([prepared for _, prepared in self.ready])
            except torch.OutOfMemoryError:
                pass  # tried again when the batch in front of it has been answered
        return self


def batches(prepared: Iterable[tuple[int, Any]], size: BatchSize, load: Callable[[Sequence[Any]], Any]) -> Iterator:
    """Loaded batches of prepared questions in their order, each of the size wanted when it is begun."""
    batch, wanted = Batch(), size.now
    for index, one in prepared:
        if isinstance(one, ImageError):
            batch.failures.append((index, one))
        else:
            batch.ready.append((index, one))
        if len(batch) >= wanted:
            yield batch.load(load)
            batch, wanted = Batch(), size.now
    if len(batch):
        yield batch.load(load)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, the next two always being made in a thread. What goes wrong there is raised here, in its turn.

    Ctrl-C is for the main thread: processes that the thread starts do not hear it, the main thread ends them.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1, "apet-batches", initializer=_leave_interrupts_to_others)
    try:
        coming = deque(pool.submit(next, iterator, end) for _ in range(2))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, iterator, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_others() -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
