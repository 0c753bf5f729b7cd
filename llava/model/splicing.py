"""Where every column of a spliced prompt comes from: host arithmetic on ids, without a look at the device."""

from collections.abc import Sequence

import numpy as np

from apet.adapters.layout import PADDING, TEXT
from llava.constants import IMAGE_TOKEN_INDEX


def arrange(
    ids: np.ndarray, real: np.ndarray, lengths: Sequence[int], limit: int | None, padding_side: str
) -> tuple[np.ndarray, np.ndarray]:
    """Put images in place of the -200 ids and pad the rows.

    Args:
        ids: (B, W) int64.
        real: (B, W) bool, False on padding, wherever it is.
        lengths: Tokens of every image. A row without a placeholder uses up one image without showing it.
        limit: Longest row; None for any.
        padding_side: "left" or "right".

    Returns:
        Two (B, L) int64 arrays. The source of every column: its place in the flattened ids for text, B * W and the
        place in the sequence of all images for a visual token, -1 for padding. And its item: the number of the image,
        -1 for text, -2 for padding.

    Raises:
        IndexError: More placeholders than images.
    """
    starts, next_image, rows = np.cumsum([0, *lengths]), 0, []
    for row in range(len(ids)):
        columns = np.flatnonzero(real[row])
        places = np.flatnonzero(ids[row, columns] == IMAGE_TOKEN_INDEX)
        if len(places) > max(0, len(lengths) - next_image):
            raise IndexError(
                f"the prompts hold more image placeholders than the {len(lengths)} images given (row {row}); pass one "
                "image per placeholder"
            )
        text, *behind = np.split(columns + row * ids.shape[1], places)
        source, items = [text], [np.full(len(text), TEXT)]
        for number, text in enumerate(behind, next_image):
            source += [ids.size + np.arange(starts[number], starts[number + 1]), text[1:]]
            items += [np.full(lengths[number], number), np.full(len(text) - 1, TEXT)]
        rows.append((np.concatenate(source)[:limit], np.concatenate(items)[:limit]))
        next_image += max(1, len(places))
    width = max(len(source) for source, _ in rows)
    pads = [(width - len(source), 0) if padding_side == "left" else (0, width - len(source)) for source, _ in rows]
    padded = [
        [np.pad(part, pad, constant_values=value) for part, value in zip(row, (-1, PADDING), strict=True)]
        for row, pad in zip(rows, pads, strict=True)
    ]
    source, items = zip(*padded, strict=True)
    return np.stack(source), np.stack(items)
