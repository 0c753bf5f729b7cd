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
def raising(error: type[BaseException], *signals: signal.Signals) -> Iterator[None]:
    """Inside, these signals raise an error in the main thread, unless they are ignored (nohup).

    In another thread than that nothing is changed.
    """

    def stop(*_: Any) -> None:
        raise error

    main = threading.current_thread() is threading.main_thread()
    before = {one: signal.getsignal(one) for one in signals if main and signal.getsignal(one) is not signal.SIG_IGN}
    for one in before:
        signal.signal(one, stop)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
