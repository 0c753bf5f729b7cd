"""What a vision tower gave for pictures it has seen, kept for runs of one model that differ behind the tower only."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llava.model.llava_arch import TowerOutput

LIMIT_BYTES = 2 * 2**30


class Shown(Protocol):
    """A question whose picture is wanted: `pixels` (3, H, W) or None, and the image file `path` or None."""

    pixels: Tensor | None
    path: str | None


class TowerFeatures:
    """Features by image file, in the host's memory.

    What is kept stays: runs ask about the same pictures in the same order, and if the oldest had to leave, each would
    leave shortly before it is asked for again. Pictures beyond the limit are encoded whenever they are asked for.

    Args:
        limit_bytes: How much is kept.

    Attributes:
        known: Image files whose features are kept.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.known: set[str] = set()
        self._kept: dict[str, Tensor] = {}
        self._free = limit_bytes

    @torch.no_grad()  # what is kept must not hold on to everything the tower computed
    def encode(self, model: Any, questions: Sequence[Shown]) -> TowerOutput:
        """The tower's output for a batch; a question without a picture gets zeros that no prompt shows.

        Args:
            model: A LLaVA model (`llava.model`).
            questions: At least one with a picture; pixels of a known picture may be missing. All of one shape.
        """
        new = {self._key(one, row): one.pixels for row, one in enumerate(questions) if self._is_new(one)}
        encoded: dict[Any, Tensor] = {}
        if new:
            pixels = torch.stack(list(new.values())).to(model.device, model.dtype)
            encoded = dict(zip(new, model.get_vision_tower()(pixels), strict=True))
        for key, features in encoded.items():
            self._keep(key, features)
        rows = [
            encoded[key] if (key := self._key(one, row)) in encoded else self._kept.get(key)
            for row, one in enumerate(questions)
        ]
        blank = torch.zeros_like(next(row for row in rows if row is not None))
        return TowerOutput(torch.stack([(blank if row is None else row).to(model.device) for row in rows]))

    def _is_new(self, question: Shown) -> bool:
        return question.pixels is not None and question.path not in self._kept

    @staticmethod
    def _key(question: Shown, row: int) -> str | int:
        """A picture without a file is nobody else's."""
        return row if question.path is None else question.path

    def _keep(self, key: str | int, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if isinstance(key, str) and size <= self._free:
            self._free -= size
            self._kept[key] = features.cpu().clone()
            self.known.add(key)
