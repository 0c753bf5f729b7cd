"""A served model behind the runner: questions and pictures go to an OpenAI-compatible server.

The server makes the prompt (its chat template), prepares the pixels and compresses, if it does. Pictures travel
losslessly, as PNG inside the request.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL.Image import Image

from apet.eval.answerer import Answer
from apet.eval.benchmarks import Question
from apet.eval.endpoint import Endpoint, EndpointError, Message

# What a server says about a model that can change an answer; the rest is permissions and dates.
_MODEL_FIELDS = ("id", "root", "max_model_len", "owned_by")


@dataclass(frozen=True)
class ServerPreparer:
    """CPU side: one user message, pictures first. Videos are not sent."""

    videos: ClassVar[bool] = False

    def prepare(self, question: Question, images: Sequence[Image]) -> list[Message]:
        """The conversation of a question."""
        return conversation(question.prompt, [picture_url(image) for image in images])


def conversation(text: str, urls: Sequence[str]) -> list[Message]:
    """One user message: pictures, then text."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


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

    Raises:
        EndpointError: No server, or another model.
    """

    def __init__(self, endpoint: Endpoint, decoding: Mapping[str, Any], model: str | None = None) -> None:
        self._endpoint, self._decoding = endpoint, dict(decoding)
        self.model_id = endpoint.model_id(model)
        self.preparer = ServerPreparer()
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
