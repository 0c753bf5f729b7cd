"""Vision stage before the projector: compress the features that enter it and project the kept rows only.

The projected rows stand first in each image's block and zero rows fill it up to the image's original length: the host
model's count of placeholders holds, and the decoder side then drops the zero columns (`adapters.decoder`).
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apet.core.types import CompressedTokens

Select = Callable[[Tensor, int], CompressedTokens]


@dataclass(frozen=True)
class VisionRecord:
    """What the vision stage did to the images of one encoder call.

    Attributes:
        tokens_in: Tokens per image before compression.
        kept: One int64 (K_i,) tensor of kept positions per image, ascending.
    """

    tokens_in: int
    kept: tuple[Tensor, ...]


def budget_for(budget: int | float | Sequence[int] | None, length: int, item: int, images: int) -> int:
    """Tokens kept of one image of `length` tokens; never more than it has, never less than one.

    Raises:
        ValueError: A per-image budget list that does not match the number of images.
    """
    if budget is None:
        return length
    if isinstance(budget, float):
        return max(1, int(budget * length))
    if isinstance(budget, Sequence):
        if len(budget) != images:
            raise ValueError(f"{len(budget)} budgets {list(budget)} were given for {images} images; give one per image")
        budget = budget[item]
    return min(budget, length)


class VisionStage:
    """Hooks around the projector of one model; remembers the last call per thread."""

    def __init__(self, projector: nn.Module, budget, select: Select) -> None:
        self._projector = projector
        self._budget = budget
        self._select = select
        self._local = threading.local()

    def attach(self) -> list:
        """Register the hooks; returns their handles."""
        return [
            self._projector.register_forward_pre_hook(self._before),
            self._projector.register_forward_hook(self._after),
        ]

    @property
    def record(self) -> VisionRecord | None:
        """What the last call in this thread kept; None before the first."""
        return getattr(self._local, "record", None)

    def _before(self, module: nn.Module, args: tuple) -> tuple:
        features = args[0]
        images, length = features.shape[:2]
        keep = [budget_for(self._budget, length, item, images) for item in range(images)]
        whole = torch.arange(length, device=features.device)
        kept = [whole] * images
        self._local.length = length
        if min(keep, default=length) < length:
            rows = features.new_zeros(images, max(keep), features.shape[2])
            for count in sorted(set(keep)):
                members = [item for item in range(images) if keep[item] == count]
                chosen = features[members] if len(members) < images else features
                if count < length:
                    result = self._select(chosen, count)
                    chosen, indices = result.tokens, result.indices
                    for position, item in enumerate(members):
                        kept[item] = indices[position]
                rows[members, :count] = chosen
            args = (rows, *args[1:])
        self._local.record = VisionRecord(length, tuple(kept))
        return args

    def _after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        missing = self._local.length - output.shape[1]
        return output if missing == 0 else nn.functional.pad(output, (0, 0, 0, missing))
