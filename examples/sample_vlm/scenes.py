"""Scenes: a 336x336 picture (or a window of one) over a real photograph, with shapes, a handwritten digit and a word.

Positions are in pixels of the full 336x336 canvas even when only a window of it is drawn, so "top left" means the same
for every window. Windows start on the 14-pixel patch grid (their patches are patches of the full picture); objects do
not.
"""

import io
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from examples.sample_vlm import sources

CANVAS = 336
PATCH = 14
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (222, 38, 38),
    "green": (40, 178, 60),
    "blue": (48, 92, 232),
    "yellow": (242, 220, 44),
    "purple": (160, 56, 200),
    "orange": (246, 140, 28),
    "white": (244, 244, 244),
}
SHAPE_COLORS = tuple(c for c in COLORS if c != "white")
KINDS = ("nothing", *SHAPES, *"0123456789", *sources.LETTERS)
COLOR_LABELS = ("nothing", *COLORS)
MAX_LETTERS = 5

_SUPERSAMPLE = 4
_JPEG_SHARE = 0.3  # of the pictures went through a JPEG file, as those of the benchmarks
_JITTER = 14  # how far a colour channel may stray from its palette value
_GAP = 4  # pixels left free around every object
_VISIBLE = 0.2  # a patch is labelled with an object that covers at least this part of it


@dataclass(frozen=True)
class Thing:
    """An object of a scene; `box` is (x, y, width, height) in canvas pixels, `name` a shape, a digit or a word."""

    kind: str
    name: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the box in canvas pixels."""
        x, y, w, h = self.box
        return x + w / 2, y + h / 2


@dataclass
class Scene:
    """A drawn scene.

    Attributes:
        side: pixels per side of the drawn window; 336 is the whole canvas.
        origin: (x, y) of the window on the canvas, multiples of 14.
        things: what was drawn.
        pixels: (side, side, 3) uint8.
        labels: (3, side/14, side/14) int64: per patch the index into KINDS, into COLOR_LABELS, and the letter's place
            in its word (1-5, 0 for none). Training's dense auxiliary target; nothing else reads it.
    """

    side: int
    origin: tuple[int, int]
    things: list[Thing] = field(default_factory=list)
    pixels: np.ndarray | None = None
    labels: np.ndarray | None = None

    def of(self, kind: str) -> list[Thing]:
        """The things of one kind: `shape`, `digit` or `word`."""
        return [t for t in self.things if t.kind == kind]


@dataclass(frozen=True)
class _Stamp:
    """Ink to put on the canvas: (h, w) uint8 alpha, and the parts to label as (kind, place, x, y, w, h) inside it."""

    alpha: np.ndarray
    parts: tuple[tuple[str, int, int, int, int, int], ...]


@dataclass(frozen=True)
class Style:
    """How large and how bright things are drawn. Ranges are (low, high); sizes are pixels.

    Attributes:
        shapes, digits, letters: sizes of shapes, of digits (height) and of fonts (capitals are about 0.7 of them).
        shapes_small, digits_small: the largest of them in windows under 200 pixels.
        saturation, brightness: what the photograph's colours are multiplied with.
        lift: up to how much every background pixel is brightened.
        plates: per kind of thing, how often a dark plate lies under it.
        cutouts: up to how many pieces of other photographs are pasted in.
    """

    shapes: tuple[float, float] = (13, 60)
    shapes_small: float = 44
    digits: tuple[float, float] = (24, 64)
    digits_small: float = 48
    letters: tuple[float, float] = (14, 34)
    saturation: tuple[float, float] = (0.3, 0.8)
    brightness: tuple[float, float] = (0.25, 0.75)
    lift: float = 20
    plates: tuple[tuple[str, float], ...] = (("word", 0.5),)
    cutouts: int = 0


# Backgrounds duller and darker than the objects, as signs and stickers stand out from a street, and small things.
DIM = Style()
# The same with things of five to seven patches, as in photographs: budgets then cost what they cost on real benchmarks.
LARGE = replace(DIM, shapes=(70, 100), digits=(70, 100), letters=(28, 34))
# Things of two to six patches on photographs of ordinary brightness, with pieces of other photographs between them.
BRIGHT = Style(
    shapes=(30, 84),
    shapes_small=60,
    digits=(44, 90),
    digits_small=70,
    letters=(40, 58),
    saturation=(0.6, 1.0),
    brightness=(0.6, 1.05),
    lift=12,
    plates=(("word", 0.85), ("digit", 0.85)),
    cutouts=3,
)


def make_scene(
    rng: np.random.Generator,
    split: str,
    side: int = CANVAS,
    want: tuple[str, ...] = (),
    style: Style = DIM,
) -> Scene:
    """A random scene.

    Args:
        rng: the only source of randomness.
        split: `train` or `test`: which photographs, digit samples and words may appear.
        side: window side in pixels, a multiple of 14 up to 336.
        want: kinds (`digit`, `word`) that must be present; the others appear by chance.
        style: sizes and brightness.
    """
    origin = tuple(int(v) * PATCH for v in rng.integers(0, (CANVAS - side) // PATCH + 1, size=2))
    scene = Scene(side, origin)
    scene.pixels = _background(rng, split, side, style)
    scene.labels = np.zeros((3, side // PATCH, side // PATCH), dtype=np.int64)
    small = side < CANVAS / 2
    if "word" in want or rng.random() < (0.35 if small else 0.6):
        _place(scene, rng, "word", _random_word(rng, split), split, style)
    if "digit" in want or rng.random() < (0.5 if small else 0.7):
        _place(scene, rng, "digit", str(rng.integers(10)), split, style)
    for name in _shape_names(rng, int(rng.integers(1, 4) if small else rng.integers(2, 6))):
        _place(scene, rng, "shape", name, split, style)
    scene.pixels = _finish(rng, scene.pixels)
    return scene


def maybe_jpeg(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sometimes the picture after a round trip through a JPEG of ordinary quality."""
    if rng.random() > _JPEG_SHARE:
        return pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(70, 95)), subsampling=0)
    return np.array(Image.open(buffer))


