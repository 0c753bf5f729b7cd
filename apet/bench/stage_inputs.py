"""Random inputs of realistic shape for methods that ask for more than the tokens (`apet.methods.context`)."""

from collections.abc import Callable

import torch
from torch import Tensor

_VISION_HEADS, _VISION_WIDTH = 16, 64  # CLIP ViT-L
_HEADS, _WIDTH = 32, 128  # a 7B decoder
_TEXT = 32  # tokens of a question


class SyntheticInputs:
    """`StageInputs` around blocks (B, N, D); every tensor is made when first asked for and kept.

    Args:
        tokens: The blocks; inputs follow their device and dtype.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self._made: dict[tuple, Tensor] = {}

    def cls_attention(self, layer: int) -> Tensor:
        """(B, 16, N), half of the attention going to CLS itself."""
        return self._once(("cls", layer), lambda: self._noise(_VISION_HEADS, self._count).softmax(-1) / 2)

    def vision_keys(self, layer: int) -> Tensor:
        """(B, 16, N, 64)."""
        return self._once(("vision keys", layer), lambda: self._noise(_VISION_HEADS, self._count, _VISION_WIDTH))

    def vision_states(self) -> Tensor:
        """(B, 12, N, 1024)."""
        return self._once(("states",), lambda: self._noise(12, self._count, _VISION_HEADS * _VISION_WIDTH))

    def vision_features(self) -> Tensor:
        """(B, N, 1024)."""
        return self._once(("features",), lambda: self._noise(self._count, _VISION_HEADS * _VISION_WIDTH))

    def clip_relevance(self) -> Tensor:
        """(B, N) in (-1, 1)."""
        return self._once(("relevance",), lambda: self._noise(self._count).tanh())

    def text_embeddings(self) -> tuple[Tensor, Tensor]:
        """(B, 32, D) and a mask without padding."""
        text = self._once(("text",), lambda: self._noise(_TEXT, self._tokens.shape[2]))
        mask = self._once(("text mask",), lambda: text.new_ones(text.shape[:2], dtype=torch.bool))
        return text, mask

    def image_embeddings(self) -> Tensor:
        """(B, N, D)."""
        return self._once(("image",), lambda: self._noise(self._count, self._tokens.shape[2]))

    def text_hidden(self) -> Tensor:
        """(B, 32, D)."""
        return self._once(("text hidden",), lambda: self._noise(_TEXT, self._tokens.shape[2]))

    def attention_row(self, layer: int) -> Tensor:
        """(B, 32, N)."""
        return self._once(("row", layer), lambda: self._noise(_HEADS, self._count).softmax(-1) / 2)

    def text_attention(self, layer: int) -> Tensor:
        """(B, 32, 32, N)."""
        return self._once(("text rows", layer), lambda: self._noise(_HEADS, _TEXT, self._count).softmax(-1) / 2)

    def keys(self, layer: int) -> Tensor:
        """(B, 32, N, 128)."""
        return self._once(("keys", layer), lambda: self._noise(_HEADS, self._count, _WIDTH))

    def text_keys(self, layer: int) -> Tensor:
        """(B, 32, 32, 128)."""
        return self._once(("text keys", layer), lambda: self._noise(_HEADS, _TEXT, _WIDTH))

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Root-mean-square norm without weights."""
        return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:])

    @property
    def _count(self) -> int:
        return self._tokens.shape[1]

    def _once(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _noise(self, *shape: int) -> Tensor:
        like = self._tokens
        generator = torch.Generator(like.device).manual_seed(len(self._made))
        size = (like.shape[0], *shape)
        return torch.randn(size, generator=generator, device=like.device).to(like.dtype)
