"""Vision stage before the projector: compress the features that enter it and project the kept rows only.

The projected rows go back to their own places in each crop and zero rows stand for the dropped ones: the host model
arranges the crops as it always does (tiles, unpadding, newlines) and its count of placeholders holds. The decoder side
then drops the columns of the zero rows (`adapters.prompt`), which it finds through the record of the encoder call.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from apet.adapters.hooks import InFlight, Removable
from apet.adapters.layout import NEWLINE, Item, follows, square, to_device
from apet.adapters.tower import CropInputs, TowerCall, TowerTap
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
    """

    layouts: Sequence[ImageLayout] | None = None
    owner: Any = None
    settings: Any = None
    notes: dict[int | None, Tensor] = field(default_factory=dict)
    records: tuple[ImageRecord, ...] | None = None
    items: Sequence[Item] | None = None
    tower: TowerCall | None = None
    kept: list[Tensor] | None = None

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
        encoding.tower = None if self._tap is None else self._tap.call(encoding.notes, crops, length, features)
        encoding.records = tuple(ImageRecord(layout, None) for layout in encoding.layouts)
        encoding.kept = None
        if self._select is None or self._select.features == "post_projector":
            return args
        return (self._compress(encoding, features, features), *args[1:])

    def _after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Put the projected rows back in their places, zeros between them."""
        encoding = self.encodings.top
        if encoding is None or self._select is None:
            return output
        if self._select.features == "post_projector":
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
        shown = np.concatenate([layout.shown for layout in encoding.layouts])
        counts = self._counts(encoding, features, shown)
        if all(count is None for count in counts):
            return tokens
        return self._keep(encoding, tokens, counts, shown)

    def _counts(self, encoding: Encoding, features: Tensor, shown: np.ndarray) -> list[int | None]:
        """Tokens to keep of every crop; None for a crop that is kept whole."""
        length = features.shape[1]
        if self._per_image and self._budget is not None:
            return self._split_by_error(encoding, features, shown)
        counts, images = [], len(encoding.layouts)
        for item, layout in enumerate(encoding.layouts):
            counts += [budget_for(self._budget, length, item, images)] * layout.crops
        if self._published:
            return [None if count >= length else count for count in counts]
        return [None if count >= real else count for count, real in zip(counts, shown.sum(1).tolist(), strict=True)]

    def _split_by_error(self, encoding: Encoding, features: Tensor, shown: np.ndarray) -> list[int | None]:
        """Each image's budget over its crops, in proportion to the energy its basis cannot rebuild."""
        errors = features.new_zeros(features.shape[:2], dtype=torch.float32)
        for _, rows, places in _equal_crops(shown, [0] * len(shown), features.device):
            half = max(1, places.shape[1] // 2)
            inputs = _inputs(encoding, rows, places)
            errors[rows, places] = self._select(features[rows, places], half, inputs=inputs).errors
        mass = errors.square().sum(-1).double().cpu().numpy()
        real = shown.sum(1)
        counts: list[int | None] = []
        for item, layout in enumerate(encoding.layouts):
            members = slice(len(counts), len(counts) + layout.crops)
            budget = budget_for(self._budget, int(real[members].sum()), item, len(encoding.layouts))
            split = _proportional(budget, mass[members], real[members])
            counts += [
                None if count >= limit else int(count) for count, limit in zip(split, real[members], strict=True)
            ]
        return counts

    def _keep(self, encoding: Encoding, tokens: Tensor, counts: Sequence[int | None], shown: np.ndarray) -> Tensor:
        """Kept rows (C, K, D), filled up with zeros; the encoding learns the kept positions (K_c,) of every crop."""
        real = np.ones_like(shown) if self._published else shown
        limits = real.sum(1).tolist()
        sizes = [limit if count is None else count for count, limit in zip(counts, limits, strict=True)]
        kept_rows = tokens.new_zeros(len(counts), max(sizes), tokens.shape[2])
        kept: list[Tensor] = [torch.empty(0)] * len(counts)
        folded = tokens.new_ones(tokens.shape[:2], dtype=torch.float32) if self._keep_sizes else None
        for members, rows, places in _equal_crops(real, sizes, tokens.device):
            count = sizes[members[0]]
            block = tokens[rows, places]
            rows_kept, own = [count] * len(members), None
            if count < places.shape[1]:
                grid = square(places.shape[1]) if places.shape[1] == tokens.shape[1] else None
                result = self._select(block, count, grid=grid, inputs=_inputs(encoding, rows, places))
                block, places = result.tokens, places.gather(1, result.indices.clamp(min=0))
                own = None if folded is None else token_sizes(result)
                if self._select.adaptive:
                    rows_kept = (result.indices >= 0).sum(1).tolist()
            kept_rows[rows.flatten(), :count] = block
            for position, crop in enumerate(members):
                kept[crop] = places[position, : rows_kept[position]]
                if own is not None:
                    folded[crop, kept[crop]] = own[position, : rows_kept[position]]
        encoding.kept = kept
        encoding.records = self._records(encoding.layouts, kept, folded)
        return kept_rows[:, : max(map(len, kept))]

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


def _inputs(encoding: Encoding, rows: Tensor, places: Tensor) -> CropInputs | None:
    """What the method may ask for about a group of crops."""
    return None if encoding.tower is None else CropInputs(encoding.tower, rows, places)


def _equal_crops(
    real: np.ndarray, counts: Sequence[int], device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Crops with equally many real rows and the same count, as one batch.

    Yields their numbers on the host, the same (G, 1) on the device, and their real rows (G, n).

    Padding is left out of the batch rather than masked, so that no method can choose it or be influenced by it.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for crop, count in enumerate(counts):
        groups.setdefault((int(real[crop].sum()), count), []).append(crop)
    for (size, _), members in groups.items():
        if size:
            places = np.stack([np.flatnonzero(real[crop]) for crop in members])
            yield members, to_device(np.array(members).reshape(-1, 1), device), to_device(places, device)


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
