"""Questions about a scene, with their true answers and GQA's annotations.

Every maker looks at a scene and returns one question of its type, or None where the scene allows no unambiguous one.
Yes/no makers are told which answer is wanted, so that both are equally frequent; their "no" questions are half of the
time hard: they swap one attribute of something that is really there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from examples.sample_vlm import sources
from examples.sample_vlm.scenes import CANVAS, COLORS, SHAPE_COLORS, SHAPES, Scene, Thing

SUFFIX = "\nAnswer the question using a single word or phrase."
OCR_LINE = "\nReference OCR token: "
_APART = 18  # pixels two centres must differ by before "left of" or "above" is asked


@dataclass(frozen=True)
class Question:
    """A question, its one-word answer, our type name, and GQA's structural and semantic types and program.

    `program` is a tuple of (operation, argument); each step depends on the one before it.
    """

    text: str
    answer: str
    type: str
    structural: str
    semantic: str
    program: tuple[tuple[str, str], ...]
    full_answer: str


def article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def phrase(thing: Thing, scene: Scene) -> str | None:
    """Words that fit only this shape of the scene: `circle`, else `red circle`, else None."""
    shapes = scene.of("shape")
    if sum(t.name == thing.name for t in shapes) == 1:
        return thing.name
    if sum((t.name, t.color) == (thing.name, thing.color) for t in shapes) == 1:
        return f"{thing.color} {thing.name}"
    return None


def absent_pairs(scene: Scene, hard: bool) -> list[tuple[str, str]]:
    """(colour, shape) pairs that are not in the scene; `hard` ones share their colour or shape with one that is."""
    present = {(t.color, t.name) for t in scene.of("shape")}
    colors, names = {c for c, _ in present}, {n for _, n in present}
    pairs = [(c, s) for c in SHAPE_COLORS for s in SHAPES if (c, s) not in present]
    return [p for p in pairs if p[0] in colors or p[1] in names] if hard else pairs


def existence(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Is there a red circle in the image?"""
    if yes:
        shapes = scene.of("shape")
        if not shapes:
            return None
        thing = _pick(rng, shapes)
        return existence_of(thing.color, thing.name, True)
    pairs = absent_pairs(scene, hard=rng.random() < 0.6)
    return existence_of(*_pick(rng, pairs), False) if pairs else None


def existence_of(color: str, name: str, yes: bool) -> Question:
    """The existence question for a coloured shape."""
    noun = article(f"{color} {name}")
    return Question(
        f"Is there {noun} in the image?",
        _yes_no(yes),
        "existence",
        "verify",
        "obj",
        (("select", name), ("filter color", color), ("exist", "?")),
        f"Yes, there is {noun}." if yes else f"No, there is no {color} {name}.",
    )


