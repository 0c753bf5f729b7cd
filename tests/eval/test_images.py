"""Opening pictures: what is shown of unusual ones, and that a broken one is an `ImageError` and nothing else."""

import base64
import io
import os
import random
import struct
import warnings

import numpy as np
import pytest
from pictures import BROKEN, animation, encoded, floats, grey16, noise, png
from PIL import Image

from apet.eval.benchmarks import Question
from apet.eval.images import ImageError, open_file, open_images, open_picture


def opened(content: bytes) -> np.ndarray:
    image = open_picture(io.BytesIO(content), "the picture")
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_one_sentence(name, tmp_path):
    make, said = BROKEN[name]
    path = tmp_path / "p.png"
    path.write_bytes(make())
    with pytest.raises(ImageError, match=said) as caught:
        open_file(path)
    assert str(caught.value).startswith(f"image file {path} ")
    question = Question(7, "?", "?", image_base64=base64.b64encode(make()).decode())
    with pytest.raises(ImageError, match=f"the image of question 7 .*{said}"):
        open_images(question, "")


def test_no_broken_bytes_are_anything_but_an_image_error():
    whole = [encoded(noise(), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP")] + [animation()]
    draw = random.Random(0)
    failed = 0
    for _ in range(400):
        content = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(min(len(content), 200))] = draw.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about bytes it mends itself
            try:
                opened(bytes(content[: draw.randrange(len(content) // 2, len(content) + 1)]))
            except ImageError as error:
                assert "\n" not in str(error)
                failed += 1
    assert failed > 100


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(kind):
    pixels = opened(encoded(grey16(), kind))
    expected = np.rint(np.asarray(grey16(), dtype=float) / 257)
    assert (pixels == expected[..., None]).all() and pixels.min() == 0 and pixels.max() == 255


def test_a_tiff_of_twelve_bits_has_the_white_of_twelve():
    """Pillow unpacks them to 16-bit values of at most 4095."""
    values = np.array([[0, 4095, 2048, 1024]])
    packed = int("".join(f"{value:012b}" for value in values.ravel()), 2).to_bytes(6, "big")
    tags = [(256, 3, 4), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1),
            (279, 4, 6)]  # fmt: skip

    entries = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in tags)
    content = b"II*\x00" + struct.pack("<I", 14) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert opened(content)[0, :, 0].tolist() == [0, 255, 128, 64]


def test_floats_from_0_to_1_are_scaled_to_eight_bits():
    pixels = opened(encoded(floats(0, 1), "TIFF"))
    assert pixels.min() == 0 and pixels.max() == 255 and 126 < pixels.mean() < 129


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_what_pillow_makes_of_them(mode):
    content = encoded(noise(mode=mode), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert (opened(content) == np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))).all()


def test_a_transparent_palette_and_an_animation_show_their_first_colours():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 10, 10])
    assert opened(encoded(image, transparency=0))[0, 0].tolist() == [250, 10, 10]
    assert opened(animation())[0, 0].tolist() == [255, 0, 0]


def test_a_large_picture_below_the_limit_is_opened():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of half its limit; a warning made an error is met like the limit
        with pytest.raises(ImageError, match="too large to open"):
            opened(png(10_000, 10_000))


def test_what_is_no_regular_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, said in (("pipe.png", "not a regular file"), (".", "not a regular file"), ("none.png", "does not exist"),
                       ("x" * 300, "cannot be read: File name too long"), ("a\0b", "does not exist"),
                       ("\ud800.png", "does not exist")):  # fmt: skip
        with pytest.raises(ImageError, match=said):
            open_images(Question(0, "?", "?", image=name), str(tmp_path))


@pytest.mark.parametrize("text", ["!", "abc", "äöü", "A" * 5])
def test_what_is_no_base64_is_named(text):
    with pytest.raises(ImageError, match="of question 3 is not"):
        open_images(Question(3, "?", "?", image_base64=text), "")
