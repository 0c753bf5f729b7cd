"""A place where sequences are shortened: what is kept there (`choose`), and how they become shorter (`gather`).

Pure functions of layouts and tensors: no model, no state.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from apet.adapters.layout import Block, Layout, Segment, Unit, follows, to_device
from apet.core.types import CompressedTokens, token_sizes

Budget = int | float | Sequence[int] | None


class Select(Protocol):
    """A compression method bound to one stage.

    Attributes:
        features: Where a vision stage reads tokens: "pre_projector" or "post_projector".
        adaptive: Whether a block may get fewer rows than asked for; missing ones have index -1 and stand last.
        needs: Inputs the method asks for, by name, with their layers.
        reads_sizes: Whether it weighs rows with the tokens folded into them.
        size_bias: Whether sizes go into the decoder's attention.
    """

    features: str
    adaptive: bool
    needs: Mapping[str, tuple[int, ...]]
    reads_sizes: bool
    size_bias: bool

    def __call__(
        self,
        tokens: Tensor,
        keep: int,
        *,
        grid: tuple[int, int] | None = None,
        sizes: Tensor | None = None,
        inputs: Any = None,
    ) -> CompressedTokens:
        """Reduce blocks (B, N, D) to `keep` rows.

        `grid` is (rows, columns) of a full raster, `sizes` (B, N) the image tokens behind every row, `inputs` what the
        method may ask for.
        """


class Provider(Protocol):
    """What methods may ask for beside the tokens, at one stage."""

    def asked_length(self, needs: Mapping[str, tuple[int, ...]], unit: Unit) -> int | None:
        """Length of a unit's inputs where it can differ between units of equal length."""

    def inputs(self, group: "Group") -> Any:
        """`apet.methods.context.StageInputs` of the candidates of a group."""


@dataclass(frozen=True)
class Stage:
    """One place where sequences are shortened.

    Attributes:
        name: "vision" or "layer L".
        layer: 0-based index of the layer in front of which it acts.
        budget: Tokens per image: count, share (float), one count per image, or None for all.
        select: The method, or None where the projector hooks have already compressed the rows.
        window: Only the first so many tokens of an image take part, the others stay (the published accounting of anyres
            images); None for all of them.
        pool: Tokens that share a budget: those of an "item" (image or video), of a "segment" of it (frame, tile), or of
            the whole "prompt".
        videos: The same stage for videos where they are treated differently from images.
        per_crop: A count is for every crop of an image; the image's tokens are chosen from together all the same.
    """

    name: str
    layer: int
    budget: Budget
    select: Select | None
    window: int | None = None
    pool: str = "item"
    videos: "Stage | None" = None
    per_crop: bool = False

    def rule(self, part: Block | Segment) -> "Stage":
        """The stage as it treats an image or a video."""
        return self.videos if part.video and self.videos is not None else self

    def unit_key(self, block: Block) -> Any:
        """Equal for blocks of a row that are chosen from together."""
        pool = self.rule(block).pool
        return -1 if pool == "prompt" else (pool, block.segment if pool == "segment" else block.item)


@dataclass(frozen=True)
class StageRun:
    """What a stage did to every image and video of the prompt.

    Attributes:
        stage: The stage.
        items: The images and videos as they are in the prompt.
        lengths: Tokens of each that entered the stage.
        kept: Positions of the kept ones among these.
    """

    stage: Stage
    items: tuple[Unit, ...]
    lengths: tuple[int, ...]
    kept: tuple[Tensor, ...]


@dataclass(frozen=True)
class Choice:
    """What a stage keeps of one unit.

    Attributes:
        way: Number of columns kept where only the device knows which, or their positions in the unit.
        indices: (K,) kept positions in the unit.
        tokens: (K', D) new content of kept tokens, None where they stay as they are.
        places: (K',) columns of the shortened unit that `tokens` go to; all of them without `tokens`.
        sizes: (K',) image tokens behind each of them, if anything asks for sizes.
    """

    way: int | np.ndarray
    indices: Tensor
    tokens: Tensor | None = None
    places: np.ndarray | None = None
    sizes: Tensor | None = None

    @property
    def count(self) -> int:
        """Columns kept."""
        return self.way if isinstance(self.way, int) else len(self.way)


