"""Every method behind the patch: in batches, with and without a cache, keeping everything, or refused with a reason."""

import functools

import pytest
import torch
from families import FAMILIES, SUPPRESSED
from tiny import IMAGE_ID, MIXED_ROWS, PATCHES, batch

import apet
from apet import ApetConfig
from apet.methods import get_method, method_names

STEPS = 4
STAGES = {
    "vision": {"visual_token_num": 9},
    "llm": {"layer_list": [2], "image_token_list": [7]},
    "both": {"visual_token_num": 12, "layer_list": [2, 3], "image_token_list": [9, 4]},
}
# The tiny towers have three layers.
NEEDED = {"vscan": {"shallow": 1}, "cdpruner": {"relevance": "embeddings"}}
VARIANTS = [
    ("apet_plus", {"text": 1.0, "sinks": "merge", "rounds": 3}),
    ("apet_plus", {"size_bias": False, "similarity_floor": None}),
    ("mmtok", {"text": False}),
    ("dart", {"text_pivots": 0}),
    ("scope", {"alpha": 0.0}),
]


def stages_of(name: str) -> list[str]:
    own = get_method(name).stages
    return [stage for stage in STAGES if (set(own) >= {"vision", "llm"} if stage == "both" else stage in own)]


METHODS = [(name, NEEDED.get(name, {})) for name in method_names()] + VARIANTS
CASES = [(name, options, stage) for name, options in METHODS for stage in stages_of(name)]
every = pytest.mark.parametrize(("name", "options", "stage"), CASES, ids=str)


def config_of(name: str, options: dict, fields: dict) -> ApetConfig:
    return ApetConfig(method=name, method_options=options, basis_token_num=3, **fields)


def generate(model, inputs, suppressed=(IMAGE_ID,), **more):
    return model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=list(suppressed),
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


def kept(model) -> list:
    """Per sample and stage the positions kept of every image."""
    stages = apet.last_result(model).stages
    rows = range(len(stages[0].kept))
    return [[[image.tolist() for image in stage.kept[row]] for stage in stages] for row in rows]


def agree(model, together, alone, row: int) -> None:
    """A sample alone is what it is in the batch."""
    assert alone.sequences[0, -STEPS:].tolist() == together.sequences[row, -STEPS:].tolist()
    for one, many in zip(alone.logits, together.logits, strict=True):
        torch.testing.assert_close(one[0], many[row], atol=1e-3, rtol=0)


@every
def test_batches_and_caches(llava_sdpa, name, options, stage):
    with apet.patched(llava_sdpa, config_of(name, options, STAGES[stage])):
        together = generate(llava_sdpa, batch(MIXED_ROWS))
        result, positions = apet.last_result(llava_sdpa), kept(llava_sdpa)
        uncached = generate(llava_sdpa, batch(MIXED_ROWS), use_cache=False)
        assert kept(llava_sdpa) == positions
        again = generate(llava_sdpa, batch(MIXED_ROWS))
        for row, inputs in enumerate(MIXED_ROWS):
            agree(llava_sdpa, together, generate(llava_sdpa, batch([inputs])), row)
            assert kept(llava_sdpa) == positions[row : row + 1]
    count = {"vision": 9, "llm": 7, "both": 4}[stage]
    assert [list(images) for images in result.stages[-1].tokens_out] == [[count] * n for _, n in MIXED_ROWS]
    assert all(torch.isfinite(step).all() for step in together.logits)
    assert torch.equal(uncached.sequences, together.sequences)
    assert all(map(torch.equal, again.logits, together.logits))


@every
def test_the_whole_budget_changes_nothing(llava_sdpa, name, options, stage):
    inputs = batch(MIXED_ROWS)
    whole = {"visual_token_num": PATCHES, "layer_list": [2], "image_token_list": [PATCHES]}
    fields = {field: value for field, value in whole.items() if field in STAGES[stage]}
    expected = llava_sdpa(**inputs).logits
    with apet.patched(llava_sdpa, config_of(name, options, fields)):
        assert torch.equal(llava_sdpa(**inputs).logits, expected)


@functools.cache
def family_model(family: str):
    return FAMILIES[family].build("sdpa").double()


def family_inputs(family: str, prompts: list) -> dict:
    """In float64, so that no choice hangs on how a batch rounds."""
    inputs = FAMILIES[family].inputs(prompts)
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


# What a family does not have, and why.
TOWERS = {"video_llava"}
REASONS = {
    "cls_attention": {"internvl": "four patches", None: "no class token"},
    "vision_keys": {"internvl": "four patches", None: "no class token"},
    "vision_states": {"internvl": "four patches", None: "no class token"},
    "vision_features": {None: "one by one"},
}


