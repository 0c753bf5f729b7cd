"""What the patch tells methods about the model equals what the model itself says with eager attention and a cache."""

import dataclasses
import functools

import pytest
import torch
from families import FAMILIES
from tiny import IMAGE_ID, MIXED_ROWS, PATCHES, TOWERS, batch, tiny_llava
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import apet
from apet import ApetConfig
from apet.adapters import host
from apet.methods import base
from apet.methods.base import Method

LAYER = 2
STAGE = {"layer_list": [LAYER], "image_token_list": [3], "method": "spy"}


@pytest.fixture
def spy(monkeypatch):
    """A method that asks for everything a stage has, keeps what it was told, and then the first tokens."""
    heard = []

    @dataclasses.dataclass(frozen=True)
    class Spy(Method):
        name = "spy"
        wants: str = "llm"

        def needs(self, stage):
            if stage == "vision":
                return {"cls_attention": (-1, 0), "vision_keys": (-2,), "vision_states": (), "vision_features": ()}
            per_layer = {name: (0, -1) for name in ("attention_row", "text_attention", "keys", "text_keys")}
            return per_layer | {name: () for name in ("text_embeddings", "image_embeddings", "text_hidden")}

        def select(self, tokens, keep, context):
            said = {"tokens": tokens}
            for name, layers in self.needs(context.stage).items():
                for layer in layers or (None,):
                    absolute = layer if layer is None or context.stage == "vision" else context.layer + layer
                    said[name, layer] = context.ask(self, name, *(() if layer is None else (absolute,)))
            heard.append(said)
            rows = torch.arange(keep).expand(len(tokens), -1)
            errors = torch.zeros(tokens.shape[:2])
            return apet.CompressedTokens(tokens[:, :keep], rows, errors, rows[:, :0], torch.zeros_like(errors).long())

    monkeypatch.setitem(base._METHODS, "spy", Spy)
    return heard


@functools.cache
def eager_llava():
    return tiny_llava("eager").double()


def double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def truth(model, inputs):
    """Attention maps, hidden states and cache of the model without a patch."""
    cache = DynamicCache(config=model.config.get_text_config())
    return model(**inputs, **host.with_cache(cache), output_attentions=True, output_hidden_states=True), cache


