"""The tower stage: fewer patches go through the later layers of a vision tower.

The layers keep handing whole hidden states to each other, so that notes, recorded states and the host's counts hold;
of these only the rows that are left are computed. "merge" drops the content of the others into them (and `VisionStage`
never chooses the others); after "restore" every row is there again.

"restore" follows IPCV (arXiv 2512.18747): keep the patches that the last layer changed most; in the keys and values of
the next layers the others stand as their saved state plus the mean change of their nearest kept patches since, and all
are put back that way behind the last layer. What the paper leaves open is decided here: ties go to the lower position,
the ten nearest by Euclidean distance of the saved states count, the class token is always computed and no neighbour,
and the rows in between hold the same estimate in every layer, which is what methods see that read the tower.
"lossless" leaves patches out in front of the first layer (`tower_pixels`).
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.attention import Exchanged, biased, plain
from apet.adapters.hooks import InFlight, Removable, Wrapped
from apet.adapters.stages import Select, budget_for
from apet.adapters.tower_pixels import patches_of, unpredicted
from apet.core.types import token_sizes

NEIGHBOURS = 10
_PREFIX = "apet_tower_"
# Logit of a row that only fills up a shorter crop: no share of any softmax, and finite in float16.
_NEVER = -1e4


@dataclass(frozen=True)
class TowerStage:
    """What to do between the layers of a tower.

    Attributes:
        mode: "merge", "restore" or "lossless".
        budgets: Patches per crop left (count or share) after so many layers.
        selects: The method of "merge", after so many layers.
        key_layers: Layers behind a "restore" cut whose keys and values hold the other patches too.
    """

    mode: str
    budgets: Mapping[int, int | float]
    selects: Mapping[int, Select] = field(default_factory=dict)
    key_layers: int = 0


@dataclass(frozen=True)
class TowerCut:
    """What was left of C crops of R rows each.

    Attributes:
        mode: That of the stage.
        layer: Layers that ran before.
        length: R, the class token included.
        first: Rows in front of the patches: 1 with a class token.
        rows: (C, n) int64 rows that go on, ascending; R fills up shorter crops.
        sizes: (C, n) float32 patches that each of them stands for.
        sources: (C, R - first) int64 which of the patches left holds a patch's content; None where none was merged.
    """

    mode: str
    layer: int
    length: int
    first: int
    rows: Tensor
    sizes: Tensor
    sources: Tensor | None = None

    @property
    def log_sizes(self) -> Tensor:
        """(C, n) what is added to the attention logits of the rows."""
        return torch.where(self.rows == self.length, _NEVER, self.sizes.log())

    def spread(self, values: Tensor, rest: float) -> Tensor:
        """(C, R) values (C, n) of the rows at their places, `rest` elsewhere."""
        full = values.new_full((len(values), self.length + 1), rest)
        return full.scatter(1, self.rows, values)[:, :-1]

    def of(self, crops: slice) -> tuple[Tensor, Tensor]:
        """Of the image that some crops show: patches left (K,), counted through its crops, and `sources` likewise."""
        patches = self.length - self.first
        left = self.rows[crops, self.first :] - self.first
        real = left < patches
        offsets = torch.arange(len(left), device=left.device).unsqueeze(-1)
        if self.sources is None:
            sources = torch.full((len(left), patches), -1, device=left.device)
            numbers = torch.arange(left.shape[1], device=left.device).expand_as(left)
            sources = nn.functional.pad(sources, (0, 1)).scatter(1, left, numbers)[:, :-1]
        else:
            sources = self.sources[crops]
        before = nn.functional.pad(real.sum(1).cumsum(0)[:-1], (1, 0)).unsqueeze(-1)
        sources = torch.where(sources < 0, -1, sources + before)
        kept = left + offsets * patches
        return kept.flatten() if self.mode != "lossless" else kept[real], sources.flatten()

    def tokens_alive(self, crops: slice, count: int) -> np.ndarray:
        """Of the `count` tokens that some crops become, row by row, which go on. Waits for the device."""
        length = count // (crops.stop - crops.start)
        return self.alive(length)[crops].flatten().cpu().numpy()

    def token_sizes(self, crops: slice, count: int) -> Tensor:
        """Tokens behind each of them."""
        length = count // (crops.stop - crops.start)
        return self.spread(self.sizes, 1.0)[crops, -length:].flatten()

    def alive(self, length: int) -> Tensor:
        """(C, length) bool, which of the last `length` rows go on: of the patches, or of all."""
        return self.spread(torch.ones_like(self.rows, dtype=torch.bool), False)[:, -length:]


@dataclass(eq=False)
class _Run:
    """One call of a tower in flight.

    Attributes:
        encoding: The encoder call it is part of.
        pixels: (C, 3, height, width) of "lossless".
        cut: What is left now; None before the first cut.
        saved: Of "restore", the hidden states (C, R, D) at the cut.
        others: (C, m) rows that do not go on.
        near: (C, m, k) places of their nearest kept rows in `cut.rows`.
    """

    encoding: Any
    pixels: Tensor | None = None
    cut: TowerCut | None = None
    saved: Tensor | None = None
    others: Tensor | None = None
    near: Tensor | None = None


@dataclass(frozen=True)
class Extra:
    """What a layer's attention gets beside its rows.

    Attributes:
        bias: (C, n) for the logits of its keys.
        keys: Of further rows: (C, m, D), heads side by side, or (C, heads, m, d).
        values: The same.
    """

    bias: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    def take(self, queries: int) -> "Extra":
        """What belongs to the next call of the attention function."""
        return self


def exchange_attention(towers: Sequence[nn.Module], extras: InFlight) -> list[Removable]:
    """Let the attention of towers take what `extras` has in flight; returns the handles."""
    handles = []
    for config in {id(tower.config): tower.config for tower in towers}.values():
        own = [tower for tower in towers if tower.config is config]
        modules = [module for tower in own for module in host.tower_attention_modules(tower)]
        handles += Exchanged(config, modules, _PREFIX, _attend, extras).attach()
    return handles


class Reduction(ABC):
    """Runs the stage in one tower, inside encoder calls.

    Args:
        tower: Vision model.
        layers: Its layers.
        stage: What to do.
        encodings: Encoder calls in flight; outside of any the tower is left alone.
        extras: What the attention function in flight adds.
    """

    def __init__(
        self,
        tower: nn.Module,
        layers: Sequence[nn.Module],
        stage: TowerStage,
        encodings: InFlight,
        extras: InFlight,
    ) -> None:
        self._tower, self._layers, self._stage = tower, layers, stage
        self._encodings, self._extras, self._runs = encodings, extras, InFlight()

    def attach(self) -> list[Removable]:
        """Wrap the tower and its layers; returns the handles."""
        layers = [
            Wrapped(layer, "forward", functools.partial(self._run_layer, index))
            for index, layer in enumerate(self._layers)
        ]
        return [Wrapped(self._tower, "forward", self._run_tower), *layers]

    def _run_tower(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        encoding = self._encodings.top
        if encoding is None:
            return original(*args, **kwargs)
        with self._runs.during(self._open(encoding, original, args, kwargs)):
            return original(*args, **kwargs)

    def _run_layer(self, index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        run = self._runs.top
        if run is None:
            return original(*args, **kwargs)
        before = host.layer_hidden(args, kwargs)
        if index == 0 and run.pixels is not None:
            self._leave_out(run, before)
        if run.cut is None:
            hidden = original(*args, **kwargs)
        else:
            hidden = self._through(run, index, before, original, args, kwargs)
        return self._cut(run, index + 1, before, hidden) if index + 1 in self._stage.budgets else hidden

    @abstractmethod
    def _open(self, encoding: Any, original: Any, args: tuple, kwargs: dict) -> Any:
        """What is known of a call of the tower before it runs."""

    @abstractmethod
    def _leave_out(self, run: Any, hidden: Tensor) -> None:
        """Leave out, in front of the first layer, what neighbours predict. Waits for the device."""

    @abstractmethod
    def _through(self, run: Any, index: int, hidden: Tensor, original: Any, args: tuple, kwargs: dict) -> Tensor:
        """A layer for what is left of `hidden`; returns all rows."""

    @abstractmethod
    def _cut(self, run: Any, layer: int, before: Tensor, hidden: Tensor) -> Tensor:
        """Leave less of `hidden` behind a layer that was given `before`; returns all rows."""


class TowerReduction(Reduction):
    """The stage in a tower that has one row of patches per crop."""

    def __init__(self, tower: nn.Module, stage: TowerStage, encodings: InFlight, extras: InFlight) -> None:
        super().__init__(tower, host.tower_layers(tower), stage, encodings, extras)
        self._first = int(host.has_class_token(tower))

    def _open(self, encoding: Any, original: Any, args: tuple, kwargs: dict) -> _Run:
        pixels = host.tower_pixels(original, args, kwargs) if self._stage.mode == "lossless" else None
        return _Run(encoding, pixels)

    @torch.compiler.disable
    def _leave_out(self, run: _Run, hidden: Tensor) -> None:
        """Leave out the patches of `hidden` (C, R, D) that their neighbours predict. Waits for the device."""
        length, first = hidden.shape[1], self._first
        keep = unpredicted(patches_of(run.pixels, host.patch_side(self._tower))).flatten(1)
        host.check_patches(keep.shape[1] == length - first)
        if keep.all():
            return
        places = torch.arange(first, length, device=hidden.device)
        rows = torch.where(keep, places, length).sort(-1).values[:, : int(keep.sum(1).max())]
        rows = torch.cat([torch.arange(first, device=rows.device).expand(len(rows), -1), rows], 1)
        run.cut = TowerCut(self._stage.mode, 0, length, first, rows, torch.ones(rows.shape, device=rows.device))
        run.encoding.cuts.append(run.cut)

    @torch.compiler.disable
    def _through(self, run: _Run, index: int, hidden: Tensor, original: Any, args: tuple, kwargs: dict) -> Tensor:
        """A layer for the rows that are left of `hidden` (C, R, D); returns all rows."""
        host.check_no_tower_mask(args, kwargs)
        extra, cut = Extra(), run.cut
        if cut.mode != "restore":
            extra = Extra(bias=cut.log_sizes)
        elif index < cut.layer + self._stage.key_layers:
            extra = Extra(None, *host.tower_keys_values(self._layers[index], _rows(hidden, run.others)))
        args, kwargs = host.with_hidden(args, kwargs, _rows(hidden, cut.rows))
        with self._extras.during(extra):
            inner = original(*args, **kwargs)
        if cut.mode == "lossless":  # what only fills up shorter crops goes behind the last row, and is lost
            return _put(nn.functional.pad(hidden, (0, 0, 0, 1)), cut.rows, inner)[:, :-1]
        hidden = _put(hidden, cut.rows, inner)
        if cut.mode == "merge":
            return hidden
        change = inner - _rows(run.saved, cut.rows)
        return _put(hidden, run.others, _rows(run.saved, run.others) + mean_of(change, run.near))

    @torch.compiler.disable
    def _cut(self, run: _Run, layer: int, before: Tensor, hidden: Tensor) -> Tensor:
        """Leave fewer rows of `hidden` (C, R, D) behind a layer that was given `before`; returns all rows."""
        cut = run.cut or whole_cut(self._stage.mode, hidden, self._first)
        patches = cut.rows.shape[1] - self._first
        keep = budget_for(self._stage.budgets[layer], patches, 0, 1)
        if keep >= patches:
            return hidden
        if self._stage.mode == "restore":
            run.cut, run.others, run.near = changed_most(cut, layer, keep, before, hidden)
            run.saved = hidden
        else:
            run.cut, inner = merged(cut, layer, keep, self._stage.selects[layer], _rows(hidden, cut.rows))
            hidden = _put(hidden, run.cut.rows, inner)
        run.encoding.cuts.append(run.cut)
        return hidden


def whole_cut(mode: str, hidden: Tensor, first: int) -> TowerCut:
    """All rows of crops (C, R, D)."""
    crops, length = hidden.shape[:2]
    rows = torch.arange(length, device=hidden.device).expand(crops, -1)
    return TowerCut(mode, 0, length, first, rows, torch.ones(rows.shape, device=rows.device))


def merged(before: TowerCut, layer: int, keep: int, select: Select, inner: Tensor) -> tuple[TowerCut, Tensor]:
    """The method's choice among the rows `inner` (C, n, D) that were left before, and the new rows (C, n', D)."""
    first = before.first
    sizes = before.sizes[:, first:]
    result = select(inner[:, first:], keep, sizes=sizes)
    rows = torch.cat([before.rows[:, :first], before.rows[:, first:].gather(1, result.indices)], 1)
    left = torch.cat([before.sizes[:, :first], token_sizes(result, sizes)], 1)
    sources = result.sources
    if before.sources is not None:
        sources = torch.where(before.sources < 0, -1, sources.gather(1, before.sources.clamp(min=0)))
    cut = TowerCut(before.mode, layer, before.length, first, rows, left, sources)
    return cut, torch.cat([inner[:, :first], result.tokens], 1)


def changed_most(
    whole: TowerCut, layer: int, keep: int, before: Tensor, after: Tensor
) -> tuple[TowerCut, Tensor, Tensor]:
    """The patches that a layer changed most, the other rows (C, m), and which kept rows are nearest to these."""
    first = whole.first
    change = (after - before)[:, first:].float().square().sum(-1)
    order = change.sort(dim=-1, descending=True, stable=True).indices + first
    kept, others = order[:, :keep].sort(-1).values, order[:, keep:].sort(-1).values
    distance = torch.cdist(_rows(after, others).float(), _rows(after, kept).float())
    near = distance.sort(dim=-1, stable=True).indices[..., :NEIGHBOURS] + first
    rows = torch.cat([whole.rows[:, :first], kept], 1)
    cut = TowerCut(whole.mode, layer, whole.length, first, rows, torch.ones(rows.shape, device=rows.device))
    return cut, others, near


def _attend(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention function `base`, with what the run in flight adds."""
    attend, found = host.attention_function(base, module), plain(module)
    extra = Extra() if found.extras.top is None else found.extras.top.take(query.shape[2])
    if extra.keys is not None:
        key, value = torch.cat([key, _heads(extra.keys, key)], 2), torch.cat([value, _heads(extra.values, value)], 2)
    if extra.bias is None:
        return attend(found.module, query, key, value, *args, **kwargs)
    return biased(attend, found.module, query, key, value, extra.bias, *args, **kwargs)


def _heads(flat: Tensor, like: Tensor) -> Tensor:
    """(C, m, heads * d) as (C, heads, m, d), heads as `like` has them."""
    return flat if flat.dim() == 4 else flat.view(*flat.shape[:2], like.shape[1], like.shape[3]).transpose(1, 2)


def _rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """(C, n, D) rows of (C, R, D); any row where `rows` is R."""
    rows = rows.clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[2]))


def _put(hidden: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """`hidden` (C, R, D) with `new` (C, n, D) in the place of rows."""
    return hidden.scatter(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[2]), new)


def mean_of(values: Tensor, places: Tensor) -> Tensor:
    """(C, m, D) means of the rows `places` (C, m, k) of `values` (C, n, D)."""
    crops, count, width = values.shape
    numbers = places + torch.arange(crops, device=places.device).view(-1, 1, 1) * count
    means = nn.functional.embedding_bag(numbers.flatten(0, 1), values.reshape(-1, width), mode="mean")
    return means.view(crops, -1, width)
