"""Image preparation and `<image>` tokenising against values recorded from original LLaVA."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaTokenizer

from llava import mm_utils

GOLDEN = Path(__file__).parents[1] / "golden/llava"
RECORDED = json.loads((GOLDEN / "mm_utils.json").read_text(encoding="utf-8"))
PINPOINTS, TILE, SIDE = RECORDED["pinpoints"], RECORDED["tile"], RECORDED["patches_per_side"]
BASE_TOKENS = SIDE * SIDE


def picture(size, k=0):
    """The formula picture of the golden files."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    colors = np.stack([7 * x + 3 * y + k, 5 * x + 11 * y + 2 * k, x + y + 3 * k], -1)
    return Image.fromarray((colors % 256).astype(np.uint8))


def size_name(case):
    """A test id like 640x480."""
    return "x".join(map(str, case["size_wh"]))


def pixels(image):
    return np.asarray(image).tolist()


def model_config(aspect):
    return SimpleNamespace(image_aspect_ratio=aspect, image_grid_pinpoints=PINPOINTS)


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})


class CharTokenizer:
    """One id per character, with or without BOS; decodes ids above 2."""

    bos_token_id = 1

    def __init__(self, bos=True):
        self.bos = bos

    def __call__(self, text):
        return SimpleNamespace(input_ids=[1] * self.bos + [ord(c) for c in text])

    def batch_decode(self, ids, skip_special_tokens=False):
        return ["".join(chr(i) for i in row.tolist() if i > 2) for row in ids]


@pytest.mark.parametrize("case", RECORDED["anyres"], ids=size_name)
def test_anyres_geometry(case):
    size = tuple(case["size_wh"])
    best = mm_utils.select_best_resolution(size, mm_utils.parse_grid_pinpoints(PINPOINTS))
    assert list(best) == case["best_resolution_wh"]
    grid = mm_utils.get_anyres_image_grid_shape(size, PINPOINTS, TILE)
    assert list(grid) == case["grid_tiles_wh"]

    padded = mm_utils.resize_and_pad_image(Image.new("RGB", size, "white"), best)
    assert padded.size == best and list(padded.getbbox()) == case["content_box_xyxy"]
    left, top, right, bottom = padded.getbbox()
    assert [right - left, bottom - top] == case["resized_wh"]
    assert len(mm_utils.divide_to_patches(padded, TILE)) + 1 == case["n_crops"]

    bounds = mm_utils.unpad_bounds(grid[1] * SIDE, grid[0] * SIDE, size)
    rows, columns = bounds.bottom - bounds.top, bounds.right - bounds.left
    assert [rows, columns] == case["unpadded_rows_cols"]
    assert BASE_TOKENS + rows * (columns + 1) == case["tokens_spatial_unpad"]
    assert BASE_TOKENS * case["n_crops"] == case["tokens_spatial"]


@pytest.mark.parametrize("case", RECORDED["anyres_other"]["cases"], ids=size_name)
def test_anyres_pinpoints_as_string(case):
    text, tile = RECORDED["anyres_other"]["pinpoints_as_string"], RECORDED["anyres_other"]["tile"]
    size = tuple(case["size_wh"])
    assert list(mm_utils.get_anyres_image_grid_shape(size, text, tile)) == case["grid"]
    assert list(mm_utils.select_best_resolution(size, mm_utils.parse_grid_pinpoints(text))) == case["best"]


@pytest.mark.parametrize("bad", ["", "[]", "[(1, 2", "__import__('os')", "7", None, [[336]], [[0, 336]], [["a", "b"]]])
def test_bad_pinpoints(bad):
    with pytest.raises(ValueError, match="image_grid_pinpoints must be a list like"):
        mm_utils.parse_grid_pinpoints(bad)


