"""What the runner asks of a model family: prepare a question on the CPU, answer a batch of prepared questions.

The benchmark side (`apet.eval.benchmarks`) and the model side meet only here, so neither knows the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from PIL.Image import Image

from apet.eval.benchmarks import Question


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: Decoded and stripped.
        new_tokens: Tokens generated, end token included; 0 if a server does not say.
        visual_tokens: Visual tokens averaged over the decoder layers; None if the model does not report them.
    """

    text: str
    new_tokens: int
    visual_tokens: float | None = None


class Preparer(Protocol):
    """CPU side of a model family. Instances are sent to worker processes, so they must be picklable.

    Attributes:
        videos: Whether questions may be about videos.
    """

    videos: ClassVar[bool]

    def prepare(self, question: Question, images: Sequence[Image]) -> Any:
        """Turn a question and its images (none, or one) into what `Answerer.answer` takes.

        Raises:
            ImageError: Where the images are opened on demand (`apet.eval.images.Pictures`) and one cannot be.
        """


class Answerer(Protocol):
    """Device side of a model family.

    Attributes:
        model_id: Written to every answer line.
        preparer: The CPU side.
        device: Where it runs, as text.
    """

    model_id: str
    preparer: Preparer
    device: str

    def answer(self, prepared: Sequence[Any]) -> list[Answer]:
        """Answer a batch, in its order; an answer does not depend on the rest of the batch.

        Raises:
            torch.OutOfMemoryError: The batch does not fit; the runner tries it in halves.
        """

    def settings(self) -> Mapping[str, Any]:
        """Everything that can change an answer, as JSON types: model, prompts, precision, compression, decoding."""


@runtime_checkable
class Uploader(Protocol):
    """An answerer that can move a batch to the device while it answers another; called from a thread of the runner."""

    def load(self, prepared: Sequence[Any]) -> Any:
        """Start moving a batch of prepared questions; `answer` takes what this returns in their place."""
