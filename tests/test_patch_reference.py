"""The patched model against an independent float64 reference without cache, padding or transformers code."""

import pytest
import torch
from reference import Reference
from tiny import IMAGE_ID, MIXED_ROWS, batch, tiny_llava
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import flash_attention

import apet
from apet import ApetConfig

pytestmark = pytest.mark.host

STEPS = 8
SETTINGS = {
    "none": ApetConfig(basis_token_num=3),
    "vision": ApetConfig(visual_token_num=9, basis_token_num=3),
    "layer 2": ApetConfig(layer_list=[2], image_token_list=[7], basis_token_num=3),
    "vision and layer 2": ApetConfig(visual_token_num=12, layer_list=[2], image_token_list=[5], basis_token_num=3),
    "all": ApetConfig(visual_token_num=14, layer_list=[1, 3], image_token_list=[9, 4], basis_token_num=3),
    "ratios": ApetConfig(
        image_token_ratio=0.6, layer_list=[2], image_token_ratio_list=[0.5], basis_token_num=2, fps_start=4
    ),
}


def run(model, rows, config: ApetConfig, **options):
    """Greedy tokens (B, STEPS) and logits (B, STEPS, V) of the patched model."""
    with apet.patched(model, config):
        out = model.generate(
            **batch(rows), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True,
            suppress_tokens=[IMAGE_ID], **options,
        )  # fmt: skip
        return out.sequences[:, -STEPS:], torch.stack(out.logits, 1)


def check(model, rows, config: ApetConfig, **options) -> None:
    tokens, logits = run(model, rows, config, **options)
    for index, (ids, count) in enumerate(rows):
        reference = Reference(model, config, config.position_mode == "keep")
        pixels = batch([(ids, count)]).get("pixel_values")
        expected, expected_logits = reference.generate(ids, pixels, STEPS)
        assert tokens[index].tolist() == expected
        torch.testing.assert_close(logits[index].double(), expected_logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_reference(llava, name, positions):
    config = ApetConfig.from_dict(SETTINGS[name].to_dict() | {"position_mode": positions})
    check(llava, MIXED_ROWS[:1], config)
    check(llava, MIXED_ROWS, config)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["vision", "layer 2", "all"])
def test_a_size_bias_equals_the_reference(llava, name, options):
    """The reference adds the logarithms to its scores; the patch needs no mask for it, with any attention."""
    config = ApetConfig.from_dict(SETTINGS[name].to_dict() | {"size_bias": True})
    before = llava.config.text_config._attn_implementation
    check(llava, MIXED_ROWS[:1], config, **options)
    check(llava, [MIXED_ROWS[0], MIXED_ROWS[2], MIXED_ROWS[3]], config, **options)
    assert llava.config.text_config._attn_implementation == before
    with_bias, without = (run(llava, MIXED_ROWS[:1], one)[1] for one in (config, SETTINGS[name]))
    assert not torch.allclose(with_bias, without)


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["vision", "layer 2", "all"])
def test_every_cache_kind_equals_the_reference(llava, name, options, positions):
    config = ApetConfig.from_dict(SETTINGS[name].to_dict() | {"position_mode": positions})
    check(llava, MIXED_ROWS[:1], config, **options)
    check(llava, [MIXED_ROWS[0], MIXED_ROWS[2], MIXED_ROWS[3]], config, **options)


def test_a_size_bias_leaves_flash_attention_its_kernels(monkeypatch):
    """With a stand-in for the kernels: they are asked for by their own name, with heads of a size they take."""
    model, asked = tiny_llava("sdpa"), []
    config = ApetConfig.from_dict(SETTINGS["all"].to_dict() | {"size_bias": True})
    expected = run(model, MIXED_ROWS, config)[1]

    def kernels(query, key, value, mask, query_length, is_causal, softmax_scale, attn_implementation, **more):
        asked.append((attn_implementation, {states.shape[-1] % 8 for states in (query, key, value)}))
        states = [one.transpose(1, 2) for one in (query, key, value)]
        place = torch.arange(key.shape[1])
        seen = place <= place[-query_length:].unsqueeze(1)
        seen = seen if mask is None else seen & mask[:, None, None, :].bool()
        seen = seen | torch.eye(key.shape[1], dtype=torch.bool)[-query_length:]  # padding looks at itself
        mixed = scaled_dot_product_attention(*states, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
        return mixed.transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernels)
    model.config.text_config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(run(model, MIXED_ROWS, config)[1], expected, atol=1e-4, rtol=0)
    assert {name for name, _ in asked} == {"flash_attention_2"}
    assert asked[-1] == ("flash_attention_2", {0})
