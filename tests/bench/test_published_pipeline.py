"""The published way and the patched model do the same thing: both generate the same tokens at the same budget."""

import pytest
import torch
from tiny import images, left_pad, prompt

import apet
from apet.bench.published_pipeline import PublishedPipeline

CONFIG = apet.ApetConfig(
    visual_token_num=14, layer_list=[2], image_token_list=[6], basis_token_num=3, fps_start=0
)  # fmt: skip


def inputs():
    return left_pad([prompt(9, (3,), seed) for seed in range(3)]) | {"pixel_values": images(3)}


@pytest.mark.parametrize("config", [CONFIG, apet.ApetConfig(visual_token_num=14, basis_token_num=3, fps_start=0)])
def test_same_tokens_as_the_patched_model(llava_sdpa, config):
    given = inputs()
    pipeline = PublishedPipeline(llava_sdpa, config)
    with pipeline.eager_tower():
        published = pipeline.generate(**given, max_new_tokens=6)
        first = pipeline.prefill(**given)
    with apet.patched(llava_sdpa, config):
        ours = llava_sdpa.generate(**given, max_new_tokens=6, do_sample=False)[:, given["input_ids"].shape[1] :]
    assert torch.equal(published, ours)
    assert torch.equal(first, ours[:, :1])
    assert llava_sdpa.model.vision_tower.config._attn_implementation == "sdpa"


def test_other_models_and_budgets_are_refused(llava_sdpa):
    two = apet.ApetConfig(visual_token_num=14, layer_list=[1, 2], image_token_list=[8, 6])
    with pytest.raises(ValueError, match="one decoder stage"):
        PublishedPipeline(llava_sdpa, two)