def whole(unit: Unit, device: torch.device) -> Choice:
    """All columns of a unit, but those without content."""
    if unit.blank is not None:
        columns = np.flatnonzero(~unit.blank)
        return Choice(columns, torch.from_numpy(columns))
    way = unit.length if len(unit.blocks) == 1 else np.arange(unit.length)
    return Choice(way, torch.arange(unit.length, device=device))


def candidates_of(stage: Stage, unit: Unit) -> np.ndarray:
    """Positions in a unit that a stage chooses from: newlines and class tokens follow others and are no candidates."""
    if stage.window is not None:
        return np.arange(min(stage.window, unit.length))
    return np.arange(unit.length) if unit.lines is None else np.flatnonzero(unit.lines > -2)


def is_simple(unit: Unit, candidates: np.ndarray) -> bool:
    """Whether the shortened unit is what was kept, in one place: then the host need not know which columns stay."""
    return len(unit.blocks) == 1 and len(candidates) == unit.length


def method_choice(tokens: Tensor, indices: np.ndarray, unit: Unit, candidates: np.ndarray) -> Choice:
    """The method's decision (`indices` among the candidates) as columns of the unit."""
    lines = unit.lines
    chosen = candidates[indices]
    keep = np.ones(unit.length, dtype=bool)
    keep[candidates] = False
    if lines is not None and len(candidates) == (lines > -2).sum():
        alive = np.zeros_like(keep)
        alive[chosen] = True
        keep = follows(lines, alive)
    if (np.diff(chosen) > 0).all():
        keep[chosen] = True
        columns = np.flatnonzero(keep)
        return Choice(columns, torch.from_numpy(columns), tokens, np.searchsorted(columns, chosen))
    # Rows in an order of their own stay together, behind what stood in front of them.
    others = np.flatnonzero(keep)
    front = others[others < candidates[0]]
    columns = np.concatenate([front, chosen, others[len(front) :]])
    return Choice(columns, torch.from_numpy(columns), tokens, len(front) + np.arange(len(chosen)))


def ways_of(layout: Layout, units: Sequence[Unit], choices: Sequence[Choice]) -> list[int | np.ndarray]:
    """What `Layout.shorten` wants: per block, in its order, the columns kept or their number."""
    ways: dict[Block, int | np.ndarray] = {}
    for unit, choice in zip(units, choices, strict=True):
        for block, first in unit.parts():
            way = choice.way
            if len(unit.blocks) > 1:
                way = way[(first <= way) & (way < first + block.length)] - first
            ways[block] = way
    return [ways[block] for block in layout.blocks()]


def report(stage: Stage, items: Sequence[Unit], units: Sequence[Unit], choices: Sequence[Choice]) -> StageRun:
    """What was kept of every image or video, whichever way the stage pooled their tokens."""
    kept: dict[tuple[int, int], list[Tensor]] = {(item.row, item.item): [] for item in items}
    lengths = dict.fromkeys(kept, 0)
    for unit, choice in zip(units, choices, strict=True):
        whole = len({block.item for block in unit.blocks}) == 1
        for block, first in [(unit, 0)] if whole else unit.parts():
            key, last = (unit.row, block.item), first + block.length
            indices = choice.indices
            if not whole:
                indices = torch.from_numpy(choice.way[(first <= choice.way) & (choice.way < last)] - first)
            kept[key].append(indices + lengths[key] if lengths[key] else indices)
            lengths[key] += block.length
    parts = [torch.cat(part) if len(part) > 1 else part[0] if part else torch.arange(0) for part in kept.values()]
    return StageRun(stage, tuple(items), tuple(lengths.values()), tuple(parts))


