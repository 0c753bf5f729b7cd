"""How the patch hangs on a model, so that taking it off, copying, pickling and threads are right by construction.

Nothing here keeps a bound method of a module or a closure over one: a copy of a patched model is patched itself.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from apet.adapters import host


class Removable(Protocol):
    """Anything that can be taken off a model again: hook handles, wrapped methods."""

    def remove(self) -> None:
        """Undo it."""


class Wrapped:
    """A method of one object, replaced there by ``around(original, *args, **kwargs)``.

    What the object had under the name before (a wrapper of the user's or of another tool) is called and comes back. If
    another tool has wrapped this one in the meantime, it stays in the chain and only passes calls on.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name, self._around = owner, name, around
        self._before = vars(owner).get(name)
        setattr(owner, name, self)

    @property
    def original(self) -> Callable[..., Any]:
        """The method as it was."""
        if self._before is not None:
            return self._before
        return functools.partial(getattr(type(self._owner), self._name), self._owner)

    @property
    def __signature__(self) -> Any:
        """That of the original: `generate` reads it to see what it may hand over."""
        return host.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs) if self._around is None else self._around(self.original, *args, **kwargs)

    def remove(self) -> None:
        """Put back what was there."""
        self._around = None
        if vars(self._owner).get(self._name) is not self:
            return
        if self._before is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._before)


class Attribute:
    """An attribute set on an object, and deleted again."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name = owner, name
        setattr(owner, name, value)

    def remove(self) -> None:
        """Delete it."""
        delattr(self._owner, self._name)


class PerThread(threading.local):
    """Attributes of the thread that sets them; a copy starts empty."""

    def __reduce__(self) -> tuple:
        return PerThread, ()


class InFlight:
    """What a thread is in the middle of, innermost last. Nothing stays when it is over, also after an exception."""

    def __init__(self) -> None:
        self._local = PerThread()

    @property
    def top(self) -> Any:
        """The innermost, None outside of any."""
        running = getattr(self._local, "running", None)
        return running[-1] if running else None

    @contextmanager
    def during(self, one: Any) -> Iterator[Any]:
        """`one` is in flight inside the ``with`` block."""
        before = getattr(self._local, "running", ())
        self._set((*before, one))
        try:
            yield one
        finally:
            self._set(before)

    # torch.compile would keep what a thread notes here to the traced code.
    @torch.compiler.disable
    def _set(self, running: tuple) -> None:
        self._local.running = running
