"""LLaVA-NeXT: the transformers class patched by hand against the original-format path, and its own invariances."""

import pytest
import torch
from tiny import IMAGE_ID, randomise
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

import apet
import apet.adapters
from apet import ApetConfig

SIDE, PER_SIDE = 70, 5
# (height, width) as transformers wants them; grids of 2x2, 1x3 and 2x1 tiles, the last one with padding.
SIZES = [(140, 140), (70, 200), (150, 60)]
BOTH = ApetConfig(visual_token_num=8, layer_list=[2], image_token_list=[12], basis_token_num=3)
PER_IMAGE = ApetConfig(visual_token_num=20, basis_token_num=3, budget_per="image")
WHOLE = ApetConfig(visual_token_num=25, layer_list=[2], image_token_list=[2000], basis_token_num=3)


def make(attention: str) -> LlavaNextForConditionalGeneration:
    """A tiny model of 25 tokens per crop."""
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    pinpoints = [[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]]
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, image_grid_pinpoints=pinpoints,
        attn_implementation=attention,
    )  # fmt: skip
    model = randomise(LlavaNextForConditionalGeneration(config)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return make(request.param)


def inputs(model, which=(0, 1, 2)) -> dict:
    """A left-padded batch with one image per row; prompts as long as the images need."""
    sizes = torch.tensor([SIZES[index] for index in which])
    layouts = apet.adapters.adapter_for(model).crop_layouts({"image_sizes": sizes})
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(3, 5, 3, SIDE, SIDE, generator=generator)[list(which)]
    pixels = pixels[:, : max(layout.crops for layout in layouts)]
    lengths = [len(layout.columns) for layout in layouts]
    rows = [[1] + [IMAGE_ID] * length + [7 + index, 9, 11] for index, length in zip(which, lengths, strict=True)]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": pixels,
        "image_sizes": sizes,
    }


