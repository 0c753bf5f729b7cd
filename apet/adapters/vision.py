"""Vision stage before the projector: compress the features that enter it and project the kept rows only.

The projected rows go back to their own places in each crop and zero rows stand for the dropped ones: the host model
arranges the crops as it always does (tiles, unpadding, newlines) and its count of placeholders holds. The decoder side
then drops the columns of the zero rows (`adapters.prompt`), which it finds through the record of the encoder call.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apet.adapters.hooks import InFlight, Removable
from apet.adapters.layout import BLANK, NEWLINE, PADDING, Block, Item, Layout, Segment, Unit, follows, square, to_device
from apet.adapters.stages import Budget, Choice, Group, Select, budget_for, groups_of, whole
from apet.adapters.tower import TowerCall, TowerTap
from apet.adapters.tower_packed import PackedCut
from apet.adapters.tower_stage import TowerCut
from apet.core.types import token_sizes


@dataclass(frozen=True)
class ImageLayout:
    """How the rows of one image's crops become its columns in the prompt.

    Attributes:
        crops: Crops the image was encoded as.
        length: Rows per crop.
        columns: (T,) for every column of the uncompressed image the row it shows, counted through the crops, or
            NEWLINE (-1) for a newline token.
    """

    crops: int
    length: int
    columns: np.ndarray

    @property
    def lines(self) -> np.ndarray | None:
        """(T,) line of every column as `Layout.lines` codes it; None for an image without newlines.

        A line ends in its newline; columns of the first of several crops, the overview, are in no line.
        """
        newline = self.columns == NEWLINE
        if not newline.any():
            return None
        line = np.cumsum(newline) - newline
        overview = (self.columns < self.length) & (self.crops > 1)
        return np.where(newline, -(line + 2), np.where(overview, -1, line))

    @property
    def shown(self) -> np.ndarray:
        """(crops, length) bool, False for rows that the prompt never shows (padding of the tiles)."""
        rows = np.zeros(self.crops * self.length, dtype=bool)
        rows[self.columns[self.columns != NEWLINE]] = True
        return rows.reshape(self.crops, self.length)


def single_crop(length: int) -> ImageLayout:
    """An image of one crop, shown row by row."""
    return ImageLayout(1, length, np.arange(length))


@dataclass(frozen=True)
class ImageRecord:
    """What the vision stage did to one image.

    Attributes:
        layout: Its columns before compression.
        kept: Per crop the kept positions (K,) int64 on the device, ascending; None if the image was kept whole.
        all_newlines: Newlines stay also where their line is empty (the published accounting).
        sizes: (crops * length,) float32 image tokens behind every row, where sizes were asked for.
    """

    layout: ImageLayout
    kept: tuple[Tensor, ...] | None
    all_newlines: bool = False
    sizes: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """One crop shown row by row: kept positions are columns, and their number is known without looking."""
        return self.layout.crops == 1 and len(self.layout.columns) == self.layout.length

    def kept_columns(self) -> np.ndarray:
        """Columns (host) that show a kept row, or a newline whose line still has one. Waits for the device."""
        columns, length = self.layout.columns, self.layout.length
        if self.kept is None:
            return np.arange(len(columns))
        rows = torch.cat([kept + crop * length for crop, kept in enumerate(self.kept)]).cpu().numpy()
        keep = np.isin(columns, rows)
        if self.all_newlines:
            return np.flatnonzero(keep | (columns == NEWLINE))
        return np.flatnonzero(keep | follows(self.layout.lines, keep))

    def choice(self, unit: Unit, device: torch.device) -> Choice:
        """What the projector hooks kept of an image, as columns of its block."""
        if self.kept is None:
            return whole(unit, device)
        if self.is_plain and unit.length == self.layout.length:
            kept = self.kept[0]
            return Choice(len(kept), kept, sizes=None if self.sizes is None else self.sizes[kept])
        columns = self.kept_columns()
        columns = columns[columns < unit.length]
        sizes = None
        if self.sizes is not None:
            rows = to_device(self.layout.columns[columns], device)
            sizes = torch.where(rows < 0, 1, self.sizes[rows.clamp(min=0)])  # a newline stands for itself
        return Choice(columns, torch.from_numpy(columns), sizes=sizes)


@dataclass(eq=False)
class Encoding:
    """One encoder call: what is expected of it while it runs, and what it leaves. It rides on the call's output.

    Attributes:
        layouts: How crops become prompt columns; None where each crop is an image of its own.
        owner: The forward that the call is part of, None outside of any.
        settings: Configuration that it was made under.
        notes: What entered the tower's layers and the projector, where it was asked for.
        records: What the vision stage did to every image; None where tokens are chosen behind the projector.
        items: The images or videos as they go into a prompt.
        tower: What the tower did, where methods read it.
        kept: Per crop the kept rows, between the two hooks of the projector.
        cuts: What the tower stages left, in the order they ran.
    """

    layouts: Sequence[ImageLayout] | None = None
    owner: Any = None
    settings: Any = None
    notes: dict[int | None, Tensor] = field(default_factory=dict)
    records: tuple[ImageRecord, ...] | None = None
    items: Sequence[Item] | None = None
    tower: TowerCall | None = None
    kept: list[Tensor] | None = None
    cuts: list[TowerCut | PackedCut] = field(default_factory=list)

    @property
    def dropped(self) -> TowerCut | PackedCut | None:
        """What the tower left, where it did not put back what it dropped."""
        return self.cuts[-1] if self.cuts and self.cuts[-1].mode != "restore" else None

    def crops_of(self, number: int) -> slice:
        """The crops of an image or video, among all that were encoded."""
        counts = [item.crops for item in self.items]
        return slice(sum(counts[:number]), sum(counts[: number + 1]))

    def without_dropped(self) -> list[Item]:
        """The items, where tokens are chosen behind the projector, with what the tower merged away for blanks."""
        items = []
        for number, item in enumerate(self.items):
            count = sum(item.segments)
            alive = self.dropped.tokens_alive(self.crops_of(number), count)
            lines = np.full(count, -1) if item.lines is None else item.lines
            items.append(replace(item, lines=np.where(alive, lines, BLANK)))
        return items

    def token_sizes(self, number: int, count: int) -> Tensor | None:
        """Tokens behind each of an item's; None where the tower merged none, or in front of the projector."""
        if self.dropped is None or self.records is not None:
            return None
        return self.dropped.token_sizes(self.crops_of(number), count)

    def arranged(self, crops: int, length: int) -> Sequence[ImageLayout]:
        """The layouts of a call about so many crops of so many rows.

        Raises:
            ValueError: Other layouts were announced.
        """
        layouts = self.layouts or [single_crop(length)] * crops
        if sum(layout.crops for layout in layouts) != crops:
            raise ValueError(
                f"{crops} crops were encoded, but the image sizes stand for {[layout.crops for layout in layouts]}; "
                "image_sizes and pixel values do not belong together"
            )
        return layouts

    def finish(self) -> None:
        """Turn the records into items, and let go of what only the call needed."""
        if self.records is not None:
            self.items = [_item(record) for record in self.records]
        self.notes, self.kept, self.owner = {}, None, None

    def rows(self, number: int, length: int) -> np.ndarray:
        """Rows, counted through all crops, that the `length` columns of an image show; -1 for newlines."""
        if self.records is None:
            return np.arange(number * length, (number + 1) * length)
        layouts = [record.layout for record in self.records]
        columns = layouts[number].columns[:length]
        first = sum(layout.crops for layout in layouts[:number]) * layouts[number].length
        return np.where(columns == NEWLINE, NEWLINE, columns + first)


