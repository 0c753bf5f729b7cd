"""M-RoPE positions of shortened prompts: which a picture's tokens keep, and where the text behind it goes on.

An engine lays positions out before it encodes a picture, so it cannot know yet which tokens survive. `prompt_positions`
gives the text its final positions and leaves a mark in every column of a picture: where the picture starts. The
embeddings bring the survivors' positions inside the picture along, as channels in their own precision, and `fill_marks`
turns marks into positions, chunk by chunk. Nothing is searched for: the marks stand where the engine's spans are.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHANNELS = 6  # time, height and width, in two parts each
# Channels are exact in bfloat16 up to this.
_BASE = 256


def extent(grid: Sequence[int], tempo: float) -> int:
    """Positions a picture takes: text behind it goes on this many after its first.

    Args:
        grid: (time, height, width) in tokens.
        tempo: Positions per step of time.
    """
    return 1 + max(int((grid[0] - 1) * tempo), grid[1] - 1, grid[2] - 1)


def grid_positions(grid: Sequence[int], tempo: float) -> Tensor:
    """(tokens, 3) int64 time, height and width of a picture's tokens, as if it stood first."""
    axes = np.indices(tuple(grid)).reshape(3, -1)
    axes[0] = (axes[0] * tempo).astype(np.int64)
    return torch.from_numpy(axes.T.copy())


def framed_extent(stamps: Sequence[int], raster: Sequence[int]) -> int:
    """Positions that a video takes whose frames stand apart.

    Args:
        stamps: Text tokens in front of the tokens of every frame; behind them stands one.
        raster: (height, width) of a frame in tokens.
    """
    return sum(stamps) + len(stamps) * (max(raster) + 1)


def framed_positions(stamps: Sequence[int], raster: Sequence[int], kept: Sequence[Sequence[int]]) -> Tensor:
    """(rows, 3) int64 positions of such a video, as if it stood first: its text, and the tokens kept of every frame.

    Args:
        stamps: As in `framed_extent`.
        raster: As in `framed_extent`.
        kept: Per frame the numbers of its kept tokens.
    """
    places = grid_positions((1, *raster), 1.0)
    parts, position = [], 0
    for text, numbers in zip(stamps, kept, strict=True):
        parts.append(torch.arange(position, position + text).view(-1, 1).expand(-1, 3))
        position += text
        parts.append(places[list(numbers)] + position)
        position += max(raster)
        parts.append(torch.full((1, 3), position))
        position += 1
    return torch.cat(parts)


def to_channels(positions: Tensor) -> Tensor:
    """(tokens, 6) parts of positions (tokens, 3) below 65,536."""
    return torch.cat([positions // _BASE, positions % _BASE], dim=1)


def from_channels(channels: Tensor) -> Tensor:
    """(tokens, 3) int64 positions of channels (tokens, 6) of any floating dtype."""
    high, low = channels.long().chunk(2, dim=1)
    return high * _BASE + low


def prompt_positions(length: int, spans: Sequence[tuple[int, int]], extents: Sequence[int]) -> tuple[Tensor, int]:
    """Positions (3, length) int64 of a prompt, and the position behind it.

    A column of a picture that starts at position p and takes e of them is marked (-1 - p, p + e, 0).

    Args:
        length: Tokens of the prompt.
        spans: (first column, columns) of the pictures, in order.
        extents: Positions each picture takes.
    """
    positions, done, position = np.empty((3, length), dtype=np.int64), 0, 0
    for (start, columns), taken in zip(spans, extents, strict=True):
        positions[:, done:start] = np.arange(position, position + start - done)
        position, done = position + start - done, start + columns
        positions[:, start:done] = np.array([[-1 - position], [position + taken], [0]])
        position += taken
    positions[:, done:] = np.arange(position, position + length - done)
    return torch.from_numpy(positions), position + length - done


def fill_marks(positions: Tensor, marks: Tensor, computed: int, offsets: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Positions with those of embeddings that enter the prompt now, and the position behind the prompt.

    Args:
        positions: (3, length) int64; columns that were filled before stay as they are.
        marks: (3, length) int64 as `prompt_positions` laid them out, at least from `computed` on.
        computed: Columns of the prompt that lie behind the engine already (chunks before, or a prefix hit).
        offsets: Per picture (rows, 3) int64 positions inside it, for the first marked columns from `computed` on.

    Raises:
        ValueError: More rows than marked columns.
    """
    last = marks[:, -1].tolist()
    end = last[0] + 1 if last[0] >= 0 else last[1]
    if not offsets:
        return positions, end
    inside = torch.cat(list(offsets))
    columns = computed + torch.nonzero(marks[0, computed:] < 0).flatten()
    if len(columns) < len(inside):
        raise ValueError(
            f"{len(inside)} embeddings enter a prompt that has {len(columns)} columns of pictures from column "
            f"{computed} on; this vLLM hands over positions otherwise than the tested ones"
        )
    columns = columns[: len(inside)]
    filled, old = inside.T - 1 - marks[0, columns], positions[:, columns]
    positions = positions.clone()
    positions[:, columns] = torch.where(old[0] < 0, filled, old)
    return positions, end