def missing(family: str, name: str, options: dict, stage: str) -> str | None:
    """Why a family cannot serve a method."""
    needs = get_method(name, **options).needs("llm" if stage == "llm" else "vision")
    for need in [] if family in TOWERS else needs:
        if need in REASONS:
            return REASONS[need].get(family, REASONS[need][None])
    return None


@pytest.mark.parametrize(("name", "options", "stage"), [case for case in CASES if case[2] != "both"], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, name, options, stage):
    model, prompts = family_model(family), FAMILIES[family].prompts
    budget = {"image_token_ratio": 0.4} if stage == "vision" else {"layer_list": [2], "image_token_ratio_list": [0.4]}
    config = config_of(name, options, budget)
    reason = missing(family, name, options, stage)
    if reason is not None:
        with pytest.raises(ValueError, match=f"method {name!r} needs .* at the {stage} stage, but .*{reason}"):
            apet.apply_patch(model, config)
        assert apet.active_config(model) is None
        return
    with apet.patched(model, config):
        inputs = family_inputs(family, prompts)
        together, positions = generate(model, inputs, SUPPRESSED), kept(model)
        assert torch.equal(generate(model, inputs, SUPPRESSED, use_cache=False).sequences, together.sequences)
        for row, parts in enumerate(prompts):
            agree(model, together, generate(model, family_inputs(family, [parts]), SUPPRESSED), row)
            assert kept(model) == positions[row : row + 1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_method_can_wish_for_the_size_bias(llava_sdpa, stage):
    """As an option it is what it is as a field of the configuration, and it changes answers."""
    inputs, logits = batch(MIXED_ROWS), []
    off = {"size_bias": False}
    for options, fields in ((off, {}), ({"size_bias": True}, {}), ({}, {"size_bias": True}), ({}, {}), ({}, off)):
        with apet.patched(llava_sdpa, config_of("apet_plus", options, STAGES[stage] | fields)):
            logits.append(llava_sdpa(**inputs).logits)
    assert torch.equal(logits[1], logits[2]) and not torch.allclose(logits[0], logits[1], atol=1e-3)
    assert torch.equal(logits[3], logits[1]) and torch.equal(logits[4], logits[0])


@pytest.mark.parametrize("stage", STAGES)
def test_a_method_can_wish_for_positions(llava_sdpa, stage):
    """As an option it is what it is as a field, which goes before it; "auto" leaves it to the family."""
    inputs, logits = batch(MIXED_ROWS), {}
    keep, compact, auto = ({"position_mode": mode} for mode in ("keep", "compact", "auto"))
    cases = {
        "keep": ({}, keep), "compact": ({}, compact), "default": ({}, {}), "auto": (auto, {}),
        "option": (compact, {}), "both": (compact, keep),
    }  # fmt: skip
    for name, (options, fields) in cases.items():
        with apet.patched(llava_sdpa, config_of("apet_plus", options, STAGES[stage] | fields)):
            logits[name] = llava_sdpa(**inputs).logits
    assert not torch.allclose(logits["keep"], logits["compact"], atol=1e-3)
    for name, like in {"default": "keep", "auto": "compact", "option": "compact", "both": "keep"}.items():
        assert torch.equal(logits[name], logits[like]), name


def test_the_text_tower_is_refused_by_name(llava_sdpa):
    with pytest.raises(ValueError, match="method 'cdpruner' needs clip_relevance .* CLIP's text tower is no part"):
        apet.apply_patch(llava_sdpa, ApetConfig(method="cdpruner", visual_token_num=9))
    assert apet.active_config(llava_sdpa) is None


def test_post_projector_methods_read_projected_features(llava_sdpa):
    inputs = batch(MIXED_ROWS[:1])
    features = llava_sdpa.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    projected = llava_sdpa.model.multi_modal_projector(features[:, 1:])
    context = type("Context", (), {"config": ApetConfig(), "stage": "vision", "grid": (5, 5), "sizes": None})()
    expected = get_method("divprune").select(projected, 9, context).indices[0].tolist()
    with apet.patched(llava_sdpa, ApetConfig(method="divprune", visual_token_num=9)):
        llava_sdpa(**inputs)
        assert apet.last_result(llava_sdpa).stages[0].kept[0][0].tolist() == expected


def test_none_keeps_everything(llava_sdpa):
    with apet.patched(llava_sdpa, ApetConfig(method="none")):
        llava_sdpa(**batch(MIXED_ROWS[:1]))
        assert apet.last_result(llava_sdpa).layer_averaged_tokens == [PATCHES]
