"""What the patch hands to a method beside the tokens: the stage, and the inputs that the method declared.

Nothing a method can ask for requires materialised attention: single rows are recomputed from queries and keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from apet.config import ApetConfig, StagePreset

# What can be asked for, the stages where it exists, and whether it is asked per layer.
INPUTS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "cls_attention": (("vision",), True),
    "vision_keys": (("vision",), True),
    "vision_states": (("vision",), False),
    "vision_features": (("vision",), False),
    "clip_relevance": (("vision",), False),
    "text_embeddings": (("vision", "llm"), False),
    "image_embeddings": (("llm",), False),
    "text_hidden": (("llm",), False),
    "attention_row": (("llm",), True),
    "text_attention": (("llm",), True),
    "keys": (("llm",), True),
    "text_keys": (("llm",), True),
    "final_norm": (("llm",), False),
}


class StageInputs(Protocol):
    """What the model side can hand to a method, for the B blocks of one call; every function is asked when needed.

    Vision layers index the tower's blocks as `attentions[layer]` does (-2: the last but one). Decoder layers are
    0-based and absolute. Attention is softmax-normalised in float32 (float64 for a float64 model). "Text" is the text
    behind the block's image in its sample (the question), or all of the prompt's text where none follows; T is padded
    to the longest and the mask of `text_embeddings` holds for every text input. What a model does not have is a missing
    function, or one that raises NotImplementedError with the reason.
    """

    def cls_attention(self, layer: int) -> Tensor:
        """(B, heads, N) attention of CLS to the patches; CLS's own share is left out, so a row sums to at most 1."""

    def vision_keys(self, layer: int) -> Tensor:
        """(B, heads, N, d) keys of the patches in a vision block, bias included."""

    def vision_states(self) -> Tensor:
        """(B, S, N, D_v) hidden states of the patches that enter the vision tower's layers from its middle on."""

    def vision_features(self) -> Tensor:
        """(B, N, D_v) features that enter the projector, for methods that work behind it."""

    def clip_relevance(self) -> Tensor:
        """(B, N) cosine of each patch to the question in CLIP's joint space, averaged over 77-token chunks."""

    def text_embeddings(self) -> tuple[Tensor, Tensor]:
        """(B, T, D) token embeddings of the text, in the space behind the projector, and (B, T) bool mask."""

    def image_embeddings(self) -> Tensor:
        """(B, N_0, D) the image's tokens as they entered the decoder."""

    def text_hidden(self) -> Tensor:
        """(B, T, D) hidden states of the text where the stage acts."""

    def attention_row(self, layer: int) -> Tensor:
        """(B, heads, N) attention of the last prompt token to the block's tokens in a decoder layer."""

    def text_attention(self, layer: int) -> Tensor:
        """(B, heads, T, N) attention of each text token to the block's tokens in a decoder layer."""

    def keys(self, layer: int) -> Tensor:
        """(B, kv_heads, N, d) keys of the block's tokens in a decoder layer, as cached (rotated)."""

    def text_keys(self, layer: int) -> Tensor:
        """(B, kv_heads, T, d) keys of the text in a decoder layer, as cached (rotated)."""

    def final_norm(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states through the decoder's final norm."""


@dataclass(frozen=True)
class StageContext:
    """What the patch knows about the blocks it hands over.

    Attributes:
        stage: "vision" or "llm".
        preset: The family's settings for this stage.
        config: The user's configuration.
        layer: Decoder layers that run before the stage: 0 at the vision stage, 2 for a stage before decoder layer 2
            (0-based).
        num_layers: Decoder layers of the model; 0 if unknown.
        grid: (rows, columns) of the blocks' tokens in raster order; None if they are not a full grid.
        sizes: (B, N) image tokens that earlier stages folded into each row; None if every row stands for one.
        inputs: What a method may ask for; None if there is nothing.
    """

    stage: str
    preset: StagePreset
    config: ApetConfig
    layer: int = 0
    num_layers: int = 0
    grid: tuple[int, int] | None = None
    sizes: Tensor | None = None
    inputs: StageInputs | None = None

    def ask(self, method: Any, name: str, *args: Any) -> Any:
        """`inputs.<name>(*args)` for a `Method`.

        Raises:
            ValueError: The stage or the model cannot provide it.
        """
        function = getattr(self.inputs, name, None)
        reason = "the model does not provide it"
        if function is not None:
            try:
                return function(*args)
            except NotImplementedError as error:
                reason = str(error) or reason
        raise ValueError(missing_input(method.name, name, args[:1] if INPUTS[name][1] else (), self.stage, reason))


def missing_input(method: str, name: str, layers: tuple[int, ...], stage: str, reason: str) -> str:
    """Message for a need that cannot be met."""
    where = f" of layer {', '.join(map(str, layers))}" if layers else ""
    return f"method {method!r} needs {name}{where} at the {stage} stage, but {reason}; choose another method"