def _random_word(rng: np.random.Generator, split: str) -> str:
    """A word of the split; in training mostly letters in random order, so that reading cannot become guessing."""
    if split == "train" and rng.random() < 0.5:
        while True:
            word = "".join(rng.choice(list(sources.LETTERS), size=int(rng.integers(3, MAX_LETTERS + 1))))
            if word not in sources.words("test"):
                return word
    return str(rng.choice(sources.words(split)))


def _shape_names(rng: np.random.Generator, count: int) -> list[str]:
    """Shapes to draw; repeats are made likely enough for counting to be a question."""
    names = [str(n) for n in rng.permutation(SHAPES)]
    return [names[int(rng.integers(3))] if rng.random() < 0.25 else names[i % len(names)] for i in range(count)]


def _background(rng: np.random.Generator, split: str, side: int, style: Style) -> np.ndarray:
    """An augmented crop of a photograph with some neutral clutter, (side, side, 3) uint8."""
    photo = sources.photos(split)[int(rng.integers(len(sources.photos(split))))]
    scale = side / CANVAS
    crop = rng.uniform(0.45, 1.0) * min(photo.size) * scale
    x, y = rng.uniform(0, photo.width - crop), rng.uniform(0, photo.height - crop)
    image = photo.resize((side, side), Image.Resampling.BILINEAR, box=(x, y, x + crop, y + crop))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.BoxBlur(float(rng.uniform(0.3, 1.5))))
    if rng.random() < 0.5:
        _clutter(rng, image)
    if style.cutouts:
        _paste_cutouts(rng, image, split, style.cutouts)
    pixels = np.asarray(image, dtype=np.float32)
    gray = pixels.mean(axis=2, keepdims=True)
    pixels = gray + (pixels - gray) * rng.uniform(*style.saturation)
    return pixels * rng.uniform(*style.brightness, size=(1, 1, 1)) + rng.uniform(0, style.lift)


def _paste_cutouts(rng: np.random.Generator, image: Image.Image, split: str, most: int) -> None:
    """Up to `most` round or square pieces of the split's photographs: real things that no question asks about."""
    for _ in range(int(rng.integers(0, most + 1))):
        photo = sources.photos(split)[int(rng.integers(len(sources.photos(split))))]
        size = int(rng.uniform(0.12, 0.32) * image.width)
        crop = rng.uniform(0.2, 0.6) * min(photo.size)
        x, y = rng.uniform(0, photo.width - crop), rng.uniform(0, photo.height - crop)
        piece = photo.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + crop, y + crop))
        mask = Image.new("L", piece.size, 255)
        if rng.random() < 0.5:
            mask.paste(0, (0, 0, size, size))
            ImageDraw.Draw(mask).ellipse((0, 0, size - 1, size - 1), fill=255)
        image.paste(piece, tuple(int(v) for v in rng.integers(0, image.width - size, size=2)), mask)