def choose(
    stage: Stage, units: Sequence[Unit], hidden: Tensor, sizes: Tensor | None, provider: Provider | None
) -> list[Choice]:
    """Let the method choose, for all units with equally many candidates and the same budget at once.

    Args:
        stage: The stage.
        units: What it chooses from.
        hidden: (B, L, D) the sequences.
        sizes: (B, L) image tokens behind every column, if anything asks for them.
        provider: What methods may ask for, None if none asks for anything.
    """
    choices = [whole(unit, hidden.device) for unit in units]
    rules = [stage.rule(unit.blocks[0]) for unit in units]
    candidates = [candidates_of(rule, unit) for rule, unit in zip(rules, units, strict=True)]
    counts = _counts(rules, units, candidates)
    for rule in {id(rule): rule for rule in rules}.values():
        own = [count if its is rule else None for its, count in zip(rules, counts, strict=True)]
        for group in groups_of(rule.select, units, candidates, own, provider, hidden.device):
            found = group.select(rule.select, hidden, sizes, provider)
            for member, choice in zip(group.members, _choices(group, rule.select, found, sizes), strict=True):
                choices[member] = choice or choices[member]
    return choices


@dataclass(frozen=True)
class Group:
    """Units that one call of the method serves.

    Attributes:
        members: Their numbers among the stage's units.
        units: The units.
        candidates: Of each, (n,) positions to choose from.
        count: Tokens to keep of each.
        grid: Raster of their candidates.
        columns: (G, n) columns of the candidates in their rows.
        rows: (G, 1) rows of the units, on the device.
        places: `columns` on the device.
    """

    members: list[int]
    units: list[Unit]
    candidates: list[np.ndarray]
    count: int
    grid: tuple[int, int] | None
    columns: np.ndarray
    rows: Tensor
    places: Tensor

    def select(
        self, select: Select, hidden: Tensor, sizes: Tensor | None, provider: Provider | None
    ) -> CompressedTokens:
        """The method's decision about the candidates' columns of `hidden` (B, L, D)."""
        inputs = None if provider is None else provider.inputs(self)
        own = None if sizes is None else sizes[self.rows, self.places]
        return select(hidden[self.rows, self.places], self.count, grid=self.grid, sizes=own, inputs=inputs)


def groups_of(
    select: Select,
    units: Sequence[Unit],
    candidates: Sequence[np.ndarray],
    counts: Sequence[int | None],
    provider: Provider | None,
    device: torch.device,
) -> Iterator[Group]:
    """Units that lose tokens, those that can share a call of the method together.

    Only candidates enter the batch, so that no method can choose another column or be influenced by it.

    Args:
        select: The method.
        units: Units of the stage.
        candidates: Of each, (n,) positions to choose from.
        counts: Tokens to keep of each; None for one that is no business of the method's.
        provider: What methods may ask for, None if none asks for anything.
        device: Where the tokens are.
    """
    keys = []
    for unit, places, count in zip(units, candidates, counts, strict=True):
        asked = None if provider is None else provider.asked_length(select.needs, unit)
        key = (len(places), count, grid_of(unit, len(places)), asked)
        keys.append(None if count is None or count >= len(places) else key)
    for members in equal(keys):
        own = [units[member] for member in members]
        chosen = [candidates[member] for member in members]
        columns = np.stack([unit.columns[places] for unit, places in zip(own, chosen, strict=True)])
        rows = to_device(np.array([[unit.row] for unit in own]), device)
        _, count, grid, _ = keys[members[0]]
        yield Group(members, own, chosen, count, grid, columns, rows, to_device(columns, device))


def _choices(group: Group, select: Select, result: CompressedTokens, sizes: Tensor | None) -> list[Choice | None]:
    """The method's choice for every unit of a group; None where it would not make the unit shorter."""
    if result.indices.shape[1] >= group.columns.shape[1]:
        return [None] * len(group.units)  # with the basis appended there would be no fewer rows than before
    pairs = list(zip(group.units, group.candidates, strict=True))
    simple = [not select.adaptive and is_simple(unit, candidates) for unit, candidates in pairs]
    known = None if all(simple) else result.indices.cpu().numpy()
    folded = None if sizes is None else token_sizes(result, sizes[group.rows, group.places])
    choices: list[Choice | None] = []
    for number, (unit, candidates) in enumerate(pairs):
        tokens, indices = result.tokens[number], result.indices[number]
        if simple[number]:
            choice = Choice(len(indices), indices, tokens, np.arange(len(indices)))
        else:
            real = known[number] >= 0
            tokens = tokens[: real.sum()]
            choice = method_choice(tokens, known[number][real], unit, candidates)
        choices.append(replace(choice, sizes=None if folded is None else folded[number, : len(tokens)]))
    return choices


