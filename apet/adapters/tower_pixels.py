"""Which patches of a picture show something that their neighbours do not already say.

The lossless case of PixelPrune (arXiv 2604.00886): a patch is predicted from the patch to its left, the one above and
the one between these two, value by value as LOCO-I does it (the smaller or larger of the first two behind an edge, else
their sum less the third); where all values are equal to the prediction, the patch is left out. The first patch is
always kept, the others of the first row are predicted by their left neighbour and those of the first column by the
upper one: our choice.
"""

import torch
from torch import Tensor


def unpredicted(values: Tensor) -> Tensor:
    """(N, H, W) bool, patches to keep of pictures whose patches (N, H, W, V) hold V values."""
    left, upper, corner = values[:, 1:, :-1], values[:, :-1, 1:], values[:, :-1, :-1]
    low, high = torch.minimum(left, upper), torch.maximum(left, upper)
    inner = torch.where(corner >= high, low, torch.where(corner <= low, high, left + upper - corner))
    keep = torch.ones(values.shape[:3], dtype=torch.bool, device=values.device)
    keep[:, 0, 1:] = (values[:, 0, 1:] != values[:, 0, :-1]).any(-1)
    keep[:, 1:, 0] = (values[:, 1:, 0] != values[:, :-1, 0]).any(-1)
    keep[:, 1:, 1:] = (values[:, 1:, 1:] != inner).any(-1)
    return keep


def patches_of(pixels: Tensor, side: int) -> Tensor:
    """(C, H, W, V) patches of `side` x `side` pixels of crops (C, 3, height, width); a rest that fills none is left."""
    crops, channels, height, width = pixels.shape
    rows, columns = height // side, width // side
    whole = pixels[:, :, : rows * side, : columns * side].reshape(crops, channels, rows, side, columns, side)
    return whole.permute(0, 2, 4, 1, 3, 5).reshape(crops, rows, columns, -1)