def _item(record: ImageRecord) -> Item:
    layout = record.layout
    grid = square(layout.length) if record.is_plain else None
    return Item((len(layout.columns),), layout.lines, grid=grid, crops=layout.crops)


class VisionStage:
    """Hooks around the projector of one model; they act inside `encoding`, and leave the projector alone outside.

    Args:
        projector: Maps rows (C, N, D) one by one.
        budget: Tokens per crop, or per image with `per_image`; None only records what is encoded.
        select: The method; None where it chooses behind the projector.
        per_image: The budget is the image's and is split over its crops by error mass.
        published: Padding takes budget like real patches, as in the published code.
        tap: Notes of the tower, where the method asks for what happened in it.
        keep_sizes: Record how many image tokens stand behind every kept row.
    """

    def __init__(
        self,
        projector: nn.Module,
        budget: Budget,
        select: Select | None,
        per_image: bool = False,
        published: bool = False,
        tap: TowerTap | None = None,
        keep_sizes: bool = False,
    ) -> None:
        self._projector = projector
        self._budget, self._select = budget, select
        self._per_image, self._published = per_image, published
        self._tap, self._keep_sizes = tap, keep_sizes
        self.encodings = InFlight()

    def attach(self) -> list[Removable]:
        """Register the hooks; returns their handles."""
        handles = [] if self._tap is None else self._tap.attach(self.encodings)
        return [
            *handles,
            self._projector.register_forward_pre_hook(self._before),
            self._projector.register_forward_hook(self._after),
        ]

    @contextmanager
    def encoding(self, layouts: Sequence[ImageLayout] | None = None) -> Iterator[Encoding]:
        """Compress what is encoded inside the block; its records are there when the block ends."""
        with self.encodings.during(Encoding(layouts)) as encoding:
            yield encoding
        encoding.finish()

    def check_images(self, count: int) -> None:
        """Raise where budgets per image are not those of so many images, before any of them is encoded."""
        budget_for(self._budget, 1, 0, count)

    def _before(self, module: nn.Module, args: tuple) -> tuple:
        encoding, features = self.encodings.top, args[0]
        if encoding is None:
            return args
        crops, length = features.shape[:2]
        encoding.layouts = encoding.arranged(crops, length)
        tap, notes = self._tap, encoding.notes
        encoding.tower = None if tap is None else tap.call(notes, crops, length, features, encoding.cuts)
        encoding.records = tuple(ImageRecord(layout, None) for layout in encoding.layouts)
        encoding.kept = None
        _check_tower(encoding, crops)
        idle = self._select is None and encoding.dropped is None
        if idle or (self._select is not None and self._select.features == "post_projector"):
            return args
        return (self._compress(encoding, features, features), *args[1:])

    def _after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Put the projected rows back in their places, zeros between them."""
        encoding = self.encodings.top
        if encoding is None or (self._select is None and encoding.dropped is None):
            return output
        if self._select is not None and self._select.features == "post_projector":
            output = self._compress(encoding, output, args[0])
        encoding.tower = None
        if encoding.kept is None:
            return output
        kept, rows = encoding.kept, encoding.layouts[0].length
        places = nn.utils.rnn.pad_sequence(kept, batch_first=True)
        # Rows that only fill up a shorter crop are written over position 0 before the real ones are.
        filler = torch.arange(places.shape[1], device=places.device) >= _lengths(kept, places.device)
        places = torch.where(filler, rows, places)
        full = output.new_zeros(output.shape[0], rows + 1, output.shape[2])
        full.scatter_(1, places.unsqueeze(-1).expand(-1, -1, output.shape[2]), output)
        return full[:, :-1]

    @torch.compiler.disable
    def _compress(self, encoding: Encoding, tokens: Tensor, features: Tensor) -> Tensor:
        """Kept rows (C, K, D) of `tokens`, filled up with zeros; all of them where every crop is kept whole."""
        units = self._units(encoding)
        counts = self._counts(encoding, features, units)
        if all(count is None for count in counts) and encoding.dropped is None:
            return tokens
        return self._keep(encoding, tokens, units, counts)

    def _units(self, encoding: Encoding) -> list[Unit]:
        """Every crop as what the method chooses from: the rows that the prompt shows, or all of them as published.

        Rows that the tower merged away are none of them; which these are is read from the device.
        """
        shown = np.concatenate([layout.shown for layout in encoding.layouts]) | self._published
        if encoding.dropped is not None:
            shown = shown & encoding.dropped.alive(shown.shape[1]).cpu().numpy()
        crops = np.arange(len(shown)).reshape(-1, 1)
        grid = square(shown.shape[1])
        segments = tuple(Segment(crop, number=crop, grid=grid) for crop in range(len(shown)))
        return Layout(np.where(shown, crops, PADDING), segments=segments).units(_by_segment)

    def _counts(self, encoding: Encoding, features: Tensor, units: Sequence[Unit]) -> list[int | None]:
        """Tokens to keep of every crop; None for one that is kept whole."""
        if self._per_image and self._budget is not None:
            counts = self._split_by_error(encoding, features, units)
        else:
            length, images = features.shape[1], len(encoding.layouts)
            of_crop = [
                budget_for(self._budget, length, image, images)
                for image, layout in enumerate(encoding.layouts)
                for _ in range(layout.crops)
            ]
            counts = [of_crop[unit.row] for unit in units]
        return [None if count >= unit.length else count for count, unit in zip(counts, units, strict=True)]

    def _split_by_error(self, encoding: Encoding, features: Tensor, units: Sequence[Unit]) -> list[int]:
        """Each image's budget over its crops, in proportion to the energy its basis cannot rebuild."""
        halves = [max(1, unit.length // 2) for unit in units]
        mass = features.new_zeros(len(units), dtype=torch.float64)
        for group in self._groups(encoding, units, halves, features):
            errors = group.select(self._select, features, self._sizes(encoding, features), encoding.tower).errors
            mass[to_device(np.array(group.members), mass.device)] = errors.square().sum(-1).double()
        mass, lengths = mass.cpu().numpy(), np.array([unit.length for unit in units])
        images, counts, start = len(encoding.layouts), [], 0
        for image, layout in enumerate(encoding.layouts):
            members = [number for number, unit in enumerate(units) if start <= unit.row < start + layout.crops]
            budget = budget_for(self._budget, int(lengths[members].sum()), image, images)
            counts += _proportional(budget, mass[members], lengths[members]).tolist()
            start += layout.crops
        return counts

    def _groups(
        self, encoding: Encoding, units: Sequence[Unit], counts: Sequence[int | None], tokens: Tensor
    ) -> Iterator[Group]:
        every = [np.arange(unit.length) for unit in units]
        return groups_of(self._select, units, every, counts, encoding.tower, tokens.device)

    def _keep(self, encoding: Encoding, tokens: Tensor, units: Sequence[Unit], counts: Sequence[int | None]) -> Tensor:
        """Kept rows (C, K, D), filled up with zeros; the encoding learns the kept positions (K_c,) of every crop."""
        most = max(unit.length if count is None else count for unit, count in zip(units, counts, strict=True))
        rows = tokens.new_zeros(len(tokens), most, tokens.shape[2])
        kept = [torch.empty(0, dtype=torch.long, device=tokens.device)] * len(tokens)
        sizes = self._sizes(encoding, tokens)
        folded = None
        if self._keep_sizes:
            folded = tokens.new_ones(tokens.shape[:2], dtype=torch.float32) if sizes is None else sizes.clone()
        for group in self._groups(encoding, units, counts, tokens):
            result = group.select(self._select, tokens, sizes, encoding.tower)
            rows[group.rows.flatten(), : group.count] = result.tokens
            places = group.places.gather(1, result.indices.clamp(min=0))
            numbers = (result.indices >= 0).sum(1).tolist() if self._select.adaptive else [group.count] * len(places)
            own = None
            if folded is not None:
                own = token_sizes(result, None if sizes is None else sizes[group.rows, group.places])
            for position, (unit, number) in enumerate(zip(group.units, numbers, strict=True)):
                kept[unit.row] = places[position, :number]
                if own is not None:
                    folded[unit.row, kept[unit.row]] = own[position, :number]
        for unit in (unit for unit, count in zip(units, counts, strict=True) if count is None):
            kept[unit.row] = to_device(unit.columns, tokens.device)
            rows[unit.row, : unit.length] = tokens[unit.row, kept[unit.row]]
        encoding.kept = kept
        encoding.records = self._records(encoding.layouts, kept, folded)
        return rows[:, : max(map(len, kept))]

    def _sizes(self, encoding: Encoding, tokens: Tensor) -> Tensor | None:
        """(C, N) patches behind every row of `tokens`, where the tower merged any."""
        cut = encoding.dropped
        return None if cut is None else cut.spread(cut.sizes, 1.0)[:, -tokens.shape[1] :]

    def _records(
        self, layouts: Sequence[ImageLayout], kept: Sequence[Tensor], sizes: Tensor | None
    ) -> tuple[ImageRecord, ...]:
        """What was kept, image by image."""
        records, start = [], 0
        for layout in layouts:
            crops = slice(start, start + layout.crops)
            own = None if sizes is None else sizes[crops].flatten()
            records.append(ImageRecord(layout, tuple(kept[crops]), self._published, own))
            start += layout.crops
        return tuple(records)


def _by_segment(block: Block) -> int:
    return block.segment


def _check_tower(encoding: Encoding, crops: int) -> None:
    """Raise where the tower stages did not run, once, on the crops that the projector is given."""
    layers = [cut.layer for cut in encoding.cuts]
    if any(len(cut.rows) != crops for cut in encoding.cuts) or len(set(layers)) < len(layers):
        raise ValueError(
            f"the tower stage has not run, once, on the {crops} crops that the projector is given; give the model all "
            "pixels of a call at once"
        )


def _lengths(kept: Sequence[Tensor], device: torch.device) -> Tensor:
    return to_device(np.array([[len(one)] for one in kept]), device)


def _proportional(total: int, mass: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Split `total` in proportion to `mass`, at least 1 and at most `limits` each; the parts add up to `total`.

    A part that reaches its limit leaves the rest to the others; remainders go to the largest fractions.
    """
    total = int(np.clip(total, np.minimum(1, limits).sum(), limits.sum()))
    parts = np.minimum(1, limits)
    open_ = parts < limits
    while parts.sum() < total:
        weight = np.where(open_, np.maximum(mass, 1e-12), 0)
        share = weight / weight.sum() * (total - parts.sum())
        step = np.minimum(np.floor(share).astype(int), limits - parts)
        if step.sum() == 0:
            order = np.argsort(-(share - np.floor(share)), kind="stable")
            chosen = [index for index in order if open_[index]][: total - parts.sum()]
            step = np.zeros_like(parts)
            step[chosen] = 1
        parts = parts + step
        open_ = parts < limits
    return parts
