"""Every method that needs nothing but the tokens runs behind the patch; the others are refused before it is applied."""

import pytest
import torch
from tiny import IMAGE_ID, MIXED_ROWS, PATCHES, batch

import apet
from apet import ApetConfig
from apet.methods import get_method, method_names

STAGES = {
    "vision": {"visual_token_num": 9},
    "llm": {"layer_list": [2], "image_token_list": [7]},
}
CASES = [(name, stage) for name in method_names() for stage in STAGES if stage in get_method(name).stages]
# A LLaVA checkpoint has no CLIP text tower.
MISSING = [("cdpruner", "vision")]
SERVED = [case for case in CASES if case not in MISSING]
# The tiny tower has three layers.
TEXT = {"text_embeddings", "text_hidden", "attention_row", "text_attention"}
OPTIONS = {("vscan", "vision"): {"shallow": 1}}


def generate(model, inputs):
    return model.generate(
        **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE_ID], return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "stage"), SERVED)
def test_counts_batches_and_caches(llava_sdpa, name, stage):
    options = OPTIONS.get((name, stage), {})
    config = ApetConfig(method=name, method_options=options, basis_token_num=3, **STAGES[stage])
    with apet.patched(llava_sdpa, config):
        together = generate(llava_sdpa, batch(MIXED_ROWS))
        result = apet.last_result(llava_sdpa)
        alone = generate(llava_sdpa, batch(MIXED_ROWS[2:3]))
        uncached = llava_sdpa.generate(
            **batch(MIXED_ROWS), max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE_ID], use_cache=False
        )
    kept = 9 if stage == "vision" else 7
    assert [sum(images) for images in result.stages[0].tokens_out] == [kept, kept, 2 * kept, 0, 2 * kept]
    assert all(torch.isfinite(step).all() for step in together.logits)
    assert alone.sequences[0, -4:].tolist() == together.sequences[2, -4:].tolist()
    # Without a cache every step chooses anew: a method that reads the text sees the new tokens too.
    same = 1 if set(get_method(name, **options).needs(stage)) & TEXT else 4
    assert torch.equal(uncached[:, : uncached.shape[1] - 4 + same], together.sequences[:, : -4 + same or None])


@pytest.mark.parametrize(("name", "stage"), MISSING)
def test_needs_that_cannot_be_met_are_refused(llava_sdpa, name, stage):
    with pytest.raises(ValueError, match=f"method {name!r} needs"):
        apet.apply_patch(llava_sdpa, ApetConfig(method=name, **STAGES[stage]))
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
