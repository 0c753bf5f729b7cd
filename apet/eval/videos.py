"""Frames of video files, decoded with PyAV: evenly spaced, with the times at which they are shown.

A container lists when its frames are shown, so only those from the last keyframe to a wanted one are decoded. Where it
lists no times, or a frame is not found at its time (MPEG-TS), all of them are.

PyAV brings its FFmpeg. torchcodec does not (without one of the system's it cannot be imported), and every release of it
is for one of torch. `transformers.video_utils.load_video` with PyAV decodes all frames up to the last one wanted and
believes the header's count: it knows no file that was cut off.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from apet.eval.benchmarks.files import shown
from apet.eval.images import ImageError

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
    """The file itself, or the file with the first of `EXTENSIONS` that there is.

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
        ImageError: No file, a file without a picture in it, one that was cut off, or one that cannot be decoded.
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
    """`read_clip` of a file; clips are remembered, because questions about one video follow each other."""
    import av

    try:
        listed = _list(file)
        frames, found = _seek(file, listed, count), len(listed.times)
        if frames is None:
            frames, found = _decode(file, count)
    except (av.error.FFmpegError, IndexError) as error:
        raise ImageError(f"video file {file} cannot be decoded: {error}") from None
    if found < _WHOLE * listed.declared:
        raise ImageError(f"video file {file} is cut off: it has {found} of its {listed.declared} frames")
    if not found:
        raise ImageError(f"video file {file} holds no frame")
    if not listed.rate:
        raise ImageError(f"video file {file} does not say how many frames it has a second")
    times = tuple(int(index) / listed.rate for index in frame_indices(found, count))
    return Clip(tuple(frames), times, found / listed.rate)


@dataclass(frozen=True)
class _Listed:
    """What a container says without anything being decoded.

    Attributes:
        declared: Number of frames by its header; 0 if unknown.
        rate: Frames a second; None if unknown.
        times: When the frames are shown, ascending, in the stream's own unit; empty if a frame has no time.
        keys: Those at which decoding can start.
    """

    declared: int
    rate: float | None
    times: tuple[int, ...]
    keys: tuple[int, ...]


def _list(file: Path) -> _Listed:
    import av

    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        declared, rate = stream.frames, stream.average_rate or stream.guessed_rate
        packets = (one for one in container.demux(stream) if one.size and not one.is_discard)
        shown = [(one.pts, one.is_keyframe) for one in packets]
    if any(time is None for time, _ in shown):
        shown = []
    times, keys = sorted(time for time, _ in shown), sorted(time for time, is_key in shown if is_key)
    return _Listed(declared, float(rate) if rate else None, tuple(times), tuple(keys))


def _seek(file: Path, listed: _Listed, count: int) -> list[Image.Image] | None:
    """The frames wanted, by their times; None where one of them cannot be reached at its own."""
    import av

    if not listed.times:
        return None
    wanted = [listed.times[index] for index in frame_indices(len(listed.times), count)]
    kept: dict[int, Image.Image] = {}
    reached = None
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        for time in sorted(set(wanted)):
            key = max((one for one in listed.keys if one <= time), default=time)
            try:
                if reached is None or reached < key:
                    container.seek(key, stream=stream)
                    decoded = container.decode(stream)
                frame = next((one for one in decoded if one.pts is None or one.pts >= time), None)
            except av.error.FFmpegError:
                return None
            if frame is None or frame.pts != time:
                return None
            kept[time], reached = frame.to_image(), time
    return [kept[time] for time in wanted]


def _decode(file: Path, count: int) -> tuple[list[Image.Image], int]:
    """The frames wanted, and how many there are in all, by decoding every one of them: to count, then to pick."""
    import av

    with av.open(str(file)) as container:
        found = sum(1 for _ in container.decode(video=0))
    wanted = frame_indices(found, count).tolist() if found else []
    with av.open(str(file)) as container:
        decoded = enumerate(container.decode(video=0))
        kept = {index: frame.to_image() for index, frame in decoded if index in wanted}
    return [kept[index] for index in wanted], found
