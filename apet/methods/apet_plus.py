"""ApET+: ApET's reconstruction error, updated with every token that is kept.

Origin: this project, after ApET (arXiv 2602.19870). ApET measures once how badly a few basis tokens rebuild each
token and keeps the worst, so near-duplicates far from the basis are all kept. Here the basis grows with every kept
token: the next pick is the token that all picks so far rebuild worst. Attention-free, text-free and training-free
like ApET. Each part can be switched off:

- `projected`, `normalise`, `sinks`: the features in which errors are measured, behind the projector as the decoder gets
  them, and what becomes of tokens of extreme norm.
- `outlier`: weight on tokens that resemble the image's other tokens little (Cen-Prune, arXiv 2608.30263).
- `rounds`: residuals updated after every pick, or a few times only.
- `quota`: a guaranteed share of the budget for 4 x 4 windows, in proportion to their error mass.
- `merge`, `similarity_floor`, `size_weighted`: every dropped token joins its most similar kept token, of which all
  are targets, unless it resembles none; rows are means weighted by the image tokens behind each.
- `size_bias`: the logarithm of a row's size on its attention logits.
- `position_mode`: kept tokens stand where they stood among all tokens.
- `error_target`: fewer tokens where an image needs fewer. The result keeps its shape: rows beyond an image's count
  are zero with index -1 and stand last.
- `text`: weight on the question's relevance, off by default.

Rows are in raster order.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apet.config import POSITION_MODES
from apet.core.rows import gather_rows
from apet.core.types import CompressedTokens
from apet.methods._budget import vision_and_middle
from apet.methods._features import error_space, outlierness, sink_positions
from apet.methods._grid import grid_of, window_ids
from apet.methods._options import check_choice, check_range
from apet.methods._select import in_raster_order, marked, nearest_rows, own_rows, pool, wide
from apet.methods._text import min_max, text_relevance
from apet.methods._volume import Quota, Volume, greedy_volume
from apet.methods.base import Method, StageContext, register


@register
@dataclass(frozen=True)
class ApetPlus(Method):
    """Residual-updated selection with quota, merging and adaptive budget.

    Attributes:
        projected: Take tokens behind the projector; else in front of it, where the model has one of LLaVA's kind. With
            `text` always behind it.
        normalise: Features in which errors are measured: "raw", "unit" (norm 1), "centre" (minus the image's mean) or
            "centre_unit".
        sinks: Tokens of extreme norm: "keep" them as they are, "clip" their norms for the selection, or "merge" them
            into one kept token.
        sink_share: Share of the tokens that counts as extreme.
        outlier: Exponent of a token's dissimilarity to the others as a weight on its error; 0 is off.
        start: First pick: largest "norm", or "farthest" from the mean.
        rounds: Number of residual updates; 0 updates after every pick.
        ridge: Energy of every token, as a share of the mean, that counts as noise. Keeps errors apart when more tokens
            are kept than the features have dimensions; with 0 the rest is then taken in raster order.
        quota: Share of the budget guaranteed to windows by error mass; 0 is off.
        windows: Windows per side.
        basis: Picks after which the error mass is measured.
        merge: Merge dropped tokens; False drops them.
        similarity_floor: Dropped tokens less similar to every kept one are not merged; None merges all.
        size_weighted: Weight means with the sizes left by earlier stages.
        size_bias: Let rows count for as many tokens as they stand for in the decoder, where the host's attention can:
            in transformers, not in vLLM. `ApetConfig.size_bias` goes before it.
        position_mode: Where kept tokens stand in the decoder, where the host can: "keep", "compact", or "auto" for what
            the model's family was published with. `ApetConfig.position_mode` goes before it.
        error_target: Share of the energy that may remain unexplained; None spends the whole budget.
        min_keep: Fewest tokens with `error_target`.
        text: Exponent of the relevance to the text; 0 is off and needs no text.
    """

    name = "apet_plus"
    paper = "this project, after ApET"
    arxiv = "2602.19870"
    idea = "reconstruction error updated with every kept token, spatial quota, merging into all kept tokens"
    reads_sizes = True

    projected: bool = True
    normalise: str = "raw"
    sinks: str = "clip"
    sink_share: float = 0.01
    outlier: float = 1.0
    start: str = "farthest"
    rounds: int = 0
    ridge: float = 1e-3
    quota: float = 0.25
    windows: int = 4
    basis: int = 10
    merge: bool = True
    similarity_floor: float | None = 0.5
    size_weighted: bool = True
    size_bias: bool = True
    position_mode: str = "keep"
    error_target: float | None = None
    min_keep: int = 1
    text: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "normalise", ("raw", "unit", "centre", "centre_unit"))
        check_choice(self, "sinks", ("keep", "clip", "merge"))
        check_choice(self, "start", ("norm", "farthest"))
        check_choice(self, "position_mode", POSITION_MODES)
        check_range(self, ("quota", "sink_share"), 0, 1)
        check_range(self, ("basis", "outlier", "rounds", "ridge", "text"), 0)
        check_range(self, ("windows", "min_keep"), 1)
        if self.error_target is not None:
            check_range(self, ("error_target",), 0, 1)

    @property
    def features(self) -> str:
        """Text can be compared with tokens behind the projector only."""
        return "post_projector" if self.projected or self.text else "pre_projector"

    @property
    def adaptive(self) -> bool:
        """With an error target."""
        return self.error_target is not None

    def needs(self, stage: str) -> dict[str, tuple[int, ...]]:
        if not self.text:
            return {}
        return {"text_embeddings": ()} | ({"text_hidden": ()} if stage == "llm" else {})

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Pick, cut to the error target, merge, and put into raster order."""
        x = wide(tokens)
        sinks = sink_positions(x, self.sink_share, keep) if self.sinks == "merge" else None
        space = error_space(x, self.normalise, self.sink_share if self.sinks == "clip" else 0.0)
        kernel = self._kernel(space)
        total = kernel.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)
        volume = self._pick(tokens, kernel, keep, context, self._first(space, sinks), sinks)
        indices = volume.picks
        if self.error_target is not None:
            indices = torch.where(self._spent(volume, total), indices, -1)
        result = in_raster_order(tokens, *self._rows(x, indices, sinks, context), volume.residual.sqrt())
        return result._replace(basis=volume.picks)

    def _kernel(self, space: Tensor) -> Tensor:
        """Inner products (B, N, N), with the noise on the diagonal."""
        kernel = space @ space.transpose(1, 2)
        if self.ridge:
            diagonal = kernel.diagonal(dim1=1, dim2=2)
            diagonal += self.ridge * diagonal.mean(-1, keepdim=True)
        return kernel

    def _first(self, space: Tensor, sinks: Tensor | None) -> Tensor:
        """First pick (B,): the largest sink where sinks are merged."""
        if sinks is not None:
            return sinks[:, 0]
        origin = space.mean(1, keepdim=True) if self.start == "farthest" else 0
        return (space - origin).square().sum(-1).argmax(-1)

    def _pick(
        self, tokens: Tensor, kernel: Tensor, keep: int, context: StageContext, first: Tensor, sinks: Tensor | None
    ) -> Volume:
        n = kernel.shape[1]
        quota = None
        if self.quota:
            groups = window_ids(grid_of(context, n), self.windows, kernel.device)
            quota = Quota(groups, self.windows**2, self.quota, min(self.basis, keep // 4))
        return greedy_volume(
            kernel,
            keep,
            weight=self._weight(tokens, context),
            first=first,
            barred=None if sinks is None else marked(sinks[:, 1:], n),
            rounds=self.rounds,
            quota=quota,
        )

    def _weight(self, tokens: Tensor, context: StageContext) -> Tensor | None:
        """Factors (B, N) on the residual energy, the square of what errors are weighted with; None for none."""
        weight = outlierness(wide(tokens)) ** (2 * self.outlier) if self.outlier else None
        if not self.text:
            return weight
        relevance = self._relevance(tokens, context) ** (2 * self.text)
        return relevance if weight is None else weight * relevance

    def _relevance(self, tokens: Tensor, context: StageContext) -> Tensor:
        """(B, N) relevance to the text, scaled to (0, 1]."""
        text, mask = context.ask(self, "text_embeddings")
        if context.stage == "llm":
            text = context.ask(self, "text_hidden")
        return min_max(text_relevance(tokens, text, mask))

    def _spent(self, volume: Volume, total: Tensor) -> Tensor:
        """(B, keep) bool, False for picks after the error target was met."""
        open_before = torch.cat([total, volume.energy[:, :-1]], 1) > self.error_target * total
        rank = torch.arange(open_before.shape[1], device=total.device)
        return open_before | (rank < self.min_keep)

    def _rows(
        self, x: Tensor, indices: Tensor, sinks: Tensor | None, context: StageContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features, indices and source map in pick order."""
        keep, n = indices.shape[1], x.shape[1]
        if not self.merge:
            real = indices >= 0
            sources = own_rows(torch.where(real, indices, n), n + 1)[:, :n]
            return gather_rows(x, indices.clamp(min=0)) * real.unsqueeze(-1), indices, sources
        sources = nearest_rows(x, indices, self.similarity_floor)
        if sinks is not None:
            sources = sources.scatter(1, sinks, 0)
        sizes = context.sizes if self.size_weighted else None
        return pool(x, sources, keep, sizes), indices, sources

    def plan(self, average: float, tokens: int, layers: int) -> dict[str, Any]:
        """As `apet`: (288, 96), (192, 64) and (96, 32) for 192, 128 and 64 tokens of LLaVA-1.5."""
        return vision_and_middle(average, tokens, layers)
