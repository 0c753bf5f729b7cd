"""Open the images of questions: files below the image folder, or base64 inside the question file."""

import base64
import binascii
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from apet.eval.benchmarks import Question


class ImageError(Exception):
    """An image that cannot be used; the text says which and why."""


class Pictures(Sequence[Image.Image]):
    """The images of a question, opened when one is first looked at; looking raises what `open_images` raises.

    Attributes:
        path: The image file; None without an image, or where the question file holds it.
        video: The question's video, with or without its extension; None without one.
    """

    def __init__(self, question: Question, folder: str) -> None:
        self._question, self._folder = question, folder
        self.path = None if question.image is None else str(_image_path(question, folder))
        self.video = None if question.video is None else str(Path(folder).expanduser() / question.video)

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
        ImageError: Missing, truncated or no image.
    """
    if question.image_base64 is not None:
        name, source = f"the image of question {question.question_id!r}", _decode(question)
    elif question.image is not None:
        path = _image_path(question, folder)
        if not path.is_file():
            raise ImageError(f"image file {path} does not exist (--image-folder {folder or '.'})")
        name, source = f"image file {path}", path
    else:
        return []
    try:
        with Image.open(source) as image:
            return [image.convert("RGB")]
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image PIL can read") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name} cannot be decoded: {error}") from None


def _image_path(question: Question, folder: str) -> Path:
    return Path(folder).expanduser() / question.image


def _decode(question: Question) -> io.BytesIO:
    try:
        return io.BytesIO(base64.b64decode(question.image_base64, validate=True))
    except binascii.Error as error:
        raise ImageError(f"the image of question {question.question_id!r} is not base64: {error}") from None
