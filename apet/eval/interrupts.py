"""Ctrl-C and SIGTERM end a run alike: what was answered is written, and one line says how to go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, as from `kill` or a batch system at the end of its time."""


class Interrupted(KeyboardInterrupt):
    """A run that was stopped.

    Attributes:
        flag: What goes on from here: `--resume`, or `--overwrite` where the old answers are still there.
    """

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag = flag

    @staticmethod
    def signal_of(stop: BaseException) -> signal.Signals:
        """The signal that raised an interrupt, or what it was raised from."""
        first = stop.__cause__ if isinstance(stop, Interrupted) else stop
        return signal.SIGTERM if isinstance(first, Terminated) else signal.SIGINT


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread; elsewhere than there nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> None:
    raise Terminated