def test_decoder_inputs_of_a_mixed_batch(spy):
    """Every image of a left-padded batch, against its row alone: the model's own eager attention and cache."""
    model = tiny_llava("sdpa").double()
    with apet.patched(model, ApetConfig(**STAGE)):
        together = double(batch(MIXED_ROWS))
        positions = (together["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**together, position_ids=positions)
    (said,), number = spy, 0
    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    for row in MIXED_ROWS:
        inputs = double(batch([row]))
        (output, cache), ids = truth(eager_llava(), inputs), inputs["input_ids"][0].tolist()
        image = [column for column, token in enumerate(ids) if token == IMAGE_ID]
        text = [column for column, token in enumerate(ids) if token != IMAGE_ID]
        for first in range(0, len(image), PATCHES):
            columns = image[first : first + PATCHES]
            words = [column for column in text if column > columns[-1]] or text
            embeddings, mask = said["text_embeddings", None]
            assert mask[number].sum() == len(words)
            close(embeddings[number, : len(words)], output.hidden_states[0][0, words])
            close(said["image_embeddings", None][number], output.hidden_states[0][0, columns])
            close(said["text_hidden", None][number, : len(words)], output.hidden_states[LAYER][0, words])
            for layer in (0, -1):
                attention, keys = output.attentions[LAYER + layer][0], cache.layers[LAYER + layer].keys[0]
                close(said["attention_row", layer][number].double(), attention[:, -1, columns])
                expected = attention[:, words][:, :, columns]
                close(said["text_attention", layer][number, :, : len(words)].double(), expected)
                close(said["keys", layer][number], keys[:, columns])
                close(said["text_keys", layer][number, :, : len(words)], keys[:, words])
            number += 1
    assert number == len(said["tokens"])
    assert all(said["text_attention", layer].isfinite().all() for layer in (0, -1))


@pytest.mark.parametrize("name", TOWERS)
def test_tower_inputs(name, spy):
    model, inputs = tiny_llava("eager", tower=name).double(), double(batch(MIXED_ROWS))
    tower = model.model.vision_tower
    output = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    with apet.patched(model, ApetConfig(visual_token_num=5, method="spy")):
        model(**inputs)
    (said,) = spy
    layers = host.tower_layers(tower)
    count = len(layers)
    for layer in (-1, 0):  # the last layer does not run under a patch
        expected = output.attentions[layer][:, :, 0, 1:]
        torch.testing.assert_close(said["cls_attention", layer].double(), expected, atol=1e-5, rtol=1e-5)
    states = torch.stack([output.hidden_states[layer][:, 1:] for layer in range(count // 2, count)], 1)
    torch.testing.assert_close(said["vision_states", None], states)
    before = output.hidden_states[count - 2]
    if name == "clip":
        keys = layers[-2].self_attn.k_proj(layers[-2].layer_norm1(before))[:, 1:]
    else:
        project = next(
            module for path, module in layers[-2].attention.named_modules() if path.endswith(("key", "k_proj"))
        )
        keys = project(layers[-2].norm1(before))[:, 1:]
    heads = said["vision_keys", -2].transpose(1, 2).flatten(2)
    torch.testing.assert_close(heads, keys)
    torch.testing.assert_close(said["vision_features", None], output.hidden_states[count - 1][:, 1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_inputs_of_every_family(name, spy):
    family = FAMILIES[name]
    model, inputs = family.build("eager"), family.inputs([family.prompts[0]])
    output, cache = truth(model, inputs)
    with apet.patched(model, ApetConfig(layer_list=[LAYER], image_token_ratio_list=[0.5], method="spy")):
        model(**inputs)
    said = spy[0]
    hidden = output.hidden_states[LAYER][0]
    columns = [int((hidden - token).abs().sum(-1).argmin()) for token in said["tokens"][0]]
    for layer in (0, -1):
        attention, keys = output.attentions[LAYER + layer][0], cache.layers[LAYER + layer].keys[0]
        torch.testing.assert_close(said["attention_row", layer][0], attention[:, -1, columns], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(said["keys", layer][0], keys[:, columns], atol=1e-4, rtol=1e-4)


def test_the_model_keeps_its_attention(spy):
    model = tiny_llava("sdpa")
    before = [layer.self_attn.config for layer in model.model.language_model.layers]
    with apet.patched(model, ApetConfig(**STAGE)):
        model(**batch(MIXED_ROWS))
    assert model.config.text_config._attn_implementation == "sdpa"
    assert [layer.self_attn.config for layer in model.model.language_model.layers] == before


def test_methods_that_ask_for_nothing_pay_nothing():
    model = tiny_llava("sdpa")
    with apet.patched(model, ApetConfig(visual_token_num=5)):
        assert not any(layer._forward_pre_hooks for layer in model.model.vision_tower.encoder.layers)
    with apet.patched(model, ApetConfig(visual_token_num=5, method="visionzip")):
        assert any(layer._forward_pre_hooks for layer in model.model.vision_tower.encoder.layers)
    assert not any(layer._forward_pre_hooks for layer in model.model.vision_tower.encoder.layers)


def test_a_layer_the_tower_does_not_have_is_refused():
    with pytest.raises(ValueError, match="the vision tower has 3 layers"):
        apet.apply_patch(tiny_llava("sdpa"), ApetConfig(visual_token_num=5, method="vscan"))


def test_attention_is_aligned_with_features_that_hold_the_class_token(spy):
    model, inputs = tiny_llava("eager").double(), double(batch(MIXED_ROWS[:1]))
    model.config.vision_feature_select_strategy = "full"
    ids = inputs["input_ids"]
    first = ids[0].tolist().index(IMAGE_ID)
    inputs["input_ids"] = torch.cat([ids[:, :first], ids[:, first : first + 1], ids[:, first:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    tower = model.model.vision_tower
    expected = tower(inputs["pixel_values"], output_attentions=True).attentions[-1][:, :, 0]
    with apet.patched(model, ApetConfig(visual_token_num=5, method="spy")):
        model(**inputs)
    torch.testing.assert_close(spy[0]["cls_attention", -1].double(), expected, atol=1e-5, rtol=1e-5)


def test_the_tower_runs_as_deep_as_a_method_looks(spy):
    model, inputs = tiny_llava("eager").double(), double(batch(MIXED_ROWS[:1]))
    model.config.vision_feature_layer = 1
    expected = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-1][:, :, 0, 1:]
    with apet.patched(model, ApetConfig(visual_token_num=5, method="spy")):
        model(**inputs)
    torch.testing.assert_close(spy[0]["cls_attention", -1].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_tower_that_did_not_run_is_no_source():
    model = tiny_llava("sdpa")
    features = torch.zeros(1, PATCHES, 24)
    with apet.patched(model, ApetConfig(visual_token_num=5, method="visionzip")):
        model(**batch(MIXED_ROWS[:1]))
        missing = pytest.raises(ValueError, match="has not just run on these 1 crops; give the model pixels")
        with apet.expecting_images(model), missing:
            model.model.multi_modal_projector(features)


def test_a_tower_without_class_token_is_refused():
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14
    )
    text = tiny_llava("sdpa").config.text_config
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
    with pytest.raises(ValueError, match="'visionzip' needs cls_attention .* the vision tower has no class token"):
        apet.apply_patch(model, ApetConfig(visual_token_num=5, method="visionzip"))
    apet.apply_patch(model, ApetConfig(visual_token_num=5, method="mmtok", method_options={"text": False}))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_tower_inputs_behind_the_projector(kind, spy):
    """Video-LLaVA: images and the frames of videos, against the towers' own eager attention."""
    family = FAMILIES["video_llava"]
    model = family.build("eager").double()
    prompts = [[2, (kind, 0), 3], [4, (kind, 1), 2]]
    inputs = double(family.inputs(prompts))
    tower = getattr(model.model, f"{kind}_tower")
    pixels = next(value for name, value in inputs.items() if name.startswith("pixel"))
    pixels = pixels.flatten(0, -4) if pixels.dim() == 5 else pixels
    output = tower(pixels, output_attentions=True, output_hidden_states=True)
    with apet.patched(model, ApetConfig(visual_token_num=5, method="spy", video_budget_per="frame")):
        model(**inputs)
    (said,) = spy
    order = range(len(pixels))
    for layer in (-1, 0):
        expected = output.attentions[layer][order, :, 0, 1:]
        torch.testing.assert_close(said["cls_attention", layer].double(), expected, atol=1e-5, rtol=1e-5)
    features = output.hidden_states[model.config.vision_feature_layer][:, 1:]
    torch.testing.assert_close(said["vision_features", None], features)
