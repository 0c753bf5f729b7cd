"""Frames of video files, decoded with PyAV: evenly spaced, with the times at which they are shown."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from apet.eval.images import ImageError, shown

# In the order in which they are looked for.
EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv")
# Headers miscount a few frames; a file with a smaller share of them is not all there.
_WHOLE = 0.9


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
        frames: RGB pictures of one size, in order; a short video shows some of them more than once.
        times: Seconds from the start at which each is shown, at the video's mean frame rate.
        seconds: Length of the video.
    """

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]
    seconds: float


def find_video(path: str | Path) -> Path:
    """The file itself, or the first of `EXTENSIONS` that makes it one.

    Raises:
        ImageError: There is none.
    """
    path = Path(path)
    for candidate in (path, *(path.with_name(path.name + extension) for extension in EXTENSIONS)):
        if candidate.is_file():
            return candidate
    raise ImageError(f"video file {shown(path)} does not exist, nor with {' '.join(EXTENSIONS)}")


def frame_indices(total: int, count: int) -> np.ndarray:
    """(count,) int64 positions from the first to the last of `total` frames, rounded down."""
    return np.linspace(0, total - 1, count, dtype=np.int64)


def read_clip(path: str | Path, count: int) -> Clip:
    """`count` evenly spaced frames of a video, from the first to the last.

    Args:
        path: Video file; without its extension, those of `EXTENSIONS` are tried.
        count: Frames wanted.

    Raises:
        ImageError: No file, a file without a picture in it, or one that cannot be decoded to its end.
        ImportError: PyAV is missing.
    """
    if importlib.util.find_spec("av") is None:
        raise ImportError("video files are decoded with PyAV; install it: pip install av")
    try:
        file = find_video(path)
        return _read(file, count, file.stat().st_mtime_ns)
    except ImageError:
        raise
    except Exception as error:  # decoders meet broken files with whatever their code runs into
        raise ImageError(f"video file {shown(path)} cannot be decoded: {' '.join(str(error).split())}") from None


@lru_cache(maxsize=4)
def _read(file: Path, count: int, _changed: int) -> Clip:
    """As `read_clip`; remembered, because questions about one video follow each other."""
    import av

    try:
        total, rate = _declared(file)
        frames, found = _pick(file, frame_indices(total, count) if total else ())
        if found < _WHOLE * total:
            raise ImageError(f"video file {file} is cut off: it has {found} of its {total} frames")
        if found and found != total:  # the header is a little wrong, or says nothing
            frames, found = _pick(file, frame_indices(found, count))
    except (av.error.FFmpegError, IndexError) as error:
        raise ImageError(f"video file {file} cannot be decoded: {error}") from None
    if not found:
        raise ImageError(f"video file {file} holds no frame")
    if not rate:
        raise ImageError(f"video file {file} does not say how many frames it has a second")
    times = tuple(int(index) / rate for index in frame_indices(found, count))
    return Clip(tuple(frames), times, found / rate)


def _declared(file: Path) -> tuple[int, float | None]:
    """Number of frames (0 if unknown) and frames a second, as the header has them."""
    import av

    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        return stream.frames, None if not rate else float(rate)


def _pick(file: Path, indices: Sequence[int]) -> tuple[list[Image.Image], int]:
    """The frames of these indices, and how many there are in all. Decoded one after the other: seeking is inexact."""
    import av

    wanted = {int(index) for index in indices}
    kept: dict[int, Image.Image] = {}
    total = 0
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            if total in wanted:
                kept[total] = frame.to_image()
            total += 1
    return [kept[int(index)] for index in indices if int(index) in kept], total
