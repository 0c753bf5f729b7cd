"""Pictures of kept tokens: what is traced is what happened, and the drawing shows it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MIXED_ROWS, PATCHES, batch, tiny_llava

import apet
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
    errors = draw.error_picture(image, grid, np.array([0.0, 2.0, np.nan, 1.0]))
    assert errors[0, 0].sum() < errors[4, 4].sum() < errors[0, 4].sum() and (errors[4, 0] == 90).all()
    assert (draw.kept_picture(image // 10, grid, kept)[:4, 4:] > 200).all()  # a dark picture fades to white


def test_a_picture_that_patches_do_not_divide_is_covered():
    image = np.zeros((7, 10, 3), dtype=np.uint8)
    assert draw.kept_picture(image, (3, 4), np.arange(12)).shape == (7, 10, 3)
    stage = StageTrace("vision", np.array([0]), np.zeros(12, dtype=int), None)
    canvas = draw.draw(image, (3, 4), [MethodTrace("apet", 1.0, "long " * 500, (stage,))], "why " * 500)
    assert canvas.width == 4 * 296 + 8


def test_a_tiny_checkpoint_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "kept.png"
    flags = ["--methods", "apet,random,cdpruner", "--tokens", "64", "--question", "What is it?", "--out", str(out)]
    assert program.main([IMAGE, *MODEL, *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == [str(out), str(out.with_suffix(".npz"))]
    assert Image.open(out).size == (8 + 296 * 7, 28 + 2 * 336)
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
    ],
)
def test_what_the_user_can_mend_is_one_line(capsys, flags, word):
    assert program.main(flags) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("apet vis: error:") and word in error
