"""Pictures of kept tokens: what is traced is what happened, and the drawing shows it."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MIXED_ROWS, PATCHES, batch, tiny_llava

import apet
from apet.demo import __main__ as demo
from apet.demo.answers import Asker, choices
from apet.eval.loader import find_loader
from apet.methods import get_method, method_names
from apet.vis import __main__ as program
from apet.vis import draw
from apet.vis.trace import MethodTrace, StageTrace, listening, trace

GOLDEN = Path(__file__).resolve().parent / "golden" / "end_to_end"
MODEL = ["--model-path", str(GOLDEN / "llava-v1.5-tiny"), "--device", "cpu", "--max_new_tokens", "3"]
IMAGE = str(GOLDEN / "images" / "image_a.png")


def traced(config: apet.ApetConfig) -> tuple[MethodTrace, apet.CompressionResult]:
    model = tiny_llava()
    with apet.patched(model, config), listening(config.method) as decisions, torch.no_grad():
        model.generate(**batch([MIXED_ROWS[0]]), max_new_tokens=1)
        result = apet.last_result(model)
    return trace(config.method, result, decisions, "yes"), result


def test_groups_and_errors_are_in_the_coordinates_of_the_image():
    one, result = traced(apet.ApetConfig(12, layer_list=[2], image_token_list=[5], basis_token_num=3))
    vision, llm = one.stages
    assert one.tokens == pytest.approx(8.5) and [stage.name for stage in one.stages] == ["vision", "layer 2"]
    assert len(vision.kept) == 12 and len(llm.kept) == 5 and set(llm.kept) <= set(vision.kept)
    np.testing.assert_array_equal(llm.kept, result.origin(1)[0][0])
    for stage in one.stages:
        # ApET merges everything it drops, and a kept patch is in its own row.
        assert sorted(set(stage.groups)) == list(range(len(stage.kept)))
        np.testing.assert_array_equal(stage.groups[stage.kept], range(len(stage.kept)))
    # Patches that were together stay together.
    for row in range(12):
        assert len(set(llm.groups[vision.groups == row])) == 1
    assert np.isfinite(vision.errors).all()
    assert np.flatnonzero(np.isfinite(llm.errors)).tolist() == vision.kept.tolist()


def test_dropped_patches_are_in_no_group_and_random_has_no_error():
    (stage,) = traced(apet.ApetConfig(6, method="random"))[0].stages
    assert stage.errors is None and (stage.groups < 0).sum() == PATCHES - 6
    np.testing.assert_array_equal(np.flatnonzero(stage.groups >= 0), stage.kept)


def test_a_stage_that_kept_everything_is_shown_as_such():
    vision, llm = traced(apet.ApetConfig(100, layer_list=[2], image_token_list=[5]))[0].stages
    assert vision.kept.tolist() == vision.groups.tolist() == list(range(PATCHES)) and vision.errors is None
    assert len(llm.kept) == 5 and np.isfinite(llm.errors).all()


@pytest.mark.parametrize("name", [name for name in method_names() if name != "none"])
def test_listening_leaves_the_method_as_it_was(name):
    cls = type(get_method(name))
    before = cls.select
    with pytest.raises(RuntimeError), listening(name):
        assert cls.select is not before
        raise RuntimeError
    assert cls.select is before


def test_pictures_show_kept_groups_and_errors():
    image = np.full((8, 8, 3), 200, dtype=np.uint8)
    grid, kept, groups = (2, 2), np.array([0, 3]), np.array([0, 0, -1, 1])
    shown = draw.kept_picture(image, grid, kept)
    assert (shown[:4, :4] == 200).all() and (shown[4:, 4:] == 200).all() and (shown[:4, 4:] == 30).all()
    grouped = draw.group_picture(image, grid, groups, kept)
    assert (grouped[4:, 4:] == 200).all() and (grouped[4:, :4] == 30).all()  # alone; dropped
    assert (grouped[0, :4] == 255).all() and (grouped[1, 1] == grouped[1, 5]).all()  # framed; one colour
    assert 170 < grouped[1, 1].mean() < 200  # quiet: most of it is the picture
    assert (draw.kept_picture(image // 10, grid, kept)[:4, 4:] > 200).all()  # a dark picture fades to white


def stage(errors: list | None, name: str = "vision", groups=(0, 0, -1, 1)) -> StageTrace:
    return StageTrace(name, np.array([0, 3]), np.array(groups), None if errors is None else np.array(errors))


def panels(figure) -> list[str]:
    """Titles of the panels that show a picture."""
    return [axes.get_title() for axes in figure.axes if axes.get_images()]


def test_errors_of_a_stage_have_one_scale_and_a_bar_each():
    methods = [
        MethodTrace("apet", 2.0, "yes", (stage([0.0, 2.0, np.nan, 1.0]), stage([7.0, 8.0, 9.0, 7.0], "layer 2"))),
        MethodTrace("other", 2.0, "no", (stage([1.0, 5.0, 3.0, 1.0]),)),
        MethodTrace("random", 2.0, "no", (stage(None, groups=(0, -1, -1, 1)),)),
    ]
    figure = draw.draw(np.full((8, 8, 3), 200, dtype=np.uint8), (2, 2), methods, "why?")
    maps = [axes.get_images()[0] for axes in figure.axes if axes.get_title() == "error"]
    assert [one.get_clim() for one in maps] == [(0, 5), (7, 9), (0, 5)] and all(one.colorbar for one in maps)
    assert maps[0].get_array().mask.tolist() == [[False, False], [True, False]]
    # What a method does not have takes no panel.
    assert panels(figure) == [
        "what the model sees", "apet\nvision stage: 2 kept", "3 patches in 2 tokens", "error",
        "apet\nafter layer 2: 2 kept", "3 patches in 2 tokens", "error", "other\nvision stage: 2 kept",
        "3 patches in 2 tokens", "error", "random\nvision stage: 2 kept",
    ]  # fmt: skip


def test_a_picture_that_patches_do_not_divide_is_covered(tmp_path):
    image = np.zeros((7, 10, 3), dtype=np.uint8)
    assert draw.kept_picture(image, (3, 4), np.arange(12)).shape == (7, 10, 3)
    alone = StageTrace("vision", np.array([0]), np.zeros(12, dtype=int), None)
    figure = draw.draw(image, (3, 4), [MethodTrace("apet", 1.0, "long " * 500, (alone,))], "$why_ " * 500)
    figure.savefig(tmp_path / "long.png")
    written = next(axes.texts[0].get_text() for axes in figure.axes if axes.texts)
    assert len(written) < 300 and max(map(len, written.splitlines())) <= 44


def test_the_demo_compares_with_the_uncompressed_model():
    loader = find_loader([])
    asker = Asker(loader.load(demo.parser(loader).parse_args([*MODEL])))
    full, short = (asker(IMAGE, "What is it?", method, 64) for method in ("none", "apet"))
    assert full.groups is None and full.facts[0] == ("visual tokens per layer", "576.0 of 576")
    assert (full.kept != short.kept).any() and short.groups is not None
    assert short.facts[0] == ("visual tokens per layer", "64.0 of 576") and "(1.0 times fewer)" in full.facts[1][1]
    with pytest.raises(ValueError, match="cannot average 1"):
        asker(IMAGE, "What is it?", "fastv", 1)
    assert set(choices()) == set(method_names()) and choices()[0] == "none"


def test_the_demo_says_what_it_lacks(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main([*MODEL]) == 1
    assert "apet demo: error: the demo needs gradio" in capsys.readouterr().err


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_formats(tmp_path, suffix, start):
    out = tmp_path / f"kept{suffix}"
    assert program.main([IMAGE, *MODEL, "--tokens", "64", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(start) and out.with_suffix(".npz").exists()


def test_a_tiny_checkpoint_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "kept.png"
    flags = ["--methods", "apet,random,cdpruner", "--tokens", "64", "--question", "What is it?", "--out", str(out)]
    assert program.main([IMAGE, *MODEL, *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == [str(out), str(out.with_suffix(".npz"))]
    width, height = Image.open(out).size
    assert 1000 < width < 1200 and height > width  # a top row, two of apet, one of random
    with np.load(out.with_suffix(".npz")) as data:
        assert data["methods"].tolist()[:2] == ["apet", "random"] and data["question"] == "What is it?"
        assert data["image"].shape == (336, 336, 3) and data["grid"].tolist() == [24, 24]
        assert data["apet.stages"].tolist() == ["vision", "layer 10"] and data["apet.tokens"] == 64
        assert len(data["apet.vision.kept"]) == 96 and len(data["apet.layer_10.kept"]) == 32
        assert data["apet.vision.errors"].shape == data["apet.layer_10.groups"].shape == (576,)
        assert len(data["random.vision.kept"]) == 64 and "random.vision.errors" not in data
        # The picture is the file's, padded to a square and scaled.
        assert abs(data["image"].mean() - np.asarray(Image.open(IMAGE).convert("RGB")).mean()) < 60


def test_budget_flags_hold_for_every_method(tmp_path):
    out = tmp_path / "kept.png"
    budgets = ["--visual_token_num", "96", "--layer_list", "[16]", "--image_token_list", "[32]"]
    assert program.main([IMAGE, *MODEL, "--methods", "apet,norm", *budgets, "--out", str(out)]) == 0
    with np.load(out.with_suffix(".npz")) as data:
        for method in ("apet", "norm"):
            assert [len(data[f"{method}.{stage}.kept"]) for stage in ("vision", "layer_16")] == [96, 32]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([IMAGE, *MODEL], "nothing would be compressed"),
        ([IMAGE, *MODEL, "--methods", "apett"], "Available"),
        (["no.png", *MODEL, "--tokens", "64"], "no.png does not exist"),
        ([IMAGE, "--model-path", str(GOLDEN / "llava-v1.6-vicuna-tiny"), "--device", "cpu"], "several crops"),
        ([IMAGE, *MODEL, "--methods", "fastv", "--tokens", "1"], "cannot average 1"),
        ([IMAGE, *MODEL, "--tokens", "64", "--out", "a.gif"], "must end in one of .png, .pdf, .svg"),
    ],
)
def test_what_the_user_can_mend_is_one_line(capsys, flags, word):
    assert program.main(flags) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("apet vis: error:") and word in error
