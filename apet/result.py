"""What a patched model did in its last prefill: kept tokens per stage, counts per layer, layer-averaged budget."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from apet.config import ApetConfig


@dataclass(frozen=True)
class StageResult:
    """One stage of one prefill.

    Attributes:
        name: "vision" or "layer L", L counted from 1: the stage ran after that layer.
        layer: Number of decoder layers that ran before the stage (0 for "vision").
        kept: ``kept[sample][image]`` int64 (K,) positions kept, relative to the tokens of the image or video that
            entered the stage; ascending, except that frames with an appended basis are in the order of their rows.
        tokens_in: ``tokens_in[sample][image]`` tokens that entered.
    """

    name: str
    layer: int
    kept: tuple[tuple[Tensor, ...], ...]
    tokens_in: tuple[tuple[int, ...], ...]

    @property
    def tokens_out(self) -> tuple[tuple[int, ...], ...]:
        """``tokens_out[sample][image]`` tokens that the stage left."""
        return tuple(tuple(len(kept) for kept in images) for images in self.kept)


@dataclass(frozen=True)
class TowerResult:
    """One stage inside the vision tower, in one prefill.

    Attributes:
        layer: Layers of the tower that ran before.
        kept: ``kept[sample][image]`` int64 (K,) patches that the later layers computed, ascending, counted through the
            crops or frames of the image or video; the class token is none of them.
        sources: ``sources[sample][image]`` int64 (P,) which of the K kept ones holds a patch's content; -1 where it was
            dropped (after "restore" for a while, after "lossless" because another patch shows the same).
    """

    layer: int
    kept: tuple[tuple[Tensor, ...], ...]
    sources: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class CompressionResult:
    """Everything `apet.last_result` reports. Tensors stay on the model's device until they are read.

    Attributes:
        config: Configuration in force.
        num_layers: Decoder layers of the model.
        stages: Stages in the order they ran, the vision stage first. A configured stage whose budget reached an image's
            length is listed too, with everything kept.
        tokens_in: ``tokens_in[sample][image]`` visual tokens of the prompt before compression.
        tower: Stages inside the vision tower, in the order they ran. What they merge away is missing from `kept` of the
            vision stage, whose positions count all tokens as without them.
    """

    config: ApetConfig
    num_layers: int
    stages: tuple[StageResult, ...]
    tokens_in: tuple[tuple[int, ...], ...]
    tower: tuple[TowerResult, ...] = ()

    def origin(self, stage: int = -1) -> tuple[tuple[Tensor, ...], ...]:
        """Positions left by `stage`, traced back to the image's tokens before compression: ``[sample][image]`` (K,)."""
        traced = None
        for result in self.stages[: stage % len(self.stages) + 1] if self.stages else ():
            if traced is None:
                traced = result.kept
            else:
                traced = tuple(
                    tuple(before[kept] for before, kept in zip(*images, strict=True))
                    for images in zip(traced, result.kept, strict=True)
                )
        return traced or ()

    @cached_property
    def tokens_per_layer(self) -> list[list[int]]:
        """``[sample][layer]`` visual tokens that each decoder layer processes."""
        per_sample = []
        for sample, images in enumerate(self.tokens_in):
            counts = [sum(images)] * self.num_layers
            for stage in self.stages:
                counts[stage.layer :] = [sum(stage.tokens_out[sample])] * (self.num_layers - stage.layer)
            per_sample.append(counts)
        return per_sample

    @property
    def layer_averaged_tokens(self) -> list[float]:
        """Visual tokens per sample, averaged over the decoder layers: the budget papers state."""
        return [sum(counts) / self.num_layers for counts in self.tokens_per_layer]
