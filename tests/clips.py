"""Video files for tests, encoded with PyAV: a grey level per frame, so that a decoded frame says which one it is."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

STEP = 4


def write_clip(
    path: Path,
    frames: int,
    size: tuple[int, int] = (64, 48),
    rate: int = 10,
    seed: int = 0,
    codec: str = "mpeg4",
    **codec_fields,
) -> Path:
    """A video whose frame i has the level STEP * i, beside a block that depends on the seed.

    Further fields are of PyAV's codec context: gop_size, max_b_frames, ...
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for name, value in codec_fields.items():
            setattr(stream.codec_context, name, value)
        container.start_encoding()
        for index in range(frames):
            picture = np.full((size[1], size[0], 3), STEP * index, dtype=np.uint8)
            picture[:16, :16] = (40 * seed % 256, 200, 90 * seed % 256)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_corrupt(path: Path) -> Path:
    """A video file that was cut in half: an mp4 cannot be opened any more, an avi ends early."""
    whole = write_clip(path, 30, size=(320, 240))
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    return path


def write_empty(path: Path) -> Path:
    """A container without a single frame."""
    return write_clip(path, 0)
