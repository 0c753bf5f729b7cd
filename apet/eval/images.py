"""The one place where pictures are opened: files, base64 inside a question file, bytes from the network.

A picture becomes 8-bit RGB, or an `ImageError` that says which picture and why; nothing else is raised for a picture,
however broken. Of an animation the first frame is taken, an alpha channel is dropped, as LLaVA does both.

Deep grey pictures are scaled, because Pillow would clip them to white or black: 16 bits by 255 / 65535 (TIFF: by the
bits the file says it has), floats from 0..1 to 0..255. Floats outside that and 32-bit integers have no white of their
own, so they are refused.
"""

import base64
import binascii
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from apet.eval.benchmarks import Question
from apet.eval.benchmarks.files import shown, user_path

_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_RANGE_OF_16_BITS = ("PNG", "PPM")  # formats that Pillow may open as 32-bit integers of this range
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_WHITE_IS_ZERO = 0


class ImageError(ValueError):
    """A question that cannot be asked, mostly for its picture or video; the text says why. A run can leave it out."""


class Pictures(Sequence[Image.Image]):
    """The images of a question, opened when one is first looked at; looking raises what `open_images` raises.

    Attributes:
        path: The image file; None without an image, or where the question file holds it.
        video: The question's video, with or without its extension; None without one.
    """

    def __init__(self, question: Question, folder: str) -> None:
        self._question, self._folder = question, folder
        self.path = None if question.image is None else str(_image_path(question, folder))
        self.video = None if question.video is None else str(user_path(folder) / question.video)

    def __len__(self) -> int:
        return int(self._question.image is not None or self._question.image_base64 is not None)

    def __getitem__(self, index):
        return self._opened[index]

    @cached_property
    def _opened(self) -> Sequence[Image.Image]:
        return open_images(self._question, self._folder)


def open_images(question: Question, folder: str) -> Sequence[Image.Image]:
    """The images of a question, decoded completely and converted to RGB.

    Raises:
        ImageError: As `open_picture`, a missing file, or no base64.
    """
    if question.image_base64 is not None:
        return [open_picture(_decode(question), f"the image of question {question.question_id!r}")]
    if question.image is not None:
        return [open_file(_image_path(question, folder), f" (--image-folder {folder or '.'})")]
    return []


def open_file(path: str | Path, where: str = "") -> Image.Image:
    """The picture of a file, as `open_picture`; `where` is what a missing file's message says of its folder.

    Raises:
        ImageError: As `open_picture`, or the file is missing.
    """
    name = f"image file {shown(path)}"
    try:
        # A pipe or device would be waited for; Path.is_file raises for some names that no file can have.
        there, regular = Path(path).exists(), Path(path).is_file()
        if not regular:
            raise ImageError(f"{name} {'is not a regular file' if there else 'does not exist'}{where}")
        with open(path, "rb") as file:
            return open_picture(file, name)
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror or error}") from None


def open_picture(source: BinaryIO, name: str) -> Image.Image:
    """The picture of an open binary file, decoded completely, as 8-bit RGB.

    Args:
        source: File at its start.
        name: What the picture is called in messages.

    Raises:
        ImageError: No picture, one cut off or broken, one of more pixels than Pillow opens, or without a known white.
    """
    try:
        with Image.open(source) as image:
            return _rgb(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image PIL can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # A few bytes can claim any size, and every pixel takes three bytes of memory.
        claim = str(error).partition(", could")[0]
        raise ImageError(f"{name} is too large to open: {claim}; scale it down") from None
    except Exception as error:  # Pillow's decoders meet broken files with whatever their code runs into
        raise ImageError(f"{name} cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in _DEEP_GREY or (image.mode == "I" and image.format in _RANGE_OF_16_BITS):
        return _from_16_bits(image)
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ImageError(
                f"{name} holds floating-point numbers from {values.min():g} to {values.max():g}; only 0 to 1 has a "
                "known brightness: scale them, or save the picture with 8 bits"
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise ImageError(f"{name} holds 32-bit integers, whose white is unknown; save it with 8 or 16 bits")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits, rounded to 8."""
    white, inverted = 65535, False
    if image.format == "TIFF":
        white = 2 ** int(image.tag_v2[_BITS_PER_SAMPLE][0]) - 1
        inverted = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    grey = np.rint(np.asarray(image, dtype=np.float64) * (255 / white)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if inverted else grey).convert("RGB")


def _image_path(question: Question, folder: str) -> Path:
    return user_path(folder) / question.image


def _decode(question: Question) -> io.BytesIO:
    try:
        return io.BytesIO(base64.b64decode(question.image_base64, validate=True))
    except (binascii.Error, ValueError) as error:  # a ValueError for text that is not ASCII
        raise ImageError(f"the image of question {question.question_id!r} is not base64: {error}") from None
