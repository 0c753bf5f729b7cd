"""Images and prompts on their way into a LLaVA model: preparation of pictures, anyres geometry, `<image>` in token ids.

Sizes are (width, height) everywhere, as in original LLaVA (transformers' own LLaVA classes use (height, width)). Ties,
roundings and paste positions follow the original exactly: they decide how many visual tokens an image becomes.
"""

import ast
import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

Size = tuple[int, int]  # (width, height)
# What Pillow opens at most. A strip of few pixels becomes a square, or an enlarged strip, of any number of them.
_MOST_PIXELS = 178_956_970


def load_image_from_base64(image: str) -> Image.Image:
    """The picture of a base64-encoded file, in its own mode."""
    return Image.open(BytesIO(base64.b64decode(image)))


def parse_grid_pinpoints(grid_pinpoints: str | Sequence[Sequence[int]]) -> list[Size]:
    """Candidate resolutions [(width, height), ...] of a list or its string form.

    Raises:
        ValueError: not a non-empty list of pairs of positive integers. Strings are parsed as literals, never run.
    """
    try:
        parsed = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
        pairs = [(int(width), int(height)) for width, height in parsed]
    except (ValueError, TypeError, SyntaxError):
        pairs = []
    if not pairs or min(map(min, pairs)) < 1:
        raise ValueError(f"image_grid_pinpoints must be a list like [[336, 672], [672, 336]], got {grid_pinpoints!r}")
    return pairs


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """The candidate that keeps most of the image's pixels, then wastes least area; the earliest wins ties."""
    width, height = original_size

    def merit(candidate: Size) -> Size:
        scale = min(candidate[0] / width, candidate[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - candidate[0] * candidate[1]

    return max(possible_resolutions, key=merit)


def get_anyres_image_grid_shape(
    image_size: Size, grid_pinpoints: str | Sequence[Sequence[int]], patch_size: int
) -> tuple[int, int]:
    """(columns, rows) of the tiles of side `patch_size` that an image of `image_size` is cut into."""
    width, height = select_best_resolution(image_size, parse_grid_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


@dataclass(frozen=True)
class UnpadBounds:
    """The part of a feature grid that shows the image: rows `top` to `bottom`, columns `left` to `right`, ends open."""

    top: int
    bottom: int
    left: int
    right: int


def unpad_bounds(rows: int, columns: int, original_size: Size) -> UnpadBounds:
    """Where an image of `original_size` lies in a (rows, columns) grid it was padded into; may be empty."""
    width, height = original_size
    if width / height > columns / rows:
        # The order of the float operations matters: a rounded quotient here costs rows in 1 of 4000 image sizes.
        padding = (rows - int(height * (columns / width))) // 2
        return UnpadBounds(padding, rows - padding, 0, columns)
    padding = (columns - int(width * (rows / height))) // 2
    return UnpadBounds(0, rows, padding, columns - padding)


def unpad_image(tensor: torch.Tensor, original_size: Size) -> torch.Tensor:
    """A view of features (channels, rows, columns) without the rows or columns that only saw padding."""
    bounds = unpad_bounds(tensor.shape[1], tensor.shape[2], original_size)
    return tensor[:, bounds.top : bounds.bottom, bounds.left : bounds.right]


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """The image scaled into `target_resolution` with its aspect kept, centred on black, RGB."""
    target_width, target_height = target_resolution
    scale_x, scale_y = target_width / image.width, target_height / image.height
    if scale_x < scale_y:
        size = target_width, min(math.ceil(image.height * scale_x), target_height)
    else:
        size = min(math.ceil(image.width * scale_y), target_width), target_height
    canvas = Image.new("RGB", (target_width, target_height))
    canvas.paste(image.resize(size), ((target_width - size[0]) // 2, (target_height - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles in row-major order; tiles over the right and lower edge are filled with black."""
    corners = [(x, y) for y in range(0, image.height, patch_size) for x in range(0, image.width, patch_size)]
    return [image.crop((x, y, x + patch_size, y + patch_size)) for x, y in corners]


def expand2square(pil_img: Image.Image, background_color: int | tuple[int, ...]) -> Image.Image:
    """The image centred on a square of its own mode; a square image is returned as it is.

    `background_color` has to fit the mode: convert palette and grey images to RGB before passing a triple.

    Raises:
        ValueError: The square would have more pixels than Pillow opens.
    """
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    _check_pixels(pil_img.size, side * side)
    canvas = Image.new(pil_img.mode, (side, side), background_color)
    canvas.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return canvas


def process_anyres_image(
    image: Image.Image, processor: Any, grid_pinpoints: str | Sequence[Sequence[int]]
) -> torch.Tensor:
    """Pixel values (1 + tiles, 3, height, width): the whole image squashed to a square, then its tiles row by row."""
    image = image.convert("RGB")
    best = select_best_resolution(image.size, parse_grid_pinpoints(grid_pinpoints))
    tiles = divide_to_patches(resize_and_pad_image(image, best), processor.crop_size["height"])
    overview = image.resize((_input_side(processor), _input_side(processor)))
    return torch.stack([_preprocess(crop, processor) for crop in (overview, *tiles)])


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Pixel values of some images, prepared the way `model_cfg.image_aspect_ratio` asks for.

    Args:
        images: PIL images of any mode; palette, grey, alpha and CMYK ones are converted to RGB.
        image_processor: a CLIP image processor.
        model_cfg: "pad" fills up to a square with the mean colour; "anyres" cuts tiles by
            `model_cfg.image_grid_pinpoints`; anything else or nothing resizes the short side and crops the centre.

    Returns:
        (images, 3, H, W), or (images, 1 + tiles, 3, H, W) for anyres; a list when images differ in their tiles.

    Raises:
        ValueError: no images, anyres without usable pinpoints, or a picture so long that it would take gigabytes.
    """
    if not images:
        raise ValueError("process_images got no images; a prompt without pictures needs no pixel values")
    rgb = [image.convert("RGB") for image in images]
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect == "anyres":
        pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
        pixels = [process_anyres_image(image, image_processor, pinpoints) for image in rgb]
    else:
        if aspect == "pad":
            mean_color = tuple(int(mean * 255) for mean in image_processor.image_mean)
            rgb = [expand2square(image, mean_color) for image in rgb]
        for image in rgb:
            _check_pixels(image.size, _input_side(image_processor) ** 2 * max(image.size) // min(image.size))
        pixels = [_preprocess(image, image_processor) for image in rgb]
    return torch.stack(pixels) if len({image.shape for image in pixels}) == 1 else pixels


def _check_pixels(size: Size, pixels: int) -> None:
    """Raise ValueError where preparing a picture of this size takes too many pixels on the way."""
    if pixels > _MOST_PIXELS:
        raise ValueError(
            f"a picture of {size[0]:,} x {size[1]:,} pixels would become {pixels:,} on the way to the model, more than "
            f"the {_MOST_PIXELS:,} that are allowed; scale it down or crop it"
        )


def _input_side(processor: Any) -> int:
    """Side of the square the vision tower sees."""
    return processor.size.get("shortest_edge") or processor.size["height"]


def _preprocess(image: Image.Image, processor: Any) -> torch.Tensor:
    """(3, H, W) of one image."""
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Token ids of a prompt, with `image_token_index` for every `<image>`.

    The text between images is tokenised piece by piece, as in original LLaVA: the piece after an image starts with
    the tokenizer's word-start mark. BOS comes once, in front.

    Args:
        prompt: text with any number of `<image>`.
        tokenizer: called with one text, returns an object with `input_ids`.
        image_token_index: what stands for an image.
        return_tensors: None for a list, "pt" for an int64 tensor (tokens,).

    Raises:
        ValueError: another `return_tensors`.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r} is not supported; use 'pt' or None")
    pieces = [_piece_ids(piece, tokenizer) for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids = pieces[0][:1] if has_bos else []
    for position, piece in enumerate(pieces):
        if position > 0:
            ids.append(image_token_index)
        ids += piece[1:] if has_bos else piece
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def _piece_ids(piece: str, tokenizer: Any) -> list[int]:
    """Ids of a piece of text, its leading space included.

    SentencePiece marks the start of a text with an extra space. The tokenizers backend of transformers 5 adds that mark
    only where no space stands already, and so loses one; a second space gives the checkpoint's ids back.
    """
    if piece.startswith((" ", "\u2581")) and tokenizer(" x").input_ids == tokenizer("x").input_ids:
        piece = " " + piece
    return list(tokenizer(piece).input_ids)


def get_model_name_from_path(model_path: str) -> str:
    """The last folder of a path; `checkpoint-N` is joined to its parent, if there is one, as `parent_checkpoint-N`."""
    parts = model_path.strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1 and parts[-2] not in (".", ".."):
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops when every row ends in a keyword: by its ids, or as text among the newest generated ids.

    Args:
        keywords: texts to stop at.
        tokenizer: the model's tokenizer.
        input_ids: the prompt (batch, tokens); its length separates prompt and answer.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        self.keyword_ids = [torch.tensor(self._without_bos(tokenizer(word).input_ids)) for word in self.keywords]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)

    def __call__(self, output_ids: torch.LongTensor, scores: torch.FloatTensor | None = None, **kwargs: Any) -> bool:
        """Whether all rows of `output_ids` (batch, tokens) have stopped."""
        return all(self._stopped(row) for row in output_ids)

    def _stopped(self, row: torch.Tensor) -> bool:
        """Whether one row ends in a keyword."""
        # Generation from embeddings shows only the new ids, never more than the prompt's length plus them.
        generated = len(row) - self.start_len if len(row) > self.start_len else len(row)
        if any(len(ids) and torch.equal(row[-len(ids) :].cpu(), ids) for ids in self.keyword_ids):
            return True
        newest = row[len(row) - min(generated, self.max_keyword_len) :]
        text = self.tokenizer.batch_decode(newest.unsqueeze(0), skip_special_tokens=True)[0]
        return any(word in text for word in self.keywords)

    def _without_bos(self, ids: Sequence[int]) -> list[int]:
        """Ids without the BOS in front of a text."""
        return list(ids[1:]) if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id else list(ids)