@pytest.mark.parametrize(
    ("rows", "columns", "size", "expected"),
    [
        (48, 24, (55, 176), (0, 48, 5, 19)),  # 14 columns by one division, 16 by a rounded one
        (24, 72, (3000, 10), (12, 12, 0, 72)),
        (72, 24, (10, 3000), (0, 72, 12, 12)),
        (48, 48, (640, 480), (6, 42, 0, 48)),
    ],
)
def test_unpad(rows, columns, size, expected):
    bounds = mm_utils.unpad_bounds(rows, columns, size)
    assert (bounds.top, bounds.bottom, bounds.left, bounds.right) == expected
    grid = torch.arange(2 * rows * columns).view(2, rows, columns)
    top, bottom, left, right = expected
    assert torch.equal(mm_utils.unpad_image(grid, size), grid[:, top:bottom, left:right])


@pytest.mark.parametrize("case", RECORDED["expand2square"]["cases"], ids=size_name)
def test_expand2square(case):
    image = picture(case["size_wh"], RECORDED["expand2square"]["k"])
    assert pixels(mm_utils.expand2square(image, tuple(RECORDED["expand2square"]["background"]))) == case["out"]


def test_expand2square_keeps_mode_and_square_images():
    square = Image.new("L", (4, 4))
    assert mm_utils.expand2square(square, 0) is square
    wide = mm_utils.expand2square(Image.new("L", (4, 2), 9), 5)
    assert wide.mode == "L" and pixels(wide) == [[5] * 4, [9] * 4, [9] * 4, [5] * 4]


def test_divide_to_patches():
    golden = RECORDED["divide_to_patches"]
    tiles = mm_utils.divide_to_patches(picture(golden["size_wh"], golden["k"]), golden["patch"])
    assert len(tiles) == golden["n"] and [list(tile.size) for tile in tiles] == golden["sizes"]
    assert [list(tile.getpixel((0, 0))) for tile in tiles] == golden["first_pixels"]
    last = golden["patch"] - 1
    assert [list(tile.getpixel((last, last))) for tile in tiles] == golden["last_pixels"]


@pytest.mark.parametrize(
    "case", RECORDED["process_images"], ids=lambda case: f"{case['image_aspect_ratio']}-{case['size_wh']}"
)
def test_process_images(case, processor):
    image = picture(case["size_wh"], case["k"])
    (values,) = mm_utils.process_images([image], processor, model_config(case["image_aspect_ratio"]))
    assert list(values.shape) == case["shape"]
    crops = values.view(-1, 3, TILE, TILE).numpy()
    np.testing.assert_allclose(crops.mean((2, 3)).ravel(), case["mean"], atol=1e-4)
    np.testing.assert_allclose(crops.std((2, 3)).ravel(), case["std"], atol=1e-4)
    for key, value in case["samples"].items():
        assert crops[tuple(map(int, key.split(",")))] == pytest.approx(value, abs=2e-3)


@pytest.mark.parametrize(
    ("case", "aspect", "sizes"),
    [
        ("anyres_same_tiles", "anyres", [(300, 500), (200, 300)]),
        ("anyres_different_tiles", "anyres", [(300, 500), (640, 480)]),
        ("pad_two_sizes", "pad", [(500, 300), (30, 50)]),
    ],
)
def test_process_images_container(case, aspect, sizes, processor):
    golden = RECORDED["process_images_container"][case]
    values = mm_utils.process_images([picture(size) for size in sizes], processor, model_config(aspect))
    if golden["type"] == "tensor":
        assert isinstance(values, torch.Tensor) and list(values.shape) == golden["shape"]
    else:
        assert isinstance(values, list) and [list(value.shape) for value in values] == golden["shapes"]


@pytest.mark.parametrize("aspect", ["pad", "anyres", None])
@pytest.mark.parametrize("mode", ["P", "L", "LA", "1", "RGBA", "CMYK", "I;16"])
def test_process_images_of_any_mode(mode, aspect, processor):
    image = Image.new("I;16", (50, 30), 200) if mode == "I;16" else picture((50, 30)).convert(mode)
    config = model_config(aspect)
    values = mm_utils.process_images([image], processor, config)
    expected = mm_utils.process_images([image.convert("RGB")], processor, config)
    assert torch.equal(values, expected)


