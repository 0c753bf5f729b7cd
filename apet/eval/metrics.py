"""How an answer text becomes right or wrong: pure functions on strings and numbers, standard library only.

Every rule here is a published protocol, oddities included, because a score is comparable only under the same rule.
Where a rule looks wrong ("NO" counts as yes for POPE), a comment says so; do not repair it.
Joining answers to labels, file formats and reports belong to `apet.eval.benchmarks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# --- averages ---------------------------------------------------------------------------------------------------------


def mean(values: Iterable[float | None]) -> float | None:
    """The mean; None where there are no values, or one of them is unknown (None)."""
    values = list(values)
    return None if not values or None in values else sum(values) / len(values)


def percent(values: Iterable[float]) -> float | None:
    """The mean of shares in percent; None where there are none."""
    values = list(values)
    return 100 * sum(values) / len(values) if values else None


# --- yes / no ---------------------------------------------------------------------------------------------------------


def pope_yes_no(text: str) -> str:
    """POPE's reading of an answer: "no" if the first sentence has one of the words `No`, `not`, `no`, else "yes".

    The sentence ends at the first "."; commas are deleted; words are separated by single spaces. Hence "NO", "Nope",
    "none", "isn't", "No" before a line end and the empty answer all count as "yes".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def mme_yes_no(text: str) -> str:
    """MME's reading: "yes" or "no" if the first 4 characters, lower-cased, hold it ("yes" first), else "other"."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


@dataclass(frozen=True)
class BinaryCounts:
    """Confusion counts of a yes/no task; "yes" is the positive class. Ratios without a denominator are 0."""

    tp: int
    fp: int
    tn: int
    fn: int

    @classmethod
    def of(cls, predictions: Sequence[bool], labels: Sequence[bool]) -> BinaryCounts:
        """Count `predictions` against `labels` (True = yes), position by position."""
        pairs = list(zip(predictions, labels, strict=True))
        return cls(
            tp=pairs.count((True, True)),
            fp=pairs.count((True, False)),
            tn=pairs.count((False, False)),
            fn=pairs.count((False, True)),
        )

    @property
    def total(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    @property
    def accuracy(self) -> float:
        return _ratio(self.tp + self.tn, self.total)

    @property
    def precision(self) -> float:
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.tp + self.fp, self.total)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# --- VQA: answer normal form and soft accuracy ------------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the published tool passes a regex flag (32) where the count of replacements goes
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}

# Contractions the protocol repairs when exactly one apostrophe is missing. Words whose bare form is another word
# (well, hell, shed, its) are left out on purpose.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_REPAIRED = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"}


def vqa_word_tokenize(text: str) -> str:
    """First step of the EvalAI normal form: lower-case, no comma or question mark, `'s` set apart, stripped."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def vqa_process_punctuation(text: str) -> str:
    """Second step: delete or blank out punctuation, then drop periods that no digit follows (32 at most).

    A mark is deleted when it touches a space anywhere in `text`, or when `text` has a comma between digits; otherwise
    each of its occurrences becomes a space.
    """
    output = text
    between_digits = _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _PUNCTUATION:
        deleted = between_digits or f"{mark} " in text or f" {mark}" in text
        output = output.replace(mark, "" if deleted else " ")
    return _LONE_PERIOD.sub("", output, count=_MAX_PERIODS)


def vqa_process_digit_article(text: str) -> str:
    """Third step: lower-case words, number words up to ten as digits, no articles, contractions repaired."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_normalize(text: str) -> str:
    """The EvalAI normal form of an answer, as TextVQA, VizWiz and VQAv2 submissions use it.

    >>> vqa_normalize("The two dogs, please.")
    '2 dogs please'
    """
    text = vqa_word_tokenize(text).replace("\n", " ").replace("\t", " ").strip()
    return vqa_process_digit_article(vqa_process_punctuation(text))


def soft_accuracy(prediction: str, ground_truths: Sequence[str]) -> float:
    """VQA accuracy in [0, 1] of a prediction; both sides must already be in the normal form they are compared in.

    For each ground truth, min(1, matches among the *others* / 3); the mean over the ground truths.
    """
    if not ground_truths:
        raise ValueError("soft accuracy needs at least one ground-truth answer, got none")
    matches = sum(truth == prediction for truth in ground_truths)
    # Leave-one-out in the order of the ground truths, so that the float sum equals the published tool's to the bit.
    parts = [min(1.0, (matches - (truth == prediction)) / 3) for truth in ground_truths]
    return sum(parts) / len(parts)


# --- multiple choice --------------------------------------------------------------------------------------------------


def _only(found: Sequence[str]) -> str | None:
    return found[0] if len(found) == 1 else None


_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # the last "." is any character: part of the protocol
_LETTERS = "ABCDE"


def scienceqa_letter(text: str, letters: Sequence[str] = _LETTERS) -> str | None:
    """ScienceQA's reading: a bare letter, else `X. ...`, else the only match of "The answer is X" + one character."""
    if text in letters and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    found = _ANSWER_IS.findall(text)
    return _only(found)


# How a letter may be dressed as a word, in the order of trial.
_LETTER_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def mmbench_letter(text: str, options: Mapping[str, str] | None = None) -> str | None:
    """MMBench's reading: one letter A..E standing alone, then one in its usual dress, then a unique option text.

    Args:
        text: The answer.
        options: Letter -> option text; None reads letters only.

    Returns:
        The letter, or None when the answer names none or more than one.
    """
    words = text.split()
    bare = _only([letter for letter in _LETTERS if letter in words])
    if bare is not None and not (bare == "A" and len(words) > 3):  # in a sentence "A" is the article
        return bare
    for form in _LETTER_FORMS:
        dressed = _only([letter for letter in _LETTERS if form.format(letter) in words])
        if dressed is not None:
            return dressed
    return _only([letter for letter, option in (options or {}).items() if option.lower() in text.lower()])


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the two strings are equal, else 0.0."""
    return float(prediction == answer)