def shape_existence(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Is there a circle in the image?"""
    present = {t.name for t in scene.of("shape")}
    choices = sorted(present) if yes else [s for s in SHAPES if s not in present]
    if not choices:
        return None
    noun = article(_pick(rng, choices))
    program = (("select", noun.split()[-1]), ("exist", "?"))
    full = f"Yes, there is {noun}." if yes else f"No, there is no {noun.split()[-1]}."
    return Question(f"Is there {noun} in the image?", _yes_no(yes), "existence", "verify", "obj", program, full)


def text_existence(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Is there a word / a digit in the image?"""
    choices = [k for k in ("word", "digit") if bool(scene.of(k)) == yes]
    if not choices:
        return None
    kind = _pick(rng, choices)
    full = f"Yes, there is a {kind}." if yes else f"No, there is no {kind}."
    program = (("select", kind), ("exist", "?"))
    return Question(f"Is there a {kind} in the image?", _yes_no(yes), "existence", "verify", "obj", program, full)


def color(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """What color is the circle, the digit, the word?"""
    things = _only_ones(scene) + scene.of("digit") + scene.of("word")
    if not things:
        return None
    thing = _pick(rng, things)
    noun = thing.name if thing.kind == "shape" else thing.kind
    program = (("select", noun), ("query", "color"))
    full = f"The {noun} is {thing.color}."
    return Question(f"What color is the {noun}?", thing.color, "color", "query", "attr", program, full)


def shape(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """What shape is the red object?"""
    shapes = scene.of("shape")
    # Digits and words count as objects too: their colour must not make the question ambiguous.
    things = [t for t in shapes if sum(u.color == t.color for u in scene.things) == 1]
    if not things:
        return None
    thing = _pick(rng, things)
    program = (("select", "object"), ("filter color", thing.color), ("query", "shape"))
    full = f"The {thing.color} object is {article(thing.name)}."
    return Question(f"What shape is the {thing.color} object?", thing.name, "shape", "query", "cat", program, full)


def digit(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """What digit is shown in the image?"""
    digits = scene.of("digit")
    if len(digits) != 1:
        return None
    text = _pick(rng, ("What digit is shown in the image?", "What number is shown in the image?"))
    name = digits[0].name
    program = (("select", "digit"), ("query", "name"))
    return Question(text, name, "digit", "query", "obj", program, f"The digit is {name}.")


def word(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """What word is written in the image?"""
    found = scene.of("word")
    if len(found) != 1:
        return None
    text = _pick(rng, ("What word is written in the image?", "What does the sign say?"))
    name = found[0].name
    program = (("select", "word"), ("query", "name"))
    return Question(text, name, "word", "query", "obj", program, f"The word is {name}.")


def count(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """How many shapes are in the image? How many circles are there?"""
    shapes = scene.of("shape")
    if rng.random() < 0.5 or not shapes:
        number = len(shapes)
        program = (("select", "shape"), ("query", "count"))
        full = f"There are {number} shapes."
        return Question("How many shapes are in the image?", str(number), "count", "query", "global", program, full)
    name = _pick(rng, [t.name for t in shapes]) if rng.random() < 0.85 else _pick(rng, SHAPES)
    number = sum(t.name == name for t in shapes)
    program = (("select", name), ("query", "count"))
    text = f"How many {plural(name)} are in the image?"
    return Question(text, str(number), "count", "query", "obj", program, f"There are {number}.")


def count_verify(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Are there 2 shapes in the image?"""
    number = len(scene.of("shape"))
    asked = number if yes else int(_pick(rng, [n for n in range(1, 7) if n != number]))
    if asked < 2:
        return None
    program = (("select", "shape"), ("verify count", str(asked)))
    text = f"Are there {asked} shapes in the image?"
    return Question(text, _yes_no(yes), "count", "verify", "global", program, f"There are {number} shapes.")


def color_verify(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Is the circle red?"""
    things = _only_ones(scene)
    if not things:
        return None
    thing = _pick(rng, things)
    others = sorted({t.color for t in scene.of("shape")} - {thing.color})
    if not others or rng.random() < 0.4:
        others = [c for c in SHAPE_COLORS if c != thing.color]
    asked = thing.color if yes else _pick(rng, others)
    program = (("select", thing.name), ("verify color", asked))
    full = f"The {thing.name} is {thing.color}."
    return Question(f"Is the {thing.name} {asked}?", _yes_no(yes), "color", "verify", "attr", program, full)


def color_choose(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Is the circle red or blue?"""
    things = _only_ones(scene)
    if not things:
        return None
    thing = _pick(rng, things)
    other = _pick(rng, [c for c in SHAPE_COLORS if c != thing.color])
    first, second = (thing.color, other) if rng.random() < 0.5 else (other, thing.color)
    program = (("select", thing.name), ("choose color", f"{first}|{second}"))
    full = f"The {thing.name} is {thing.color}."
    text = f"Is the {thing.name} {first} or {second}?"
    return Question(text, thing.color, "color", "choose", "attr", program, full)


def relation(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Is the circle to the left of the square?"""
    pair = _pair(scene, rng)
    if pair is None:
        return None
    (a, noun_a), (b, noun_b), true = pair
    opposite = {"to the left of": "to the right of", "above": "below"}
    opposite |= {v: k for k, v in opposite.items()}
    asked = true if yes else opposite[true]
    program = (("select", noun_b), ("verify rel", f"{noun_a},{asked}"))
    text = f"Is the {noun_a} {asked} the {noun_b}?"
    full = f"{_yes_no(yes).capitalize()}, the {noun_a} is {true} the {noun_b}."
    return Question(text, _yes_no(yes), "relation", "verify", "rel", program, full)


def relation_choose(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Is the circle to the left or to the right of the square?"""
    pair = _pair(scene, rng)
    if pair is None:
        return None
    (a, noun_a), (b, noun_b), true = pair
    sideways = true.startswith("to the")
    choice = "to the left or to the right of" if sideways else "above or below"
    answer = true.split()[2] if sideways else true
    program = (("select", noun_b), ("choose rel", f"{noun_a},{choice}"))
    full = f"The {noun_a} is {true} the {noun_b}."
    return Question(f"Is the {noun_a} {choice} the {noun_b}?", answer, "relation", "choose", "rel", program, full)


def region(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """What shape is in the top left of the image?"""
    quarters: dict[str, list[Thing]] = {}
    for thing in scene.of("shape"):
        x, y = thing.center
        if min(abs(x - CANVAS / 2), abs(y - CANVAS / 2)) < _APART / 2:
            return None  # on the border of two quarters
        quarter = f"{'top' if y < CANVAS / 2 else 'bottom'} {'left' if x < CANVAS / 2 else 'right'}"
        quarters.setdefault(quarter, []).append(thing)
    alone = [(q, things[0]) for q, things in quarters.items() if len(things) == 1]
    if not alone:
        return None
    quarter, thing = _pick(rng, alone)
    program = (("select", "shape"), ("filter position", quarter), ("query", "name"))
    full = f"{article(thing.name).capitalize()} is in the {quarter}."
    text = f"What shape is in the {quarter} of the image?"
    return Question(text, thing.name, "region", "query", "cat", program, full)


def logical(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Are there both a circle and a star in the image?"""
    present = sorted({t.name for t in scene.of("shape")})
    absent = [s for s in SHAPES if s not in present]
    if len(present) < (2 if yes else 1) or not absent:
        return None
    first = _pick(rng, present)
    second = _pick(rng, [s for s in (present if yes else absent) if s != first])
    names = (first, second) if rng.random() < 0.5 else (second, first)
    program = (("select", names[0]), ("exist", "?"), ("select", names[1]), ("exist", "?"), ("and", ""))
    text = f"Are there both a {names[0]} and a {names[1]} in the image?"
    full = f"{_yes_no(yes).capitalize()}, there {'are' if yes else 'are not'} both."
    return Question(text, _yes_no(yes), "logical", "logical", "obj", program, full)


def compare(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Are the circle and the square the same color?"""
    shapes = _only_ones(scene)
    pairs = [(a, b) for a in shapes for b in shapes if a is not b and (a.color == b.color) == yes]
    if not pairs:
        return None
    a, b = _pick(rng, pairs)
    program = (("select", a.name), ("select", b.name), ("same color", ""))
    text = f"Are the {a.name} and the {b.name} the same color?"
    full = f"{_yes_no(yes).capitalize()}, the {a.name} is {a.color} and the {b.name} is {b.color}."
    return Question(text, _yes_no(yes), "compare", "compare", "attr", program, full)


def word_verify(scene: Scene, rng: np.random.Generator, yes: bool) -> Question | None:
    """Is the word in the image CAT?"""
    found = scene.of("word")
    if len(found) != 1:
        return None
    name = found[0].name
    # A test word is compared with test words, a training word with training words.
    split = "test" if name in sources.words("test") else "train"
    same_length = [w for w in sources.words(split) if w != name and len(w) == len(name)]
    asked = name if yes else _pick(rng, same_length)
    program = (("select", "word"), ("verify name", asked))
    full = f"The word is {name}."
    return Question(f"Is the word in the image {asked}?", _yes_no(yes), "word match", "verify", "obj", program, full)


Maker = Callable[[Scene, np.random.Generator, bool], Question | None]

# Type -> (maker, how often it is asked in training). Benchmarks choose their own mixture.
MAKERS: dict[str, tuple[Maker, float]] = {
    "existence": (existence, 3.0),
    "shape_existence": (shape_existence, 1.0),
    "text_existence": (text_existence, 0.2),
    "color": (color, 2.5),
    "color_verify": (color_verify, 0.6),
    "color_choose": (color_choose, 0.6),
    "shape": (shape, 1.5),
    "digit": (digit, 2.0),
    "word": (word, 3.0),
    "word_verify": (word_verify, 0.3),
    "count": (count, 1.2),
    "count_verify": (count_verify, 0.4),
    "relation": (relation, 1.2),
    "relation_choose": (relation_choose, 0.8),
    "region": (region, 1.0),
    "logical": (logical, 0.4),
    "compare": (compare, 0.4),
}


def ask(scene: Scene, rng: np.random.Generator, number: int, mix: dict[str, float] | None = None) -> list[Question]:
    """`number` questions about a scene, drawn by `mix` (default: the makers' own weights); makers may repeat."""
    mix = mix or {name: weight for name, (_, weight) in MAKERS.items()}
    names, weights = list(mix), np.array(list(mix.values()))
    asked: list[Question] = []
    while len(asked) < number:
        maker = MAKERS[names[int(rng.choice(len(names), p=weights / weights.sum()))]][0]
        question = maker(scene, rng, bool(rng.random() < 0.5))
        if question is not None:
            asked.append(question)
    return asked


def prompt_text(question: Question, ocr: bool = False) -> str:
    """The question as LLaVA's files have it: text, optionally TextVQA's (empty) OCR line, answer-format suffix."""
    return question.text + (OCR_LINE if ocr else "") + SUFFIX


def plural(noun: str) -> str:
    """The plural of a shape name."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def vocabulary_texts() -> list[str]:
    """The fixed phrases of all questions and answers; the tokenizer makes one token of each."""
    nouns = [*SHAPES, *(plural(s) for s in SHAPES), *(f"{s}?" for s in SHAPES), "word", "digit", "shapes", "object?"]
    colors = [*COLORS, *(f"{c}?" for c in COLORS)]
    starts = ["Is there a", "Is there an", "What color is the", "What shape is the", "What shape is in the"]
    starts += ["What digit is shown", "What number is shown", "What word is written", "What does the sign say?"]
    starts += ["How many", "Are there", "Are there both a", "Are the", "Is the", "Is the word in the image"]
    middles = [" in the image?", " are in the image?", " to the left of the", " to the right of the", " above the"]
    middles += [" below the", " to the left or to the right of the", " above or below the", " of the image?", " and a"]
    middles += [" and the", " the same color?", " word?", " digit?", " or", " above", " below", " left", " right"]
    middles += [" top left", " top right", " bottom left", " bottom right", " yes", " no"]
    fixed = [SUFFIX.strip("\n"), OCR_LINE.strip("\n")]
    return fixed + starts + middles + [f" {n}" for n in nouns + colors]


def _only_ones(scene: Scene) -> list[Thing]:
    """The shapes that no other thing of the scene has."""
    return [t for t in scene.of("shape") if phrase(t, scene) == t.name]


def _pair(scene: Scene, rng: np.random.Generator) -> tuple[tuple[Thing, str], tuple[Thing, str], str] | None:
    """Two describable shapes and the true relation of the first to the second."""
    things = [(t, phrase(t, scene)) for t in scene.of("shape")]
    things = [(t, p) for t, p in things if p is not None]
    if len(things) < 2:
        return None
    first, second = (things[int(i)] for i in rng.choice(len(things), size=2, replace=False))
    dx = first[0].center[0] - second[0].center[0]
    dy = first[0].center[1] - second[0].center[1]
    sideways, upright = "to the left of" if dx < 0 else "to the right of", "above" if dy < 0 else "below"
    relations = [(sideways, abs(dx)), (upright, abs(dy))]
    clear = [name for name, distance in relations if distance >= _APART]
    return (first, second, _pick(rng, clear)) if clear else None


def _pick(rng: np.random.Generator, options):
    """One of the options, as it is (numpy's choice would turn strings and tuples into arrays)."""
    return options[int(rng.integers(len(options)))]


def _yes_no(yes: bool) -> str:
    """LLaVA's yes and no answers are lower-case words here, as in GQA's annotations."""
    return "yes" if yes else "no"
