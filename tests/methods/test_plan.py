"""How a layer-averaged budget is split over stages: the published splits, and that every split spends what it says."""

import pytest

from apet import ApetConfig
from apet.methods import get_method, method_names
from apet.methods._budget import layer_average

VISION_ONLY = [
    name
    for name in method_names()
    if "vision" in get_method(name).stages and name not in ("apet", "apet_plus", "vscan")
]


def average_of(plan, tokens, layers):
    counts = [plan.get("visual_token_num", tokens), *plan.get("image_token_list", ())]
    return layer_average(plan.get("layer_list", ()), counts, layers)


@pytest.mark.parametrize("layers", [4, 8, 28, 32, 40])
@pytest.mark.parametrize("average", [300, 192, 128, 64, 32])
@pytest.mark.parametrize("name", method_names())
def test_plans_spend_the_average(name, average, layers):
    method = get_method(name)
    try:
        plan = method.plan(average, 576, layers)
    except ValueError as error:
        assert f"method '{name}' cannot average {average} tokens per layer" in str(error)
        assert name in ("fastv", "dart", "pyramiddrop", "sparsevlm") and (average <= 64 or layers <= 8)
        return
    config = ApetConfig(method=name, **plan)
    if name == "none":
        assert plan == {}
        return
    assert all(layer < layers for layer in config.layer_list)
    assert average_of(plan, 576, layers) == pytest.approx(average, abs=1.5)
    assert bool(config.layer_list) <= ("llm" in method.stages)
    assert (config.visual_token_num is not None) <= ("vision" in method.stages)


@pytest.mark.parametrize("name", method_names())
def test_everything_is_no_budget_at_all(name):
    assert get_method(name).plan(576, 576, 32) == get_method(name).plan(1000, 576, 32) == {}


@pytest.mark.parametrize("name", VISION_ONLY)
def test_vision_methods_spend_all_at_the_vision_stage(name):
    assert get_method(name).plan(63.6, 576, 32) == {"visual_token_num": 64}
    assert get_method(name).plan(0.1, 576, 32) == {"visual_token_num": 1}


@pytest.mark.parametrize("name", ["apet", "apet_plus", "vscan"])
@pytest.mark.parametrize(("average", "first", "second"), [(192, 288, 96), (128, 192, 64), (64, 96, 32)])
def test_published_two_stage_splits(name, average, first, second):
    expected = {"visual_token_num": first, "layer_list": (16,), "image_token_list": (second,)}
    assert get_method(name).plan(average, 576, 32) == expected
    assert get_method(name).plan(average, 576, 28)["layer_list"] == (14,)


@pytest.mark.parametrize("name", ["fastv", "dart"])
@pytest.mark.parametrize(("average", "count"), [(192, 166), (128, 98), (64, 30)])
def test_one_cut_after_layer_2(name, average, count):
    assert get_method(name).plan(average, 576, 32) == {"layer_list": (2,), "image_token_list": (count,)}


def test_pyramiddrop():
    method = get_method("pyramiddrop")
    published = method.plan(270, 576, 32)
    assert published["layer_list"] == (8, 16, 24)
    assert published["image_token_list"] == (288, 144, 72)
    assert method.plan(192, 576, 32)["layer_list"] == (8, 16, 24)
    assert method.plan(128, 576, 32)["layer_list"] == method.plan(64, 576, 32)["layer_list"] == (2, 8, 16)
    counts = method.plan(128, 576, 32)["image_token_list"]
    assert counts[1] ** 2 == pytest.approx(counts[0] * counts[2], rel=0.05)
    assert method.plan(270, 576, 28)["layer_list"] == (7, 14, 21)


def test_sparsevlm_follows_the_published_shape():
    method = get_method("sparsevlm")
    for average, counts in ((192, (300, 200, 110)), (128, (303, 110, 36)), (64, (66, 30, 17))):
        plan = method.plan(average, 576, 32)
        assert plan["layer_list"] == (2, 6, 15)
        ratios = [ours / theirs for ours, theirs in zip(plan["image_token_list"], counts, strict=True)]
        assert max(ratios) == pytest.approx(min(ratios), rel=0.05) and 0.9 < ratios[0] < 1.15


def test_a_model_with_too_few_layers_is_refused():
    with pytest.raises(
        ValueError, match="method 'fastv' needs stops after layers \\[2\\]; the model has only 2 layers"
    ):
        get_method("fastv").plan(100, 576, 2)
