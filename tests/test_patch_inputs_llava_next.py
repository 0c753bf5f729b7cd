"""Methods that read the tower or the decoder, on anyres images: crops of different visible parts, newlines, padding."""

import dataclasses

import pytest
import torch
from test_patch_llava_next import SIZES, generate, inputs, model  # noqa: F401

import apet
import apet.adapters
from apet import ApetConfig
from apet.methods import base, get_method, method_names
from apet.methods.base import Method

TOWER = {"cls_attention", "vision_keys"}
STEPS = 5
# The tiny tower has three layers.
OPTIONS = {"vscan": {"shallow": 1}}
BUDGETS = {"vision": {"visual_token_num": 8}, "llm": {"layer_list": [2], "image_token_list": [12]}}
WHOLE = {"vision": {"visual_token_num": 25}, "llm": {"layer_list": [2], "image_token_list": [2000]}}


def needs(name: str, stage: str) -> set[str]:
    return set(get_method(name, **OPTIONS.get(name, {})).needs(stage))


CASES = [
    (name, stage)
    for name in method_names()
    for stage in get_method(name).stages
    if (stage == "vision" and needs(name, stage) & TOWER) or (stage == "llm" and needs(name, stage))
]
every = pytest.mark.parametrize(("name", "stage"), CASES)


def config_of(name: str, fields: dict) -> ApetConfig:
    return ApetConfig(method=name, method_options=OPTIONS.get(name, {}), **fields)


def kept(model) -> list:  # noqa: F811
    """Per sample the positions kept of its image."""
    (stage,) = apet.last_result(model).stages
    return [[image.tolist() for image in images] for images in stage.kept]


@every
def test_batches_repetition_and_caches(model, name, stage):  # noqa: F811
    with apet.patched(model, config_of(name, BUDGETS[stage])):
        together, chosen = generate(model, inputs(model)), kept(model)
        again = generate(model, inputs(model))
        assert kept(model) == chosen
        assert all(map(torch.equal, again.logits, together.logits))
        uncached = generate(model, inputs(model), use_cache=False)
        torch.testing.assert_close(uncached.logits[0], together.logits[0], atol=1e-4, rtol=0)
        if stage == "vision":
            assert torch.equal(uncached.sequences, together.sequences)
        for row in range(len(SIZES)):
            alone = generate(model, inputs(model, (row,)))
            assert kept(model) == chosen[row : row + 1]
            assert alone.sequences[0, -STEPS:].tolist() == together.sequences[row, -STEPS:].tolist()
    layouts = apet.adapters.adapter_for(model).crop_layouts({"image_sizes": SIZES})
    for layout, (columns,) in zip(layouts, chosen, strict=True):
        patches = int((layout.columns[columns] >= 0).sum())
        assert patches == (12 if stage == "llm" else sum(min(8, int(real)) for real in layout.shown.sum(1)))


@every
def test_the_whole_budget_changes_nothing(model, name, stage):  # noqa: F811
    batch = inputs(model)
    expected = model(**batch).logits
    with apet.patched(model, config_of(name, WHOLE[stage])):
        assert torch.equal(model(**batch).logits, expected)


def test_tower_inputs_of_every_crop(model, monkeypatch):  # noqa: F811
    """Attention and keys belong to the patches they are handed over with, also where a crop is partly padding."""
    heard = []

    @dataclasses.dataclass(frozen=True)
    class Spy(Method):
        name = "spy"
        stages = ("vision",)
        needs_cls_attention = (-1, 0)
        needs_vision_keys = (-2,)

        def select(self, tokens, keep, context):
            rows = {layer: context.ask(self, "cls_attention", layer) for layer in (-1, 0)}
            heard.append((tokens, rows, context.ask(self, "vision_keys", -2)))
            return get_method("uniform").select(tokens, keep, context)

    monkeypatch.setitem(base._METHODS, "spy", Spy)
    batch = inputs(model)
    layouts = apet.adapters.adapter_for(model).crop_layouts({"image_sizes": SIZES})
    shown = [[int(real) for real in layout.shown.sum(1)] for layout in layouts]
    pixels = torch.cat([one[: layout.crops] for one, layout in zip(batch["pixel_values"], layouts, strict=True)])
    tower = model.model.vision_tower
    used = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    output = tower(pixels, output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation(used)
    features = output.hidden_states[-2][:, 1:]
    module = tower.encoder.layers[-2]
    keys = module.self_attn.k_proj(module.layer_norm1(output.hidden_states[-3]))[:, 1:]
    with apet.patched(model, ApetConfig(visual_token_num=2, method="spy")):
        model(**batch)
    assert len({tokens.shape[1] for tokens, _, _ in heard}) > 1  # the padded crops are a group of their own
    crops_heard = 0
    for tokens, rows, said_keys in heard:
        for number, block in enumerate(tokens):
            distance = torch.cdist(block, features.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
            assert distance.min(1).values.max() < 1e-4
            crop, place = distance.argmin(1) // features.shape[1], distance.argmin(1) % features.shape[1]
            assert len(crop.unique()) == 1
            for layer, attention in rows.items():
                expected = output.attentions[layer][crop[0], :, 0, 1 + place]
                torch.testing.assert_close(attention[number], expected, atol=1e-5, rtol=1e-4)
            heads = said_keys[number].transpose(0, 1).flatten(1)
            torch.testing.assert_close(heads, keys[crop[0], place], atol=1e-4, rtol=1e-4)
            crops_heard += 1
    assert crops_heard == sum(real > 2 for image in shown for real in image)