def test_process_images_refuses_nothing_and_missing_pinpoints(processor):
    with pytest.raises(ValueError, match="no images"):
        mm_utils.process_images([], processor, model_config("pad"))
    with pytest.raises(ValueError, match="got None"):
        mm_utils.process_images([picture((9, 9))], processor, SimpleNamespace(image_aspect_ratio="anyres"))


def test_load_image_from_base64():
    golden = RECORDED["load_image_from_base64"]
    image = mm_utils.load_image_from_base64(golden["b64"])
    assert (list(image.size), image.mode) == (golden["size"], golden["mode"])
    assert list(image.getpixel((0, 0))) == golden["pixel_0_0"]


@pytest.mark.parametrize("case", RECORDED["get_model_name_from_path"], ids=lambda case: case["path"])
def test_model_name(case):
    # Upstream raises IndexError for a checkpoint folder without a parent; here it keeps its own name.
    assert mm_utils.get_model_name_from_path(case["path"]) == case.get("name", case["path"])


@pytest.mark.parametrize("path", ["./checkpoint-7", "../checkpoint-7/", "/checkpoint-7"])
def test_model_name_without_a_named_parent(path):
    assert mm_utils.get_model_name_from_path(path) == "checkpoint-7"


@pytest.mark.parametrize("case", RECORDED["tokenizer_image_token"]["cases"])
def test_image_token_ids(case):
    ids = mm_utils.tokenizer_image_token(case["prompt"], CharTokenizer(case["bos"]))
    assert ids == case["ids"]


def test_image_token_index_and_tensors():
    golden = RECORDED["tokenizer_image_token"]["custom_index"]
    ids = mm_utils.tokenizer_image_token(golden["prompt"], CharTokenizer(), golden["index"], return_tensors="pt")
    assert ids.dtype == torch.int64 and ids.tolist() == golden["ids"]
    with pytest.raises(ValueError, match="return_tensors='np'"):
        mm_utils.tokenizer_image_token("x", CharTokenizer(), return_tensors="np")


PIECES = ["x", " x", "  x", "\nx", " \nx", " ", "", "\u2581x", "a  b", "x ", "é", "\t x", " the image ", "   "]


@pytest.fixture(scope="module")
def llama():
    """A toy SentencePiece tokenizer as transformers loads it, and the SentencePiece model itself."""
    folder = GOLDEN / "tiny/llava-v1.5-tiny"
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return LlamaTokenizer.from_pretrained(folder), model


@pytest.mark.parametrize("piece", PIECES)
def test_pieces_keep_their_leading_space(piece, llama):
    tokenizer, model = llama
    assert mm_utils.tokenizer_image_token(piece, tokenizer) == [1, *model.encode(piece)]
    between = mm_utils.tokenizer_image_token(f"{piece}<image>{piece}<image>x", tokenizer)
    assert between == [1, *model.encode(piece), -200, *model.encode(piece), -200, *model.encode("x")]


@pytest.mark.parametrize("case", RECORDED["KeywordsStoppingCriteria"]["cases"])
def test_keywords_stop(case):
    prompt = torch.zeros(1, case["prompt_len"], dtype=torch.long)
    criteria = mm_utils.KeywordsStoppingCriteria(case["keywords"], CharTokenizer(), prompt)
    assert criteria(torch.tensor([case["output_ids"]]), None) is case["stop"]


def test_keywords_stop_when_every_row_has_stopped():
    criteria = mm_utils.KeywordsStoppingCriteria(["##"], CharTokenizer(), torch.zeros(2, 5, dtype=torch.long))
    done, open_row = [9, 9, 9, 9, 9, 65, 35, 35], [9, 9, 9, 9, 9, 65, 66, 35]
    assert criteria(torch.tensor([done, done])) is True
    assert criteria(torch.tensor([done, open_row])) is False


def test_keywords_stop_on_ids_without_the_prompt():
    """Generation from embeddings passes only the new ids."""
    criteria = mm_utils.KeywordsStoppingCriteria(["end"], CharTokenizer(), torch.zeros(1, 50, dtype=torch.long))
    assert criteria(torch.tensor([[120, ord("e"), ord("n")]])) is False
    assert criteria(torch.tensor([[120, ord("e"), ord("n"), ord("d")]])) is True
