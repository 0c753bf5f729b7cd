"""What every stage of one answer decided, in the coordinates of the uncompressed image.

The methods themselves are listened to while the patched model answers, so the picture shows what happened and not a
second computation of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods import StageContext, get_method
from apet.result import CompressionResult


@dataclass(frozen=True)
class StageTrace:
    """One stage; N patches of the image in raster order.

    Attributes:
        name: "vision" or "layer L", as `apet.last_result` has it; "tower layer L" inside the vision tower.
        kept: (K,) positions left by this stage, ascending.
        groups: (N,) which of the K rows holds a patch's content, -1 where it was dropped.
        errors: (N,) float32 error of the patches that entered the stage, NaN for the others; None if the method has no
            error.
    """

    name: str
    kept: np.ndarray
    groups: np.ndarray
    errors: np.ndarray | None


@dataclass(frozen=True)
class MethodTrace:
    """One method on one image.

    Attributes:
        method: Registered name, with options.
        tokens: Visual tokens averaged over the decoder layers.
        answer: What the model said.
        stages: In the order they ran.
    """

    method: str
    tokens: float
    answer: str
    stages: tuple[StageTrace, ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays: "apet.tokens", "apet.answer", "apet.stages", "apet.layer_6.kept", ..."""
        found = {"tokens": np.array(self.tokens), "answer": np.array(self.answer)}
        found["stages"] = np.array([stage.name for stage in self.stages])
        for stage in self.stages:
            name = stage.name.replace(" ", "_")
            found |= {f"{name}.kept": stage.kept, f"{name}.groups": stage.groups}
            if stage.errors is not None:
                found[f"{name}.errors"] = stage.errors
        return {f"{self.method}.{name}": value for name, value in found.items()}


Decisions = dict[tuple[str, int], CompressedTokens]  # by stage and the decoder layers that ran before it


@contextmanager
def listening(method: str) -> Iterator[Decisions]:
    """Collect what a registered method returns inside the block, the last call per stage; "none" decides nothing."""
    cls = type(get_method(method))
    decisions: Decisions = {}
    if not cls.stages:
        yield decisions
        return
    original = cls.__dict__["select"]

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        decided = original(self, tokens, keep, context)
        decisions[context.stage, context.layer] = decided
        return decided

    cls.select = select
    try:
        yield decisions
    finally:
        cls.select = original


def trace(method: str, result: CompressionResult, decisions: Decisions, answer: str) -> MethodTrace:
    """Bring a result of one sample with one image, and what the method decided, into the image's coordinates.

    Args:
        method: Its name in the picture.
        result: `apet.last_result` of the model.
        decisions: Collected by `listening` in the same call.
        answer: What the model said.
    """
    tokens = result.tokens_in[0][0]
    groups, before = np.arange(tokens), np.arange(tokens)
    stages = []
    for one in result.tower:
        kept, sources = one.kept[0][0].cpu().numpy(), one.sources[0][0].cpu().numpy()
        stages.append(StageTrace(f"tower layer {one.layer}", kept, sources, None))
        if result.config.tower_mode != "restore":
            groups, before = sources, kept
    for index, stage in enumerate(result.stages):
        decided = decisions.get(("vision" if stage.name == "vision" else "llm", stage.layer))
        kept = result.origin(index)[0][0].cpu().numpy()
        errors = None
        # Nothing was asked of the method where the budget reached the tokens there were.
        if decided is not None:
            sources = decided.sources[0].cpu().numpy()
            groups = np.where(groups < 0, -1, sources[groups.clip(min=0)])
            errors = _spread(decided.errors[0].float().cpu().numpy(), before, tokens)
        stages.append(StageTrace(stage.name, kept, groups, errors))
        before = kept
    return MethodTrace(method, result.layer_averaged_tokens[0], answer, tuple(stages))


def _spread(errors: np.ndarray, places: np.ndarray, tokens: int) -> np.ndarray | None:
    """Errors at the places of their patches; None for methods that have none and return zeros."""
    if not errors.any():
        return None
    spread = np.full(tokens, np.nan, dtype=np.float32)
    spread[places] = errors
    return spread
