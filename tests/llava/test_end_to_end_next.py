"""LLaVA-1.6 in the original format against what the authors' code computed, and our own accounting beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

import apet
from apet import ApetConfig
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "end_to_end"
NAMES = sorted(path.stem for path in (GOLDEN / "goldens").glob("llava16_*.npz"))


@pytest.fixture(scope="module")
def loaded():
    tokenizer, model, processor, _ = load_pretrained_model(
        str(GOLDEN / "llava-v1.6-vicuna-tiny"), None, "llava-v1.6-vicuna-tiny", device="cpu"
    )
    return tokenizer, model, processor


def config_of(golden, **changes) -> ApetConfig:
    """The golden run's settings, FPS from the first token."""
    fields = {"fps_start": 0, "visual_token_num": int(golden["visual_token_num"])}
    for name in ("layer_list", "image_token_list"):
        fields[name] = golden[name].tolist()
    return ApetConfig(**fields | changes)


def generate(loaded, golden, config: ApetConfig, name: str):
    """Output of 12 greedy steps, and what was kept."""
    tokenizer, model, processor = loaded
    image = Image.open(GOLDEN / "images" / f"image_{name.split('_')[1]}.png").convert("RGB")
    pixels = process_images([image], processor, model.config)
    np.testing.assert_allclose(pixels[..., ::16, ::16], golden["pixel_values_sample"], atol=1e-5)
    ids = tokenizer_image_token(str(golden["prompt"]), tokenizer, return_tensors="pt").unsqueeze(0)
    assert ids[0].tolist() == golden["input_ids"].tolist()
    with apet.patched(model, config):
        out = model.generate(
            ids, images=pixels, image_sizes=[image.size], max_new_tokens=12, min_new_tokens=12, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return out, apet.last_result(model)


@pytest.mark.parametrize("name", NAMES)
def test_published_accounting_reproduces_the_goldens(loaded, name):
    golden = np.load(GOLDEN / "goldens" / f"{name}.npz")
    out, result = generate(loaded, golden, config_of(golden, compat="published"), name)
    assert out.sequences[0].tolist() == golden["tokens"].tolist()
    np.testing.assert_allclose(torch.cat(out.logits), golden["logits"], atol=2e-3)
    text = len(golden["input_ids"]) - 1
    assert [text + count for count in result.tokens_per_layer[0]] == golden["prefill_len_per_layer"].tolist()


@pytest.mark.parametrize("picture", ["wide", "tall"])
def test_our_accounting_spends_the_budget_on_real_patches(loaded, picture):
    name = f"llava16_{picture}_v96_b10_l4_t40"
    golden = np.load(GOLDEN / "goldens" / f"{name}.npz")
    _, result = generate(loaded, golden, config_of(golden), name)
    vision, layer = result.stages
    crops = {"wide": 5, "tall": 3}[picture]
    # Every kept row of tiles ends in its newline: at least one of its patches is kept, at most 48 rows exist.
    newlines = vision.tokens_out[0][0] - 96 * crops
    assert 0 < newlines <= 48
    assert 0 < layer.tokens_out[0][0] - 40 <= min(40, newlines)


def test_a_budget_per_image(loaded):
    golden = np.load(GOLDEN / "goldens" / "llava16_wide_v96_b10_enconly.npz")
    config = config_of(golden, visual_token_num=300, budget_per="image")
    _, result = generate(loaded, golden, config, "llava16_wide")
    assert 300 < result.stages[0].tokens_out[0][0] <= 300 + 48


def test_the_hugging_face_layout_answers_alike(loaded, tmp_path):
    tokenizer, model, processor = loaded
    config = model.config
    other = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_id=config.text_config.vocab_size,
            image_grid_pinpoints=config.image_grid_pinpoints,
        )
    )
    other.load_state_dict(model.state_dict())
    for part in (other, tokenizer, processor):
        part.save_pretrained(tmp_path)
    again = load_pretrained_model(str(tmp_path), None, "llava-next-hf", device="cpu")[:3]
    golden = np.load(GOLDEN / "goldens" / "llava16_tall_v96_b10_l4_t40.npz")
    settings = config_of(golden)
    expected, _ = generate(loaded, golden, settings, "llava16_tall")
    answered, _ = generate(again, golden, settings, "llava16_tall")
    assert torch.equal(expected.sequences, answered.sequences)
    assert all(map(torch.equal, expected.logits, answered.logits))