def generate(model, batch, **options):
    return model.generate(
        **batch, max_new_tokens=5, do_sample=False, suppress_tokens=[IMAGE_ID], return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip


def test_keeping_everything_and_removing_are_bit_identical(model):
    batch = inputs(model)
    untouched = generate(model, batch)
    for config in (WHOLE, ApetConfig()):
        with apet.patched(model, config):
            assert all(map(torch.equal, generate(model, batch).logits, untouched.logits))
    assert "get_image_features" not in vars(model.model)
    assert all(map(torch.equal, generate(model, batch).logits, untouched.logits))


def test_budgets_mean_what_they_say(model):
    with apet.patched(model, BOTH):
        generate(model, inputs(model))
        result = apet.last_result(model)
    layouts = apet.adapters.adapter_for(model).crop_layouts({"image_sizes": SIZES})
    for sample, layout in enumerate(layouts):
        (columns,) = result.stages[0].kept[sample]
        shown = layout.columns[columns.numpy()]
        patches = shown[shown >= 0]
        per_crop = [min(8, int(real)) for real in layout.shown.sum(1)]
        assert [int((patches // 25 == crop).sum()) for crop in range(layout.crops)] == per_crop
        assert (shown < 0).sum() == len(set(layout.lines[columns.numpy()]) & set(range(99)))
        (left,) = result.origin()[sample]
        assert (layout.columns[left.numpy()] >= 0).sum() == 12
        assert result.tokens_per_layer[sample] == [len(columns)] * 2 + [len(left)] * 2


@pytest.mark.parametrize("config", [BOTH, PER_IMAGE], ids=["crop", "image"])
def test_a_batch_gives_what_its_rows_give_alone(model, config):
    with apet.patched(model, config):
        together = generate(model, inputs(model))
        for index in range(3):
            alone = generate(model, inputs(model, (index,)))
            assert alone.sequences[0, -5:].tolist() == together.sequences[index, -5:].tolist()
            for one, many in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(one[0], many[index], atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_cache_kinds_agree(model, options):
    with apet.patched(model, BOTH):
        batch = inputs(model)
        assert torch.equal(generate(model, batch).sequences, generate(model, batch, **options).sequences)


def test_an_image_budget_is_split_by_error(model):
    config = ApetConfig(visual_token_num=30, basis_token_num=3, budget_per="image")
    with apet.patched(model, config):
        generate(model, inputs(model))
        result = apet.last_result(model)
    layouts = apet.adapters.adapter_for(model).crop_layouts({"image_sizes": SIZES})
    splits = []
    for layout, (columns,) in zip(layouts, result.stages[0].kept, strict=True):
        shown = layout.columns[columns.numpy()]
        splits.append([int((shown[shown >= 0] // 25 == crop).sum()) for crop in range(layout.crops)])
    assert [sum(split) for split in splits] == [30, 30, 30]
    assert all(min(split) >= 1 for split in splits) and len(set(splits[0])) > 1


def test_published_accounting_cuts_the_first_tokens_only(model):
    config = ApetConfig.from_dict(BOTH.to_dict() | {"image_token_list": [5], "compat": "published"})
    with apet.patched(model, config):
        generate(model, inputs(model, (0,)))
        result = apet.last_result(model)
    (entered,), (left,) = result.stages[1].tokens_in, result.stages[1].tokens_out
    assert entered[0] - left[0] == 8 - 5
    assert result.stages[1].kept[0][0][-(entered[0] - 8) :].tolist() == list(range(8, entered[0]))


READS = {
    "visionzip": {},
    "prumerge_plus": {},
    "cdpruner": {"relevance": "embeddings"},
    "mmtok": {},
    "apet_plus": {"text": 1.0},
}


@pytest.mark.parametrize("name", READS)
def test_methods_that_read_tower_or_text(model, name):
    """Rows alone and in a batch; where tokens of all crops are chosen together a budget is multiplied by the crops."""
    config = ApetConfig(method=name, method_options=READS[name], visual_token_num=8, basis_token_num=3)
    with apet.patched(model, config):
        together, result = generate(model, inputs(model)), apet.last_result(model)
        for index in range(3):
            alone = generate(model, inputs(model, (index,)))
            assert alone.sequences[0, -5:].tolist() == together.sequences[index, -5:].tolist()
            assert apet.last_result(model).tokens_per_layer[0] == result.tokens_per_layer[index]
    layouts = apet.adapters.adapter_for(model).crop_layouts({"image_sizes": SIZES})
    for layout, (tokens,) in zip(layouts, result.stages[0].kept, strict=True):
        assert (layout.columns[tokens] >= 0).sum() == 8 * layout.crops


def test_published_accounting_does_not_know_text(model):
    config = ApetConfig(method="mmtok", visual_token_num=8, compat="published")
    with pytest.raises(ValueError, match="'mmtok' reads the text, .* leave compat out"):
        apet.apply_patch(model, config)


@pytest.mark.parametrize(
    "fields",
    [
        {"tower_layer_list": [1], "tower_token_list": [12]},
        {"tower_layer_list": [1], "tower_token_list": [12], "visual_token_num": 6, "layer_list": [2],
         "image_token_list": [10]},
        {"tower_layer_list": [1], "tower_token_list": [0.6], "visual_token_num": 20, "budget_per": "image"},
        {"tower_mode": "restore", "tower_layer_list": [1], "tower_token_list": [12], "visual_token_num": 8},
    ],
    ids=["tower alone", "both", "per image", "restore"],
)  # fmt: skip
@torch.no_grad()
def test_a_tower_stage_cuts_every_crop_and_padding_is_never_shown(model, fields):
    config = ApetConfig(basis_token_num=3, **fields)
    layouts = apet.adapters.adapter_for(model).crop_layouts({"image_sizes": torch.tensor(SIZES)})
    with apet.patched(model, config):
        together = model(**inputs(model)).logits[:, -1]
        result = apet.last_result(model)
        for index in range(3):
            alone = model(**inputs(model, (index,))).logits[0, -1]
            torch.testing.assert_close(alone, together[index], atol=1e-4, rtol=0)
    budget = fields["tower_token_list"][0]
    count = budget if isinstance(budget, int) else int(budget * PER_SIDE**2)
    for layout, left, kept in zip(layouts, result.tower[0].kept, result.stages[0].kept, strict=True):
        assert len(left[0]) == layout.crops * count
        rows = layout.columns[kept[0].numpy()]
        shown = set(rows[rows >= 0].tolist())
        if config.tower_mode == "merge":
            assert shown <= set(left[0].tolist())
        if "visual_token_num" not in fields:
            assert shown == set(left[0].tolist()) & set(layout.columns.tolist())
