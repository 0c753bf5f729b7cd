"""Shared features of the vision tower: the same answers as without, pictures opened once, and a bound."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import cut_decoder

from apet.config import ApetConfig
from apet.eval.benchmarks import Question
from apet.eval.images import ImageError, Pictures
from apet.eval.scoring_cli import Parser
from apet.methods import get_method, method_names
from llava.eval import apet_loader
from llava.eval.answerer import PreparedQuestion
from llava.eval.tower_features import TowerFeatures

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "end_to_end"
QUESTIONS = [
    Question(0, "What is it?", "What is it?", "image_a.png"),
    Question(1, "no picture", "Say something."),
    Question(2, "Is there a dog?", "Is there a dog in the image?", "image_b.png"),
    Question(3, "What is where?", "What is where?", "image_a.png"),
]


@pytest.fixture(scope="module")
def loaded() -> apet_loader.LoadedLlava:
    parser = Parser()
    apet_loader.add_flags(parser)
    words = ["--model-path", str(GOLDEN / "llava-v1.5-tiny"), "--device", "cpu", "--max_new_tokens", "6"]
    found = apet_loader.load(parser.parse_args(words))
    cut_decoder(found.model, 8)
    found.layers = 8  # read when it was loaded
    return found


def answers(answerer, questions=QUESTIONS) -> list[str]:
    folder = str(GOLDEN / "images")
    return answerer.answer([answerer.preparer.prepare(one, Pictures(one, folder)) for one in questions])


def runnable(name: str, loaded) -> ApetConfig | None:
    """The method at 96 tokens; None where it cannot be planned or the model does not provide its inputs."""
    try:
        config = ApetConfig(method=name, **get_method(name).plan(96, loaded.image_tokens, loaded.layers))
        loaded.answerer(config)
    except ValueError:
        return None
    return config


class Runs(NamedTuple):
    """A method's answers alone, of the run that fills the store and of a later one; whether the tower ran in that."""

    alone: list[str]
    first: list[str]
    later: list[str]
    encoded: bool


@pytest.fixture(scope="module")
def runs(loaded) -> dict[str, Runs]:
    """By method, all that are runnable here."""
    seen, found = [], {}
    handle = loaded.model.model.vision_tower.register_forward_hook(lambda *args: seen.append(args))
    for name in method_names():
        config = runnable(name, loaded)
        if config is not None:
            alone = answers(loaded.answerer(config))
            first = answers(loaded.answerer(config, share_tower=True))
            seen.clear()
            found[name] = Runs(alone, first, answers(loaded.answerer(config, share_tower=True)), bool(seen))
    handle.remove()
    return found


def test_answers_are_exactly_those_without_sharing(runs):
    for name, run in runs.items():
        assert run.first == run.alone, name
        assert run.later == run.alone, name
    assert len(runs) > 8


def test_a_known_picture_is_neither_opened_nor_encoded_again(loaded, monkeypatch):
    config = ApetConfig(96)
    before = answers(loaded.answerer(config, share_tower=True))
    seen = []
    handle = loaded.model.model.vision_tower.register_forward_hook(lambda *args: seen.append(args))
    monkeypatch.setattr("apet.eval.images.open_images", lambda *args: pytest.fail("opened"))
    assert answers(loaded.answerer(config, share_tower=True)) == before and seen == []
    handle.remove()


def test_a_method_that_looks_into_the_tower_runs_it(runs):
    for name, run in runs.items():
        inside = get_method(name).needs("vision").keys() - apet_loader.BEHIND_TOWER
        assert run.encoded == bool(inside), name


def test_nothing_read_inside_the_tower_counts_as_behind_it():
    assert not apet_loader.BEHIND_TOWER & {"cls_attention", "vision_keys", "clip_relevance"}


def test_a_picture_that_is_missing_is_noticed_when_it_is_looked_at(tmp_path):
    pictures = Pictures(Question(0, "", "", "no.png"), str(tmp_path))
    assert len(pictures) == 1 and pictures.path == str(tmp_path / "no.png")
    with pytest.raises(ImageError, match="no.png does not exist"):
        pictures[0]
    assert len(Pictures(Question(0, "", ""), "")) == 0


class CountingModel:
    """A tower that gives the mean of its pixels, twice; counts pictures."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.encoded = 0

    def get_vision_tower(self):
        return self._tower

    def _tower(self, pixels):
        self.encoded += len(pixels)
        return pixels.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 2, 1)


def picture(value: float | None, path: str | None) -> PreparedQuestion:
    pixels = None if value is None else torch.full((3, 2, 2), value)
    return PreparedQuestion(torch.tensor([1]), pixels, None, path)


def test_features_are_kept_up_to_the_bound_and_stay():
    model, store = CountingModel(), TowerFeatures(limit_bytes=2 * 8)  # two pictures of two floats
    batch = [picture(1, "a"), picture(None, None), picture(2, "b"), picture(1, "a"), picture(3, None)]
    assert store.encode(model, batch).features[:, 0, 0].tolist() == [1, 0, 2, 1, 3]
    assert model.encoded == 3 and store.known == {"a", "b"}
    again = [picture(None, "b"), picture(4, "c"), picture(None, "a")]
    for count in (4, 5):  # "c" finds no room and is encoded every time
        assert store.encode(model, again).features[:, 1, 0].tolist() == [2, 4, 1]
        assert model.encoded == count and store.known == {"a", "b"}


def test_what_is_kept_holds_no_graph(loaded):
    """A graph would keep everything that the tower computed for a picture: hundreds of times its features."""
    answers(loaded.answerer(runnable("random", loaded), share_tower=True))
    kept = list(loaded._features._kept.values())
    assert kept and not any(features.requires_grad for features in kept)
