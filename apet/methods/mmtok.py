"""MMTok: greedy coverage of the question and of the image at once.

Paper: MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs, arXiv 2508.18264. Rows to cover: for
each text token a softmax over the image's tokens of its cosines behind the projector (temperature 0.02), divided by
the number of text tokens; for each image token a softmax of its cosines in front of the projector (0.2), divided by N
and weighted with alpha = 0.5. The next pick has the largest gain in the sum of row maxima. Needs text and both
feature spaces, no attention. ``text=False`` leaves the image part: soft coverage, text-free.

Deviation: text is what the patch provides (the prompt behind the image), not the bare question.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apet.core.types import CompressedTokens
from apet.methods._greedy import greedy_coverage
from apet.methods._options import check_range
from apet.methods._select import cosine, pruned
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class MMTok(Method):
    """Maximum coverage of text and image.

    Attributes:
        text_temperature: tau_t (0.02 for LLaVA, 0.01 for Qwen2.5-VL).
        image_temperature: tau_v.
        alpha: Weight of the image part.
        text: Cover the text at all.
    """

    name = "mmtok"
    paper = "MMTok"
    arxiv = "2508.18264"
    idea = "greedy coverage of text and image tokens"
    stages = ("vision",)
    features = "post_projector"
    needs_vision_features = True
    needs_text_embeddings = True

    text_temperature: float = 0.02
    image_temperature: float = 0.2
    alpha: float = 0.5
    text: bool = True

    def __post_init__(self) -> None:
        check_range(self, ("text_temperature", "image_temperature"), 1e-3)
        check_range(self, ("alpha",), 0)

    def needs(self, stage: str) -> dict[str, tuple[int, ...]]:
        declared = super().needs(stage)
        return declared if self.text else {name: need for name, need in declared.items() if name != "text_embeddings"}

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Keep the greedy covering set."""
        features = context.ask(self, "vision_features")
        matrix = (cosine(features) / self.image_temperature).softmax(-1) * (self.alpha / tokens.shape[1])
        if self.text:
            text, mask = context.ask(self, "text_embeddings")
            rows = (cosine(text, tokens) / self.text_temperature).softmax(-1)
            share = mask / mask.sum(-1, keepdim=True).clamp(min=1)
            matrix = torch.cat([rows * share.unsqueeze(-1), matrix], 1)
        return pruned(tokens, greedy_coverage(matrix, keep).sort(dim=-1).values)
