"""Where the images of a batch sit in its sequences, and how the columns move when tokens are dropped.

Kept on the host: counts and block boundaries are needed to know tensor shapes, and following them here costs no further
synchronisation. Which tokens survive stays on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TEXT, PADDING = -1, -2


@dataclass(frozen=True)
class Block:
    """Consecutive columns of one image in one row.

    Attributes:
        row: Sequence of the batch.
        start: First column.
        length: Number of visual tokens.
        item: Index of the image among the features of the call.
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
    """

    items: np.ndarray

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

    def shorten(self, keep: Sequence[int]) -> "Move":
        """Cut every block (in `blocks` order) to its `keep` and pack the rows to the right (left padding)."""
        kept = iter(keep)
        sources, roles = [], []
        blocks = {(block.row, block.start): block for block in self.blocks()}
        for row, items in enumerate(self.items):
            columns, column = [], 0
            while column < len(items):
                block = blocks.get((row, column))
                if block is not None:
                    columns.extend(range(column, column + next(kept)))
                    column += block.length
                    continue
                if items[column] != PADDING:
                    columns.append(column)
                column += 1
            sources.append(columns)
            roles.append(items[columns])
        width = max(len(columns) for columns in sources)
        source = np.zeros((len(sources), width), dtype=np.int64)
        packed = np.full((len(sources), width), PADDING, dtype=self.items.dtype)
        for row, columns in enumerate(sources):
            if columns:
                source[row, width - len(columns) :] = columns
                packed[row, width - len(columns) :] = roles[row]
        return Move(source, Layout(packed))


@dataclass(frozen=True)
class Move:
    """Result of `Layout.shorten`.

    Attributes:
        source: (B, L') int64 old column of every new one; the first `keep` columns of each block, 0 for padding.
        layout: The new layout.
    """

    source: np.ndarray
    layout: Layout


def layout_from_ids(
    visual: np.ndarray, valid: np.ndarray, split_run: Callable[[int], list[int]], images: int | None
) -> Layout:
    """Layout of prompts given as ids.

    Args:
        visual: (B, L) bool, True on placeholders.
        valid: (B, L) bool, False on padding.
        split_run: Lengths of the images in a run of placeholders.
        images: Number of encoded images, if known. Beam search repeats every row: then each image serves several
            consecutive rows, and the batch holds a multiple of `images` blocks.
    """
    items = np.where(valid, TEXT, PADDING).astype(np.int64)
    runs: list[tuple[int, int, int]] = []
    for row in range(items.shape[0]):
        marked = np.flatnonzero(visual[row] & valid[row])
        for run in np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1):
            start = int(run[0]) if len(run) else 0
            for length in split_run(len(run)) if len(run) else ():
                runs.append((row, start, length))
                start += length
    repeats = len(runs) // images if images and runs and len(runs) % images == 0 else 1
    per_row = np.bincount([row for row, _, _ in runs], minlength=items.shape[0])
    first = np.concatenate([[0], np.cumsum(per_row[::repeats])])
    seen = np.zeros(items.shape[0], dtype=np.int64)
    for row, start, length in runs:
        items[row, start : start + length] = first[row // repeats] + seen[row]
        seen[row] += 1
    return Layout(items)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array as a device tensor, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
