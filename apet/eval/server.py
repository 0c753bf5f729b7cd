"""A served model behind the runner: questions and pictures go to an OpenAI-compatible server.

The server makes the prompt (its chat template), prepares the pixels and compresses, if it does. Pictures travel
losslessly, as PNG inside the request.
"""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL.Image import Image

from apet.eval.answerer import Answer
from apet.eval.benchmarks import Question
from apet.eval.benchmarks.files import shown
from apet.eval.endpoint import Endpoint, EndpointError, Message
from apet.eval.images import ImageError, Pictures
from apet.eval.prompts import around_images

# What a server says about a model that can change an answer; the rest is permissions and dates.
_MODEL_FIELDS = ("id", "root", "max_model_len", "owned_by")


@dataclass(frozen=True)
class ServerPreparer:
    """CPU side: one user message, its pictures where the text has `<image>` or first. Videos are not sent.

    Attributes:
        image_folder: Pictures outside it are not sent: a question file may name any file of this machine, and the
            server's owner would get it. None sends all.
        videos: Whether questions may be about videos.
    """

    image_folder: str | None
    videos: ClassVar[bool] = False

    def prepare(self, question: Question, images: Sequence[Image]) -> list[Message]:
        """The conversation of a question.

        Raises:
            ImageError: A picture that cannot be opened or must not leave the machine.
            PromptError: `<image>` markers in the text, but not one per picture.
        """
        if isinstance(images, Pictures) and images.path is not None:
            self._check_inside(images.path)
        return conversation(question.prompt, [picture_url(image) for image in images])

    def _check_inside(self, path: str) -> None:
        if self.image_folder is None:
            return
        try:
            # Links are followed: what counts is which file would be read.
            folder, file = os.path.realpath(os.path.expanduser(self.image_folder)), os.path.realpath(path)
        except ValueError:
            return  # no file can have such a name, so that none is opened
        if os.path.commonpath([folder, file]) != folder:
            raise ImageError(
                f"image file {shown(path)} is {shown(file)}, outside --image-folder {self.image_folder or '.'}, and is "
                "not sent to the server; copy it into the folder, or give --allow-outside-pictures to send such files"
            )


def conversation(text: str, urls: Sequence[str]) -> list[Message]:
    """One user message: pictures where the text has `<image>`, or pictures, then text.

    Raises:
        PromptError: Markers in the text, but not one per picture.
    """
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    first, *rest = around_images(text, len(urls))
    if not rest:
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
    content = [{"type": "text", "text": first}]
    for picture, piece in zip(pictures, rest, strict=True):
        content += [picture, {"type": "text", "text": piece}]
    # The line break beside a marker belongs to the marker; a server's template adds its own.
    parts = [part if "text" not in part else part | {"text": part["text"].strip("\n")} for part in content]
    return [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


def picture_url(image: Image) -> str:
    """An image as a data URL of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class ServerAnswerer:
    """A server as an `Answerer`.

    Args:
        endpoint: The server.
        decoding: Fields of every request: temperature, max_tokens, ...
        model: Id of the model; None for the only one served.
        image_folder: As in `ServerPreparer`.

    Raises:
        EndpointError: No server, or another model.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        decoding: Mapping[str, Any],
        model: str | None = None,
        image_folder: str | None = None,
    ) -> None:
        self._endpoint, self._decoding = endpoint, dict(decoding)
        self.model_id = endpoint.model_id(model)
        self.preparer = ServerPreparer(image_folder)
        self.device = f"server {endpoint.url}"
        (listed,) = (one for one in endpoint.models() if one["id"] == self.model_id)
        self._served = {name: listed.get(name) for name in _MODEL_FIELDS}
        self._server = server_settings(endpoint)

    def answer(self, prepared: Sequence[list[Message]]) -> list[Answer]:
        """Answers of a batch of conversations.

        Raises:
            EndpointError: The server refuses one of them, or stays away.
        """
        given = self._endpoint.complete_all(prepared, model=self.model_id, **self._decoding)
        return [Answer(one.text.strip(), one.completion_tokens or 0) for one in given]

    def settings(self) -> Mapping[str, Any]:
        """Everything that can change an answer, as far as the server says."""
        return {
            "model_id": self.model_id,
            "served_model": self._served,
            "server": self._server,
            "generation": self._decoding,
            "pictures": "png",
        }


def server_settings(endpoint: Endpoint) -> Mapping[str, Any] | None:
    """What a server with ApET's route says about itself (`apet.serving.route`); None where there is no such route.

    Raises:
        EndpointError: The server stopped answering.
    """
    try:
        return endpoint.get("/apet")
    except EndpointError as error:
        if error.status == 404:
            return None
        raise
