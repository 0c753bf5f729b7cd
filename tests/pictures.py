"""Picture files that are broken, lying or unusual, made byte by byte or by Pillow."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image


def png(width: int, height: int, data: bytes = b"", bits: int = 8, colour: int = 2) -> bytes:
    """A PNG file whose header claims a size; `data` are its raw scan lines."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def grey16(bits: int = 16) -> Image.Image:
    """A ramp from black to the white of so many bits."""
    return Image.fromarray(np.linspace(0, 2**bits - 1, 12 * 8).round().astype(np.uint16).reshape(8, 12))


def floats(low: float, high: float) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 12 * 8, dtype=np.float32).reshape(8, 12))


def animation() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


# Name -> file content, and a part of the sentence that opening it gives.
BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", "not an image PIL can read"),
    "text": (lambda: b"<html>404</html>", "not an image PIL can read"),
    "decompression bomb": (lambda: png(60_000, 60_000), "too large to open: Image size .3600000000 pixels. exceeds"),
    "no width": (lambda: png(0, 5), "not an image PIL can read"),
    "no pixels": (lambda: png(30, 20), "cannot be decoded"),
    "cut in half": (lambda: encoded(noise())[:900], "cannot be decoded"),
    "JPEG cut off": (lambda: encoded(noise((300, 200)), "JPEG")[:2000], "cannot be decoded"),
    "bytes flipped": (lambda: encoded(noise())[:60] + bytes(200) + encoded(noise())[260:], "cannot be decoded"),
    "header only": (lambda: png(30, 20)[:33], "not an image PIL can read"),
    "GIF without a frame": (lambda: b"GIF89a\x08\x00\x08\x00\x00\x00\x00;", "not an image PIL can read"),
    "floats beyond 1": (lambda: encoded(floats(0, 300), "TIFF"), "numbers from 0 to 300; only 0 to 1"),
    "floats below 0": (lambda: encoded(floats(-1, 1), "TIFF"), "numbers from -1 to 1"),
    "not-a-number floats": (lambda: encoded(floats(float("nan"), 1), "TIFF"), "numbers from nan"),
    "32-bit integers": (lambda: encoded(Image.new("I", (4, 4), 70_000), "TIFF"), "32-bit integers, whose white"),
}
