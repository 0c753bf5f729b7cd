"""Where the images and videos of a batch sit in its sequences, and how the columns move when tokens are dropped.

Kept on the host: counts and block boundaries are needed to know tensor shapes, and following them here costs no further
synchronisation. Which tokens survive stays on the device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apet.core.constants import on_device

TEXT, PADDING = -1, -2
NEWLINE = -1
# In `Layout.lines`: a token whose content the vision tower merged away. Coded like the newline of a line that has no
# tokens, it is never chosen and never stays.
BLANK = -(2**40)


@dataclass(frozen=True)
class Item:
    """An encoded image or video on its way into the prompt.

    Attributes:
        segments: Tokens of its parts in prompt order: one part, or the frames of a video, or the tiles of an image.
        lines: Roles of all its columns as `Layout.lines` codes them; None without newline or class tokens.
        video: Whether it is a video.
        grid: (rows, columns) of every segment's tokens, newlines and class tokens left out, where they are a raster.
        crops: Crops it was encoded as.
    """

    segments: tuple[int, ...]
    lines: np.ndarray | None = None
    video: bool = False
    grid: tuple[int, int] | None = None
    crops: int = 1


@dataclass(frozen=True)
class Segment:
    """A numbered part of an image or video.

    Attributes:
        item: Which one of the prompt it belongs to.
        video: Whether that is a video.
        number: Which one of the images (or videos) that were encoded.
        grid: As in `Item`.
        crops: As in `Item`.
    """

    item: int
    video: bool = False
    number: int = 0
    grid: tuple[int, int] | None = None
    crops: int = 1


@dataclass(frozen=True)
class Block:
    """Consecutive columns of one image, or of one part of it, in one row.

    Attributes:
        row: Sequence of the batch.
        start: First column.
        length: Number of visual tokens, newlines included.
        item: Index of the image or video among those of the call, in prompt order.
        video: Whether it is a video.
        segment: Number of the part.
        origin: The part.
    """

    row: int
    start: int
    length: int
    item: int
    video: bool = False
    segment: int = 0
    origin: Segment = Segment(0)


@dataclass(frozen=True)
class Unit:
    """Blocks of one row that a stage chooses from together; positions count through their columns.

    Attributes:
        blocks: The blocks, in column order.
        lines: (length,) roles of the columns as `Layout.lines` codes them, None without newline or class tokens.
    """

    blocks: tuple[Block, ...]
    lines: np.ndarray | None = None

    @property
    def row(self) -> int:
        """Sequence of the batch."""
        return self.blocks[0].row

    @property
    def item(self) -> int:
        """The (first) image or video."""
        return self.blocks[0].item

    @property
    def length(self) -> int:
        """Columns."""
        return sum(block.length for block in self.blocks)

    @property
    def columns(self) -> np.ndarray:
        """(length,) columns of the row."""
        return np.concatenate([np.arange(block.start, block.start + block.length) for block in self.blocks])

    @property
    def blank(self) -> np.ndarray | None:
        """(length,) bool, columns that the vision tower left without content; None if there are none."""
        blank = None if self.lines is None else self.lines <= BLANK // 2
        return blank if blank is not None and blank.any() else None

    def parts(self) -> Iterator[tuple[Block, int]]:
        """Every block and the position at which it begins."""
        first = 0
        for block in self.blocks:
            yield block, first
            first += block.length


@dataclass(frozen=True)
class Layout:
    """Role of every column of a batch.

    Attributes:
        items: (B, L) int: number of the segment for visual tokens, TEXT (-1), or PADDING (-2).
        lines: (B, L) int, None if no image has newlines. A token of line i of its image has i, the newline that ends
            the line has -(i + 2), everything else -1. The class token of a frame is coded like a newline: it stays as
            long as a token of its frame does.
        segments: What every segment is; None where each is an image.
    """

    items: np.ndarray
    lines: np.ndarray | None = None
    segments: tuple[Segment, ...] | None = None

    @property
    def length(self) -> int:
        """Columns L, padding included."""
        return self.items.shape[1]

    @property
    def valid(self) -> np.ndarray:
        """(B, L) bool, False for padding."""
        return self.items != PADDING

    @property
    def last_valid(self) -> np.ndarray:
        """(B,) last column that is not padding."""
        return self.length - 1 - np.argmax(self.valid[:, ::-1], axis=1)

    @property
    def has_padding(self) -> bool:
        """Whether any column is padding."""
        return bool((self.items == PADDING).any())

    def blocks(self) -> list[Block]:
        """The images of the batch, or their parts, row by row in column order."""
        found = []
        for row, items in enumerate(self.items):
            edges = np.flatnonzero(np.diff(items)) + 1
            for start, end in zip([0, *edges], [*edges, len(items)], strict=True):
                if start < end and items[start] >= 0:
                    number = int(items[start])
                    segment = Segment(number, number=number) if self.segments is None else self.segments[number]
                    length = int(end - start)
                    found.append(Block(row, int(start), length, segment.item, segment.video, number, segment))
        return found

    def joined(self, parted: Callable[[Segment], bool]) -> "Layout":
        """The layout with the adjacent parts of an item made one, except where `parted` says they stay apart."""
        if self.segments is None:
            return self
        first: dict[int, int] = {}
        numbers = [
            number if parted(segment) else first.setdefault(segment.item, number)
            for number, segment in enumerate(self.segments)
        ]
        if numbers == list(range(len(numbers))):
            return self
        return replace(self, items=np.where(self.items >= 0, np.array([*numbers, 0])[self.items], self.items))

    def units(self, key: Callable[[Block], Any]) -> list[Unit]:
        """The blocks of every row, those with equal keys in one unit."""
        groups: dict[Any, list[Block]] = {}
        for block in self.blocks():
            groups.setdefault((block.row, key(block)), []).append(block)
        return [Unit(tuple(blocks), self._unit_lines(blocks)) for blocks in groups.values()]

    def _unit_lines(self, blocks: Sequence[Block]) -> np.ndarray | None:
        """Lines of several blocks one after the other; those of different items get different numbers."""
        if self.lines is None:
            return None
        parts, items = [], sorted({block.item for block in blocks})
        for block in blocks:
            lines = self.lines[block.row, block.start : block.start + block.length]
            shift = items.index(block.item) * self.length
            parts.append(np.where(lines >= 0, lines + shift, np.where(lines <= -2, lines - shift, lines)))
        lines = np.concatenate(parts)
        return lines if (lines <= -2).any() else None

    def with_lines(self, lines_of: Sequence[np.ndarray | None]) -> "Layout":
        """The layout with the lines of every image (by item) written in; an image cut short has the first of them."""
        if all(lines is None for lines in lines_of):
            return self
        lines = np.full(self.items.shape, -1, dtype=np.int64)
        for block in self.blocks():
            if lines_of[block.item] is not None:
                lines[block.row, block.start : block.start + block.length] = lines_of[block.item][: block.length]
        return replace(self, lines=lines)

    def shorten(self, kept: Sequence[int | np.ndarray]) -> "Move":
        """Cut every block (in `blocks` order) and pack the rows to the right (left padding).

        Args:
            kept: Columns kept of each block, relative to it; or only their number, where which they are is known on the
                device alone.
        """
        ways = iter(kept)
        blocks = {(block.row, block.start): block for block in self.blocks()}
        sources, places = [], []
        for row, items in enumerate(self.items):
            columns: list[int] = []
            column = 0
            while column < len(items):
                block = blocks.get((row, column))
                if block is None:
                    columns.extend([column] if items[column] != PADDING else [])
                    column += 1
                    continue
                way = next(ways)
                inside = np.arange(way) if isinstance(way, int) else way
                places.append((row, len(columns), len(inside)))
                columns.extend((column + inside).tolist())
                column += block.length
            sources.append(columns)
        width = max(len(columns) for columns in sources)
        source = np.zeros((len(sources), width), dtype=np.int64)
        valid = np.zeros(source.shape, dtype=bool)
        for row, columns in enumerate(sources):
            source[row, width - len(columns) :] = columns
            valid[row, width - len(columns) :] = True
        items = np.where(valid, np.take_along_axis(self.items, source, 1), PADDING)
        lines = None if self.lines is None else np.where(valid, np.take_along_axis(self.lines, source, 1), -1)
        starts = [np.arange(count) + first + width - len(sources[row]) for row, first, count in places]
        return Move(source, replace(self, items=items, lines=lines), tuple(starts))


@dataclass(frozen=True)
class Move:
    """Result of `Layout.shorten`.

    Attributes:
        source: (B, L') int64 old column of every new one, 0 for padding. Where only a number of columns was given, the
            first columns of the block stand in.
        layout: The new layout.
        places: New columns of every old block, in `blocks` order.
    """

    source: np.ndarray
    layout: Layout
    places: tuple[np.ndarray, ...]


def square(n: int) -> tuple[int, int] | None:
    """Grid of `n` tokens that fill a square; None if they do not."""
    side = math.isqrt(n)
    return (side, side) if side * side == n else None


def follows(lines: np.ndarray | None, keep: np.ndarray) -> np.ndarray:
    """(T,) bool: newlines that stay because a kept token of their line does."""
    if lines is None:
        return np.zeros_like(keep)
    alive = np.unique(lines[keep & (lines >= 0)])
    return (lines <= -2) & np.isin(-lines - 2, alive)


def layout_from_ids(
    kinds: np.ndarray, valid: np.ndarray, items: Sequence[Sequence[Item]], by_run: bool = False
) -> Layout:
    """Layout of prompts given as ids.

    Args:
        kinds: (B, L) int: number of the placeholder's kind (image 0, video 1), -1 for text.
        valid: (B, L) bool, False on padding.
        items: Per kind the encoded images or videos, in order. Beam search repeats each row: then the images of a row
            serve all its copies, and the batch holds a multiple of the placeholders that `items` need.
        by_run: Items that touch are parts of one.

    Raises:
        ValueError: The placeholders are not those of the images.
    """
    kinds = np.where(valid, kinds, -1)
    roles = np.where(valid, TEXT, PADDING).astype(np.int64)
    lines = np.full(roles.shape, -1, dtype=np.int64)
    repeats = max((_repeats(kinds, kind, known) for kind, known in enumerate(items)), default=0)
    if repeats == 0:
        return Layout(roles)
    parts = [
        [(number, item, size, first) for number, item in enumerate(known) for size, first in _parts(item)]
        for known in items
    ]
    numbering = _Numbering(by_run)
    cursor, before = [0] * len(items), [0] * len(items)
    for row in range(roles.shape[0]):
        cursor = list(before) if row % repeats else cursor
        before = list(cursor)
        columns, end = np.flatnonzero(kinds[row] >= 0), -1
        while len(columns):
            start = int(columns[0])
            kind = int(kinds[row, start])
            part = cursor[kind]
            number, item, size, first = parts[kind][part] if part < len(parts[kind]) else (part, None, 0, 0)
            place = slice(start, start + size)
            whole = 0 < size <= len(columns) and columns[size - 1] == start + size - 1
            if not whole or (kinds[row, place] != kind).any():
                raise _cut(row, size, number, item)
            roles[row, place] = numbering.of(kind, part, number, item, touches=start == end)
            if item.lines is not None:
                lines[row, place] = item.lines[first : first + size]
            columns, cursor[kind], end = columns[size:], part + 1, start + size
    return Layout(roles, lines if (lines != -1).any() else None, tuple(numbering.segments))


class _Numbering:
    """Numbers the parts of items in the order in which prompts show them first, and so the items.

    Args:
        by_run: A part that touches the one before belongs to its item.
    """

    def __init__(self, by_run: bool) -> None:
        self.segments: list[Segment] = []
        self._by_run = by_run
        self._numbers: dict[tuple[int, int], int] = {}
        self._owners: dict[tuple[int, int], int] = {}
        self._items = 0

    def of(self, kind: int, part: int, number: int, item: Item, touches: bool) -> int:
        """Number of a part of item `number` of its kind."""
        if (kind, part) not in self._numbers:
            if self._by_run and touches:
                self._owners[kind, number] = self.segments[-1].item
            elif (kind, number) not in self._owners:
                self._owners[kind, number] = self._items
                self._items += 1
            self._numbers[kind, part] = len(self.segments)
            self.segments.append(Segment(self._owners[kind, number], item.video, number, item.grid, item.crops))
        return self._numbers[kind, part]


def _cut(row: int, size: int, number: int, item: Item | None) -> ValueError:
    name = "video" if item is not None and item.video else "image"
    return ValueError(
        f"row {row} does not hold the {size} consecutive placeholders of {name} {number}; an image was cut in two "
        "(prefill_chunk_size splits prompts: leave it out) or images and prompts do not match"
    )


def _parts(item: Item) -> Iterator[tuple[int, int]]:
    """Length and first column of every part of an item."""
    return zip(item.segments, np.cumsum([0, *item.segments[:-1]]).tolist(), strict=True)


def _repeats(kinds: np.ndarray, kind: int, items: Sequence[Item]) -> int:
    """How often the prompts hold the items of a kind."""
    found, needed = int((kinds == kind).sum()), sum(sum(item.segments) for item in items)
    if found == 0:
        return 0
    if needed == 0 or found % needed:
        raise ValueError(
            f"the prompts hold {found} {'video' if kind else 'image'} placeholders, but those encoded have "
            f"{[sum(item.segments) for item in items]} tokens; an image was cut in two (prefill_chunk_size splits "
            "prompts: leave it out) or its placeholder was not expanded"
        )
    return found // needed


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array as a device tensor, without waiting for the device. Shared with other calls: never write into it."""
    return on_device(torch.from_numpy(np.ascontiguousarray(array)), device)
