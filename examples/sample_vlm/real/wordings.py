"""Other wordings of the questions, sentences as answers, and captions: what keeps a language model's language."""

import re

import numpy as np

from examples.sample_vlm.questions import SUFFIX, Question, article
from examples.sample_vlm.scenes import CANVAS, Scene, Thing

# Pattern of a question's ordinary text -> other ways to ask the same. {0}, {1}, ... are the pattern's groups.
_WORDINGS = [
    (
        r"Is there (.+) in the image\?",
        ("Is there {0} in the picture?", "Can you see {0}?", "Does the image show {0}?", "Is {0} visible?"),
    ),
    (
        r"What color is the (.+)\?",
        ("Which color does the {0} have?", "What is the color of the {0}?", "Tell me the color of the {0}."),
    ),
    (
        r"What shape is the (\w+) object\?",
        ("Which shape does the {0} object have?", "What is the {0} object?", "Name the shape of the {0} object."),
    ),
    (
        r"What (?:digit|number) is shown in the image\?",
        ("Which digit can you see?", "What is the digit in the picture?", "Read the handwritten digit."),
    ),
    (
        r"What word is written in the image\?|What does the sign say\?",
        ("Which word can you read?", "Read the word in the image.", "What is written in the picture?"),
    ),
    (
        r"How many (.+) are in the image\?",
        ("How many {0} are there?", "How many {0} can you see?", "Count the {0}.", "What is the number of {0}?"),
    ),
    (
        r"Are there (\d) shapes in the image\?",
        ("Does the image show {0} shapes?", "Can you see {0} shapes?", "Are {0} shapes visible?"),
    ),
    (
        r"Is the (\w+) (\w+) or (\w+)\?",
        ("Which color is the {0}, {1} or {2}?", "Does the {0} have the color {1} or {2}?"),
    ),
    (r"Is the (\w+) (\w+)\?", ("Is {1} the color of the {0}?", "Does the {0} have the color {1}?")),
    (
        r"What shape is in the (.+) of the image\?",
        ("Which shape is in the {0}?", "What can you see in the {0} of the picture?", "Name the shape in the {0}."),
    ),
    (
        r"Are there both (.+) and (.+) in the image\?",
        ("Can you see both {0} and {1}?", "Does the image show {0} and {1}?"),
    ),
    (
        r"Are the (.+) and the (.+) the same color\?",
        ("Do the {0} and the {1} have the same color?", "Is the {0} of the same color as the {1}?"),
    ),
    (r"Is the word in the image (\w+)\?", ("Does the word read {0}?", "Is {0} the word in the picture?")),
]
_PATTERNS = [(re.compile(pattern), others) for pattern, others in _WORDINGS]

_CAPTION_PROMPTS = (
    "Describe the image.",
    "What is in the picture?",
    "What can you see in this image?",
    "Give a short description of the picture.",
)
_PLAIN = 0.5  # of the questions keep the ordinary wording
_SHORT = 0.8  # of the questions want, and say that they want, a single word


def reworded(text: str, rng: np.random.Generator) -> str:
    """The question in its ordinary or another wording; texts of no known pattern stay as they are."""
    if rng.random() < _PLAIN:
        return text
    for pattern, others in _PATTERNS:
        found = pattern.fullmatch(text)
        if found:
            return others[int(rng.integers(len(others)))].format(*found.groups())
    return text


def training_turn(question: Question, rng: np.random.Generator) -> tuple[str, str]:
    """A user's text and the answer to it: a word where LLaVA's suffix asks for one, else a sentence."""
    text = reworded(question.text, rng)
    return (text + SUFFIX, question.answer) if rng.random() < _SHORT else (text, question.full_answer)


def caption_turn(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A request for a description, and one that names every thing from top to bottom."""
    prompt = _CAPTION_PROMPTS[int(rng.integers(len(_CAPTION_PROMPTS)))]
    things = sorted(scene.things, key=lambda t: (t.center[1], t.center[0]))
    if not things:
        return prompt, "A photograph."
    names = [_named(thing) for thing in things]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return prompt, f"A photograph with {listed}."


def _named(thing: Thing) -> str:
    """A thing with its colour and its third of the canvas: `a red star at the top left`."""
    across = ("left", "", "right")[int(thing.center[0] * 3 // CANVAS)]
    down = ("top", "", "bottom")[int(thing.center[1] * 3 // CANVAS)]
    place = f"at the {f'{down} {across}'.strip()}" if down or across else "in the middle"
    noun = thing.name if thing.kind == "shape" else f"{thing.kind} {thing.name}"
    return f"{article(f'{thing.color} {noun}')} {place}"
