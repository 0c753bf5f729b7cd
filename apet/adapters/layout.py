"""Where the images of a batch sit in its sequences, and how the columns move when tokens are dropped.

Kept on the host: counts and block boundaries are needed to know tensor shapes, and following them here costs no further
synchronisation. Which tokens survive stays on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TEXT, PADDING = -1, -2
NEWLINE = -1


@dataclass(frozen=True)
class Block:
    """Consecutive columns of one image in one row.

    Attributes:
        row: Sequence of the batch.
        start: First column.
        length: Number of visual tokens, newlines included.
        item: Index of the image among the images of the call.
    """

    row: int
    start: int
    length: int
    item: int


@dataclass(frozen=True)
class Layout:
    """Role of every column of a batch.

    Attributes:
        items: (B, L) int: the image's index for visual tokens, TEXT (-1), or PADDING (-2).
        lines: (B, L) int, None if no image has newlines. A token of line i of its image has i, the newline that ends
            the line has -(i + 2), everything else -1.
    """

    items: np.ndarray
    lines: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Columns L, padding included."""
        return self.items.shape[1]

    @property
    def valid(self) -> np.ndarray:
        """(B, L) bool, False for padding."""
        return self.items != PADDING

    @property
    def has_padding(self) -> bool:
        """Whether any column is padding."""
        return bool((self.items == PADDING).any())

    def blocks(self) -> list[Block]:
        """The images of the batch, row by row in column order."""
        found = []
        for row, items in enumerate(self.items):
            edges = np.flatnonzero(np.diff(items)) + 1
            for start, end in zip([0, *edges], [*edges, len(items)], strict=True):
                if start < end and items[start] >= 0:
                    found.append(Block(row, int(start), int(end - start), int(items[start])))
        return found

    def block_lines(self, block: Block) -> np.ndarray | None:
        """Lines (length,) of an image's columns; None for an image without newlines."""
        if self.lines is None:
            return None
        lines = self.lines[block.row, block.start : block.start + block.length]
        return lines if (lines <= -2).any() else None

    def with_lines(self, lines_of: Sequence[np.ndarray | None]) -> "Layout":
        """The layout with the lines of every image (by item) written in; an image cut short has the first of them."""
        if all(lines is None for lines in lines_of):
            return self
        lines = np.full(self.items.shape, -1, dtype=np.int64)
        for block in self.blocks():
            if lines_of[block.item] is not None:
                lines[block.row, block.start : block.start + block.length] = lines_of[block.item][: block.length]
        return Layout(self.items, lines)

    def shorten(self, kept: Sequence[int | np.ndarray]) -> "Move":
        """Cut every block (in `blocks` order) and pack the rows to the right (left padding).

        Args:
            kept: Columns kept of each block, relative to it; or only their number, where which they are is known on the
                device alone.
        """
        ways = iter(kept)
        blocks = {(block.row, block.start): block for block in self.blocks()}
        sources = []
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
        return Move(source, Layout(items, lines))


@dataclass(frozen=True)
class Move:
    """Result of `Layout.shorten`.

    Attributes:
        source: (B, L') int64 old column of every new one, 0 for padding. Where only a number of columns was given, the
            first columns of the block stand in.
        layout: The new layout.
    """

    source: np.ndarray
    layout: Layout


def follows(lines: np.ndarray | None, keep: np.ndarray) -> np.ndarray:
    """(T,) bool: newlines that stay because a kept token of their line does."""
    if lines is None:
        return np.zeros_like(keep)
    alive = np.unique(lines[keep & (lines >= 0)])
    return (lines <= -2) & np.isin(-lines - 2, alive)


def layout_from_ids(visual: np.ndarray, valid: np.ndarray, lengths: Sequence[int]) -> Layout:
    """Layout of prompts given as ids.

    Args:
        visual: (B, L) bool, True on placeholders.
        valid: (B, L) bool, False on padding.
        lengths: Visual tokens of every encoded image, in order. Beam search repeats each row: then the images of a row
            serve all its copies, and the batch holds a multiple of the placeholders that `lengths` needs.

    Raises:
        ValueError: The placeholders are not those of the images.
    """
    visual = visual & valid
    items = np.where(valid, TEXT, PADDING).astype(np.int64)
    found, needed = int(visual.sum()), sum(lengths)
    if found == 0:
        return Layout(items)
    if needed == 0 or found % needed:
        raise ValueError(
            f"the prompts hold {found} image placeholders, but the encoded images have {list(lengths)} tokens; an "
            "image was cut in two (prefill_chunk_size splits prompts: leave it out) or its placeholder was not expanded"
        )
    repeats, image, before = found // needed, 0, 0
    for row in range(items.shape[0]):
        image = before if row % repeats else image
        before = image
        columns = np.flatnonzero(visual[row])
        while len(columns):
            length = lengths[image] if image < len(lengths) else 0
            if not 0 < length <= len(columns) or columns[length - 1] - columns[0] != length - 1:
                raise ValueError(
                    f"row {row} does not hold the {length} consecutive placeholders of image {image}; an image was cut "
                    "in two (prefill_chunk_size splits prompts: leave it out) or images and prompts do not match"
                )
            items[row, columns[:length]] = image
            columns, image = columns[length:], image + 1
    return Layout(items)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array as a device tensor, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