def _counts(rules: Sequence[Stage], units: Sequence[Unit], candidates: Sequence[np.ndarray]) -> list[int]:
    """Tokens to keep of every unit."""
    counts = []
    for rule, unit, columns in zip(rules, units, candidates, strict=True):
        items = sorted({other.item for other, its in zip(units, rules, strict=True) if its is rule})
        # A share is one of the tokens that the picture has without what happened in the tower.
        tokens = len(columns) + (0 if unit.blank is None else int(unit.blank.sum()))
        count = min(len(columns), budget_for(rule.budget, tokens, items.index(unit.item), len(items)))
        if rule.per_crop and not isinstance(rule.budget, float):
            count = min(len(columns), count * unit.blocks[0].origin.crops)
        counts.append(count)
    return counts


def grid_of(unit: Unit, candidates: int) -> tuple[int, int] | None:
    """(rows, columns) of a unit's candidates where they are all tokens of one raster; None otherwise."""
    grid = unit.blocks[0].origin.grid
    whole_raster = grid is not None and len(unit.blocks) == 1 and grid[0] * grid[1] == candidates
    return grid if whole_raster else None


def budget_for(budget: Budget, length: int, item: int, images: int) -> int:
    """Tokens kept of `length`; never more than there are, never less than one.

    Args:
        budget: Count, share (float), one count per image, or None for all.
        length: Tokens there are.
        item: Number of the image in the call.
        images: Images of the call.

    Raises:
        ValueError: A list of budgets that does not match the number of images.
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


def equal(keys: Sequence[Any]) -> list[list[int]]:
    """Indices of equal keys, so that each group is one batch; None belongs to no group."""
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key, []).append(index)
    return list(groups.values())


@dataclass(frozen=True)
class Shortened:
    """Sequences behind a stage.

    Attributes:
        hidden: (B, L', D).
        sizes: (B, L') image tokens behind every column, if anything asks for them.
        source: (B, L') old columns.
        layout: Roles of the columns.
    """

    hidden: Tensor
    sizes: Tensor | None
    source: Tensor
    layout: Layout


def gather(
    layout: Layout, units: Sequence[Unit], choices: Sequence[Choice], hidden: Tensor, sizes: Tensor | None
) -> Shortened:
    """Sequences (B, L, D) cut to what was chosen, with new content where the method gave any, packed to the right."""
    device = hidden.device
    move = layout.shorten(ways_of(layout, units, choices))
    source = to_device(move.source, device).clone()
    new_columns = dict(zip(layout.blocks(), move.places, strict=True))
    places = [np.concatenate([new_columns[block] for block in unit.blocks]) for unit in units]
    for members in equal([choice.way if isinstance(choice.way, int) else None for choice in choices]):
        # Here the host knows how many columns stay; which ones is filled in on the device.
        indices = torch.stack([choices[member].indices for member in members]).to(device)
        starts = to_device(np.array([[units[member].blocks[0].start] for member in members]), device)
        rows = to_device(np.array([[units[member].row] for member in members]), device)
        source[rows, to_device(np.stack([places[member] for member in members]), device)] = starts + indices
    packed = hidden.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    sizes = None if sizes is None else sizes.gather(1, source)
    for unit, choice, columns in zip(units, choices, places, strict=True):
        at = columns if choice.places is None else columns[choice.places]
        if choice.tokens is not None:
            packed[unit.row, to_device(at, device)] = choice.tokens
        if choice.sizes is not None:
            sizes[unit.row, to_device(at, device)] = choice.sizes
    if move.layout.has_padding:
        packed = packed * to_device(move.layout.valid, device).unsqueeze(-1)
    return Shortened(packed, sizes, source, move.layout)