def _clutter(rng: np.random.Generator, image: Image.Image) -> None:
    """Grey lines, boxes and dots that no question asks about."""
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 2 + image.width // 40))):
        x, y = rng.uniform(0, image.width, size=2)
        dx, dy = rng.uniform(-60, 60, size=2)
        gray = (int(rng.integers(20, 200)),) * 3
        style = rng.integers(3)
        if style == 0:
            draw.line((x, y, x + dx, y + dy), fill=gray, width=int(rng.integers(1, 4)))
        elif style == 1:
            draw.rectangle((x, y, x + abs(dx) / 2 + 2, y + abs(dy) / 2 + 2), outline=gray)
        else:
            radius = rng.uniform(1, 4)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=gray)


def _finish(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Sensor noise and rounding: float to uint8."""
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * float(rng.uniform(0, 5))
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def _place(scene: Scene, rng: np.random.Generator, kind: str, name: str, split: str, style: Style) -> None:
    """Draw one thing at a free random place and record it; a thing that finds no place is left out."""
    stamp = {"shape": _shape_stamp, "digit": _digit_stamp, "word": _word_stamp}[kind]
    stamp = stamp(rng, name, scene.side, split, style)
    height, width = stamp.alpha.shape
    spot = _free_spot(scene, rng, width, height)
    if spot is None:
        return
    color = str(rng.choice(SHAPE_COLORS if kind == "shape" else tuple(COLORS)))
    thing = Thing(kind, name, color, (spot[0], spot[1], width, height))
    scene.things.append(thing)
    x, y = spot[0] - scene.origin[0], spot[1] - scene.origin[1]
    plate = dict(style.plates).get(kind, 0.0)
    _blend(scene.pixels[y : y + height, x : x + width], stamp.alpha, rng, color, plate)
    for label, place, part_x, part_y, part_w, part_h in stamp.parts:
        ink = stamp.alpha[part_y : part_y + part_h, part_x : part_x + part_w] > 96 if kind == "shape" else None
        _label(scene, (x + part_x, y + part_y, part_w, part_h), ink, label, color, place)


def _free_spot(scene: Scene, rng: np.random.Generator, width: int, height: int) -> tuple[int, int] | None:
    """Canvas (x, y) where a box of this size touches no other thing, or None after 30 tries."""
    if max(width, height) + 2 > scene.side:
        return None
    for _ in range(30):
        x = scene.origin[0] + int(rng.integers(1, scene.side - width))
        y = scene.origin[1] + int(rng.integers(1, scene.side - height))
        if not any(_overlap((x, y, width, height), t.box) for t in scene.things):
            return x, y
    return None


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether two boxes come closer than the gap."""
    return (
        a[0] < b[0] + b[2] + _GAP
        and b[0] < a[0] + a[2] + _GAP
        and a[1] < b[1] + b[3] + _GAP
        and b[1] < a[1] + a[3] + _GAP
    )


def _blend(region: np.ndarray, alpha: np.ndarray, rng: np.random.Generator, color: str, plate: float) -> None:
    """Paint `color` through `alpha` (h, w) into the float region (h, w, 3); on a dark plate with chance `plate`."""
    if plate and rng.random() < plate:
        region *= 0.35
    rgb = np.array(COLORS[color], dtype=np.float32) + rng.uniform(-_JITTER, _JITTER, size=3)
    shade = np.linspace(*rng.uniform(0.9, 1.05, size=2), num=len(alpha), dtype=np.float32)[:, None, None]
    opacity = alpha[..., None].astype(np.float32) / 255
    region += opacity * (rgb * shade - region)


def _label(
    scene: Scene, box: tuple[int, int, int, int], ink: np.ndarray | None, kind: str, color: str, place: int
) -> None:
    """Write the labels of patches that `box` (window pixels) covers visibly; the best covered patch always counts."""
    x, y, w, h = box
    col0, row0 = x // PATCH, y // PATCH
    col1, row1 = (x + w - 1) // PATCH + 1, (y + h - 1) // PATCH + 1
    area = np.zeros(((row1 - row0) * PATCH, (col1 - col0) * PATCH), dtype=np.float32)
    top, left = y - row0 * PATCH, x - col0 * PATCH
    area[top : top + h, left : left + w] = 1 if ink is None else ink
    cover = area.reshape(row1 - row0, PATCH, col1 - col0, PATCH).mean(axis=(1, 3))
    seen = cover >= min(_VISIBLE, float(cover.max()))
    values = (KINDS.index(kind), COLOR_LABELS.index(color), place)
    for layer, value in zip(scene.labels, values, strict=True):
        layer[row0:row1, col0:col1][seen] = value


def _size(rng: np.random.Generator, sizes: tuple[float, float], small: float, side: int) -> float:
    """A size between the two, small ones more often; at most `small` in windows under 200 pixels."""
    return float(np.exp(rng.uniform(np.log(sizes[0]), np.log(small if side < 200 else sizes[1]))))


def _shape_stamp(rng: np.random.Generator, name: str, side: int, split: str, style: Style = DIM) -> _Stamp:
    """A filled shape, slightly stretched."""
    size = _size(rng, style.shapes, style.shapes_small, side)
    width, height = (max(11, round(size * float(rng.uniform(0.88, 1.12)))) for _ in range(2))
    big = (width * _SUPERSAMPLE, height * _SUPERSAMPLE)
    mask = Image.new("L", big, 0)
    draw = ImageDraw.Draw(mask)
    if name == "circle":
        draw.ellipse((0, 0, big[0] - 1, big[1] - 1), fill=255)
    else:
        draw.polygon([(px * (big[0] - 1), py * (big[1] - 1)) for px, py in _OUTLINES[name]], fill=255)
    alpha = np.asarray(mask.resize((width, height), Image.Resampling.BOX))
    return _Stamp(alpha, ((name, 0, 0, 0, width, height),))


def _star_outline() -> list[tuple[float, float]]:
    """A five-pointed star."""
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return _in_unit_square(radii * np.cos(angles), radii * np.sin(angles))


def _heart_outline() -> list[tuple[float, float]]:
    """The usual heart curve."""
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return _in_unit_square(x, y)


def _in_unit_square(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """The points of an outline, scaled to fill the unit square."""
    points = np.stack([x, y], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return [tuple(p) for p in (points - low) / (high - low)]


_A, _B = 0.33, 0.67
_OUTLINES = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "cross": [
        *((_A, 0), (_B, 0), (_B, _A), (1, _A), (1, _B), (_B, _B)),
        *((_B, 1), (_A, 1), (_A, _B), (0, _B), (0, _A), (_A, _A)),
    ],
    "star": _star_outline(),
    "heart": _heart_outline(),
}


def _digit_stamp(rng: np.random.Generator, name: str, side: int, split: str, style: Style = DIM) -> _Stamp:
    """A handwritten digit of its split, slightly turned and with its faint strokes strengthened.

    Training also stretches and slants it, to make more of its few samples.
    """
    samples = sources.digits(split)[int(name)]
    ink = Image.fromarray(samples[int(rng.integers(len(samples)))])
    size = round(_size(rng, style.digits, style.digits_small, side))
    ink = ink.resize((size, size), Image.Resampling.BICUBIC)
    if split == "train":
        ink = _slanted(ink, stretch=float(rng.uniform(0.85, 1.2)), slant=float(rng.uniform(-0.2, 0.2)))
    ink = ink.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    alpha = np.clip(np.asarray(ink, dtype=np.float32) * 1.6 - 40, 0, 255).astype(np.uint8)
    columns = np.flatnonzero(alpha.max(axis=0) > 60)
    alpha = np.ascontiguousarray(alpha[:, columns[0] : columns[-1] + 1])
    return _Stamp(alpha, ((name, 0, 0, 0, alpha.shape[1], alpha.shape[0]),))


def _slanted(ink: Image.Image, stretch: float, slant: float) -> Image.Image:
    """`ink` made `stretch` times as wide and sheared by `slant` pixels a row, on a canvas wide enough for all of it."""
    margin = int(np.ceil(abs(slant) * ink.height / 2))
    size = (round(ink.width * stretch) + 2 * margin, ink.height)
    to_source = (1 / stretch, slant / stretch, -(margin + slant * ink.height / 2) / stretch, 0, 1, 0)
    return ink.transform(size, Image.Transform.AFFINE, to_source, Image.Resampling.BILINEAR)


def _word_stamp(rng: np.random.Generator, name: str, side: int, split: str, style: Style = DIM) -> _Stamp:
    """A word in one of the fonts, with one part per letter."""
    family = sources.FONTS[int(rng.integers(len(sources.FONTS)))]
    size = round(_size(rng, style.letters, style.letters[1], side))
    size = max(14, min(size, int(size * (side - 6) / (sources.font(family, size).getlength(name) + 4))))
    font = sources.font(family, size)
    left, top, right, bottom = font.getbbox(name)
    mask = Image.new("L", (right - left + 4, bottom - top + 4), 0)
    ImageDraw.Draw(mask).text((2 - left, 2 - top), name, fill=255, font=font)
    edges = [2 - left + round(font.getlength(name[:i])) for i in range(len(name) + 1)]
    height, width = mask.height, mask.width
    parts = []
    for place, (letter, start, end) in enumerate(zip(name, edges[:-1], edges[1:], strict=True), start=1):
        start, end = max(0, start), min(width, end)
        parts.append((letter, place, start, 2, end - start, height - 4))
    return _Stamp(np.asarray(mask), tuple(parts))
