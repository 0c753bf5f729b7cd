"""M-RoPE positions of shortened prompts: which a picture's tokens keep, and where the text behind it goes on.

Positions travel as channels of the embeddings, in their precision. Each is therefore split into two parts below 256,
which bfloat16 holds exactly.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHANNELS = 8  # time, height, width and extent, in two parts each
_BASE = 256


def extent(grid: Sequence[int], tempo: float) -> int:
    """Positions a picture takes: text behind it goes on this many after its first.

    Args:
        grid: (time, height, width) in tokens.
        tempo: Positions per step of time.
    """
    return 1 + max(int((grid[0] - 1) * tempo), grid[1] - 1, grid[2] - 1)


def grid_positions(grid: Sequence[int], tempo: float) -> Tensor:
    """(tokens, 4) int64 time, height and width of a picture's tokens, as if it stood first, and its extent."""
    axes = np.indices(tuple(grid)).reshape(3, -1)
    axes[0] = (axes[0] * tempo).astype(np.int64)
    return torch.from_numpy(np.column_stack([axes.T, np.full(axes.shape[1], extent(grid, tempo))]))


def to_channels(positions: Tensor) -> Tensor:
    """(tokens, 8) parts of positions (tokens, 4) below 65,536."""
    return torch.cat([positions // _BASE, positions % _BASE], dim=1)


def from_channels(channels: Tensor) -> Tensor:
    """(tokens, 4) float32 positions of channels (tokens, 8) of any floating dtype."""
    high, low = channels.float().chunk(2, dim=1)
    return high * _BASE + low


def prompt_positions(length: int, spans: Sequence[tuple[int, int]], extents: Sequence[int]) -> tuple[np.ndarray, int]:
    """Positions (length,) int64 of a prompt and the one behind it.

    Those of text are final. A picture's are all its first one: which of its tokens survive is known when it is encoded.

    Args:
        length: Tokens of the prompt.
        spans: (first column, columns) of the pictures, in order.
        extents: Positions each picture takes.
    """
    parts, done, position = [], 0, 0
    for (start, columns), taken in zip(spans, extents, strict=True):
        text = start - done
        parts += [np.arange(position, position + text), np.full(columns, position + text)]
        position, done = position + text + taken, start + columns
    parts.append(np.arange(position, position + length - done))
    return np.concatenate(parts).astype(np.int64), position + length - done
