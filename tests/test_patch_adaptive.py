"""A budget that follows the image: `apet_plus` with an error target, behind the patch."""

import pytest
import torch
from tiny import IMAGE_ID, MIXED_ROWS, batch

import apet
from apet import ApetConfig

STAGES = {
    "vision": {"visual_token_num": 15},
    "llm": {"layer_list": [2], "image_token_list": [15]},
    "both": {"visual_token_num": 15, "layer_list": [2], "image_token_list": [9]},
}


def config(stage: str, **options) -> ApetConfig:
    return ApetConfig(method="apet_plus", method_options={"error_target": 0.35, **options}, **STAGES[stage])


def generate(model, rows, **options):
    return model.generate(
        **batch(rows), max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE_ID], **options
    )[:, -4:]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_every_image_gets_what_it_needs(llava_sdpa, stage):
    """Counts differ between images, and do not depend on the batch or the cache."""
    with apet.patched(llava_sdpa, config(stage)):
        together = generate(llava_sdpa, MIXED_ROWS)
        result = apet.last_result(llava_sdpa)
        assert torch.equal(generate(llava_sdpa, MIXED_ROWS, use_cache=False), together)
        for row, inputs in enumerate(MIXED_ROWS):
            assert torch.equal(generate(llava_sdpa, [inputs])[0], together[row])
            alone = apet.last_result(llava_sdpa)
            for one, all_ in zip(alone.stages, result.stages, strict=True):
                assert [kept.tolist() for kept in one.kept[0]] == [kept.tolist() for kept in all_.kept[row]]
    counts = [count for images in result.stages[0].tokens_out for count in images]
    assert len(set(counts)) > 1 and max(counts) <= 15
    for sample, average in enumerate(result.layer_averaged_tokens):
        layers = result.tokens_per_layer[sample]
        assert average == sum(layers) / len(layers)


@pytest.mark.parametrize("stage", ["vision", "llm"])
def test_a_budget_that_is_never_reached_changes_nothing(llava_sdpa, stage):
    fixed = ApetConfig(method="apet_plus", **STAGES[stage])
    with apet.patched(llava_sdpa, fixed):
        expected = llava_sdpa(**batch(MIXED_ROWS)).logits
    with apet.patched(llava_sdpa, config(stage, error_target=0.0)):
        assert torch.equal(llava_sdpa(**batch(MIXED_ROWS)).logits, expected)


def test_min_keep_bounds_it_below(llava_sdpa):
    with apet.patched(llava_sdpa, config("vision", error_target=1.0, min_keep=4)):
        llava_sdpa(**batch(MIXED_ROWS))
        counts = [count for images in apet.last_result(llava_sdpa).stages[0].tokens_out for count in images]
    assert set(counts) == {4}
