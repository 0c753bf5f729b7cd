"""One writer per file: an operating-system lock that ends with its process, however that ends.

POSIX record locks (`fcntl.lockf`): they hold on local and on network file systems that have locks, belong to one
process and are not inherited, so that worker processes which outlive a killed run do not keep them.
"""

import errno
import logging
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

# Space that a full disk gives back, so that a run which ends there can still write its record.
RESERVE_BYTES = 64 * 1024
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# A process does not see its own record locks.
_held: set[Path] = set()


class FileLock:
    """The right to write a file and what stands beside it; a context manager.

    A small file `.<name>.lock` beside the file holds the lock and says whose it is. It goes when the lock is released;
    one that a killed process left is free.

    Args:
        path: The file that is written; need not exist, its folder must.
    """

    def __init__(self, path: Path) -> None:
        self._written, self._path = path, lock_path(path)
        self._descriptor: int | None = None

    def __enter__(self) -> "FileLock":
        """Take the lock.

        Raises:
            BlockingIOError: Another process has it.
            OSError: The folder cannot be written.
        """
        if fcntl is None:
            logger.warning("this system has no file locks: start only one run that writes %s", self._written)
            return self
        if self._path in _held:
            raise BlockingIOError(f"{self._written} is already being written by this process")
        while not self._take():
            pass  # released, and so removed, between opening it and locking it
        _held.add(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        _held.discard(self._path)
        self._path.unlink(missing_ok=True)
        self._close()

    def give_reserve_back(self) -> None:
        """Free the space that is kept for what must be written on a full disk."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, len(_owner()))

    def _take(self) -> bool:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            if not self._is_current():
                self._close()
                return False
            os.ftruncate(self._descriptor, 0)
            if os.write(self._descriptor, _owner().ljust(RESERVE_BYTES)) < RESERVE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except BaseException:
            self._close()
            raise
        return True

    def _lock(self) -> None:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                owner = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
                raise BlockingIOError(
                    f"another run is writing {self._written} ({owner or 'it does not say which'}); wait for it or end "
                    "it, or give another --answers-file"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "the file system of %s has no locks (%s): start only one run that writes it",
                self._written,
                error.strerror,
            )

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_path(path: Path) -> Path:
    """The lock's file of a file that is written."""
    return path.with_name(f".{path.name}.lock")


def _owner() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}".encode()
