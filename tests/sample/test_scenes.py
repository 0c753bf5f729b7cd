"""Scenes and questions: reproducible, split without leaks, true and unambiguous."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from examples.sample_vlm import questions as q
from examples.sample_vlm import scenes, sources
from examples.sample_vlm.scenes import CANVAS, COLORS, KINDS, SHAPES, Scene, Thing, make_scene


def _scene(*things):
    return Scene(CANVAS, (0, 0), [Thing("shape", name, color, (x, y, 20, 20)) for name, color, x, y in things])


@pytest.mark.parametrize("side", [112, 224, 336])
def test_same_seed_same_scene(side):
    first, second = (make_scene(np.random.default_rng(5), "train", side) for _ in range(2))
    assert first.things == second.things
    assert np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(first.labels, second.labels)
    assert first.pixels.shape == (side, side, 3) and first.pixels.dtype == np.uint8


def test_splits_share_nothing():
    assert not set(sources.words("train")) & set(sources.words("test"))
    by_split = {s: {p.name for p in sources.PHOTOS if p.split == s} for s in sources.SPLITS}
    assert by_split["train"] and by_split["test"] and not by_split["train"] & by_split["test"]
    for train_class, test_class in zip(sources.digits("train"), sources.digits("test"), strict=True):
        assert not {d.tobytes() for d in train_class} & {d.tobytes() for d in test_class}


@pytest.mark.parametrize(("stretch", "slant"), [(0.85, -0.2), (1.0, 0.0), (1.0, 0.2), (1.2, 0.2)])
def test_slanting_a_digit_keeps_its_rows_and_all_of_its_ink(stretch, slant):
    ink = np.zeros((48, 48), dtype=np.uint8)
    ink[4:44, 2:46] = 255  # nearly to both edges: a canvas too narrow would cut it
    slanted = np.asarray(scenes._slanted(Image.fromarray(ink), stretch, slant)).astype(float)
    assert slanted.shape[0] == 48
    assert np.allclose(slanted.sum(axis=1)[4:44], 255 * 44 * stretch, rtol=0.03)
    middles = [np.average(np.arange(slanted.shape[1]), weights=row) for row in slanted[4:44]]
    assert (middles[-1] - middles[0]) / 39 == pytest.approx(-slant, abs=0.01)


def test_only_training_digits_are_slanted(monkeypatch):
    slants = []
    monkeypatch.setattr(scenes, "_slanted", lambda ink, stretch, slant: slants.append(slant) or ink)
    scenes._digit_stamp(np.random.default_rng(0), "7", 336, "test")
    assert not slants
    scenes._digit_stamp(np.random.default_rng(0), "7", 336, "train")
    assert len(slants) == 1


def test_training_never_shows_a_test_word():
    seen = set()
    for seed in range(300):
        scene = make_scene(np.random.default_rng(seed), "train", 112, want=("word",))
        seen |= {t.name for t in scene.of("word")}
    assert len(seen) > 100
    assert not seen & set(sources.words("test"))


def test_things_stay_inside_apart_and_unaligned():
    offsets = Counter()
    for seed in range(60):
        scene = make_scene(np.random.default_rng(seed), "train", 224)
        for thing in scene.things:
            x, y, w, h = thing.box
            assert scene.origin[0] <= x and x + w <= scene.origin[0] + 224
            assert scene.origin[1] <= y and y + h <= scene.origin[1] + 224
            offsets[x % 14] += 1
    assert len(offsets) == 14


def test_labels_name_what_is_drawn():
    scene = make_scene(np.random.default_rng(3), "train", 336, want=("word", "digit"))
    labelled = {KINDS[k] for k in np.unique(scene.labels[0])} - {"nothing"}
    assert labelled == {part for t in scene.things for part in (t.name if t.kind == "word" else [t.name])}


def test_yes_no_questions_are_balanced_and_true():
    answers = Counter()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        scene = make_scene(rng, "train", 224)
        pairs = {(t.color, t.name) for t in scene.of("shape")}
        for yes in (True, False):
            question = q.existence(scene, rng, yes)
            if question is not None:
                color, name = question.text.split()[3:5]
                assert ((color, name) in pairs) == yes == (question.answer == "yes")
                answers[question.answer] += 1
    assert abs(answers["yes"] - answers["no"]) < 10


def test_answers_of_a_known_scene():
    scene = _scene(("circle", "red", 20, 30), ("star", "blue", 250, 240), ("star", "green", 60, 280))
    rng = np.random.default_rng(0)
    assert q.color(scene, rng, True).answer == "red"  # the only shape that is unique
    assert q.region(scene, rng, True).answer in ("circle", "star")
    assert q.count(scene, rng, True).answer in ("1", "2", "3", "0")
    assert q.shape(scene, rng, True).answer in ("circle", "star")
    relation = q.relation(scene, rng, True)
    assert relation.answer == "yes" and relation.semantic == "rel"
    assert q.phrase(scene.things[1], scene) == "blue star"
    assert q.digit(scene, rng, True) is None and q.word(scene, rng, True) is None


def test_ambiguous_things_are_not_asked_about():
    scene = _scene(("star", "blue", 10, 10), ("star", "blue", 100, 100))
    rng = np.random.default_rng(0)
    assert q.color(scene, rng, True) is None
    assert q.shape(scene, rng, True) is None
    assert q.relation(scene, rng, True) is None


def test_hard_negatives_share_an_attribute():
    scene = _scene(("star", "blue", 10, 10))
    hard = q.absent_pairs(scene, hard=True)
    assert all(color == "blue" or name == "star" for color, name in hard)
    assert len(hard) == (len(COLORS) - 2) + (len(SHAPES) - 1)
