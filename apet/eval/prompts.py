"""Prompts that a model can be asked: `<image>` markers where pictures go, and no more tokens than its context."""

from dataclasses import dataclass

from apet.eval.images import ImageError

IMAGE_MARKER = "<image>"


class PromptError(ImageError):
    """A prompt that the model cannot be asked. A run can leave the question out."""


def around_images(text: str, images: int) -> list[str]:
    """The text around its pictures, images + 1 pieces: split at its `<image>` markers, which pictures replace.

    A text without markers is one piece: its pictures go where the model's prompts have them, usually in front.

    Raises:
        PromptError: Markers, but not one per picture.
    """
    pieces = text.split(IMAGE_MARKER)
    markers = len(pieces) - 1
    if markers not in (0, images):
        shown = "1 picture" if images == 1 else f"{images} pictures"
        raise PromptError(
            f"the text has {IMAGE_MARKER} {markers} times for {shown}; give one marker per picture, or none: "
            f"{_clip(text)!r}"
        )
    return pieces


@dataclass(frozen=True)
class Context:
    """How long a prompt may be.

    Attributes:
        positions: Tokens the model was made for (`max_position_embeddings`); None if it does not say.
        row: Tokens at which LLaVA cuts a prompt before anything is compressed (`tokenizer_model_max_length`); None if
            it does not.
    """

    positions: int | None = None
    row: int | None = None

    def room(self, text: int, visual: int, kept: int) -> int | None:
        """Tokens left for the answer; None where the model does not say how many it takes.

        Args:
            text: Tokens of the prompt beside those of pictures.
            visual: Tokens of its pictures before compression.
            kept: The same as they enter the decoder.

        Raises:
            PromptError: The prompt fills the context, or would be cut.
        """
        if self.row is not None and text + visual > self.row:
            raise _too_long(text, visual, f"the checkpoint cuts prompts at {self.row:,} (tokenizer_model_max_length)")
        if self.positions is None:
            return None
        if text + kept >= self.positions:
            raise _too_long(
                text, kept, f"the model's context of {self.positions:,} tokens leaves no room for an answer"
            )
        return self.positions - text - kept


def _too_long(text: int, visual: int, limit: str) -> PromptError:
    pictures = f" ({text:,} of text, {visual:,} of pictures)" if visual else ""
    return PromptError(
        f"the prompt has {text + visual:,} tokens{pictures}, but {limit}; shorten the text"
        + (" or keep fewer visual tokens, numbered anew (--apet position_mode=compact)" if visual else "")
    )


def _clip(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[:most] + "..."
