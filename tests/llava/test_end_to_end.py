"""Recorded runs of the authors' implementation, through the loader, `apply_patch` and `generate`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import apet
from apet.adapters import host
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).parents[1] / "golden" / "end_to_end"
NAMES = [f"{image}_{setting}" for image in "ab" for setting in ("none", "v96_b10_l16_t32", "v192_b12_l8-16_t96-40")]
STAGES = [name for name in NAMES if "none" not in name]
UNCOMPRESSED_ANYRES = sorted((ROOT / "goldens").glob("llava16_*_none.npz"))


@dataclass(frozen=True)
class Run:
    """What a model did with a golden prompt.

    Attributes:
        golden: The recorded arrays.
        ids: Prompt ids (L,).
        pixels: Pixel values.
        tokens: 12 greedy tokens.
        logits: (12, V).
        entered: Hidden states (L, D) that entered the first layer at prefill.
        lengths: Query length of every layer, per call of the decoder.
        rotary: (cos, sin) of every layer, per call of the decoder.
        cached: Columns in every layer's cache at the end.
        result: What `apet.last_result` reports.
    """

    golden: dict
    ids: torch.Tensor
    pixels: torch.Tensor
    tokens: list
    logits: np.ndarray
    entered: torch.Tensor
    lengths: list
    rotary: list
    cached: list
    result: apet.CompressionResult


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def loaded(request):
    """Tokenizer, model and image processor of the 1.5 checkpoint."""
    options = {"device": "cpu", "attn_implementation": request.param}
    return load_pretrained_model(str(ROOT / "llava-v1.5-tiny"), None, "llava-v1.5-tiny", **options)[:3]


@pytest.fixture(scope="module", params=NAMES)
def run(request, loaded) -> Run:
    """One golden file, run once for all tests."""
    return compute(*loaded, request.param)


def settings(golden) -> apet.ApetConfig:
    return apet.ApetConfig(
        visual_token_num=int(golden["visual_token_num"]), basis_token_num=int(golden["basis_token_num"]),
        layer_list=golden["layer_list"].tolist(), image_token_list=golden["image_token_list"].tolist(), fps_start=0,
    )  # fmt: skip


def inputs(golden, name, tokenizer, processor, config):
    """Prompt ids (L,) and pixel values of a golden file."""
    image = Image.open(ROOT / "images" / f"image_{name.split('_')[0]}.png")
    assert image.size == tuple(golden["image_size"])
    return tokenizer_image_token(str(golden["prompt"]), tokenizer, return_tensors="pt"), process_images(
        [image], processor, config
    )


def compute(tokenizer, model, processor, name) -> Run:
    golden = np.load(ROOT / "goldens" / f"llava15_{name}.npz")
    ids, pixels = inputs(golden, name, tokenizer, processor, model.config)
    entered, lengths, rotary = [], [], []

    def watch(layer):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer == 0:
                entered.append(hidden[0])
                lengths.append([])
                rotary.append([])
            lengths[-1].append(hidden.shape[1])
            rotary[-1].append(torch.cat(kwargs["position_embeddings"], -1)[0])

        return hook

    with apet.patched(model, settings(golden)):
        # Behind the patch's own hooks, so that they see what the layers see.
        hooks = [
            layer.register_forward_pre_hook(watch(index), with_kwargs=True)
            for index, layer in enumerate(model.model.layers)
        ]
        output = model.generate(
            ids[None], images=pixels, image_sizes=[tuple(golden["image_size"])], do_sample=False, max_new_tokens=12,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        result = apet.last_result(model)
    for hook in hooks:
        hook.remove()
    cached = [host.cache_of(output).get_seq_length(layer) for layer in range(len(model.model.layers))]
    logits = torch.stack(output.logits)[:, 0].numpy()
    return Run(golden, ids, pixels, output.sequences[0].tolist(), logits, entered[0], lengths, rotary, cached, result)


def test_prompt_ids(run):
    assert run.ids.tolist() == run.golden["input_ids"].tolist()


def test_pixels(run):
    np.testing.assert_allclose(run.pixels[..., ::16, ::16], run.golden["pixel_values_sample"], atol=1e-5, rtol=0)


def test_image_embeddings_that_enter_the_decoder(run):
    start, count = int(run.golden["image_start"]), int(run.golden["num_image_embeds"])
    embeds = run.entered[start : start + count]
    np.testing.assert_allclose(embeds.sum(-1), run.golden["image_embeds_sum"], atol=2e-3, rtol=0)
    if "image_embeds" in run.golden:
        np.testing.assert_allclose(embeds, run.golden["image_embeds"], atol=2e-3, rtol=0)


def test_lengths_of_all_layers(run):
    expected = run.golden["prefill_len_per_layer"].tolist()
    assert run.lengths[0] == expected
    assert run.lengths[1:] == [[1] * len(expected)] * 11
    assert run.cached == [length + 11 for length in expected]


def test_positions_of_all_layers(run, loaded):
    """Positions are read off the rotary embeddings that reach the layers."""
    table = torch.cat(loaded[1].model.language_model.rotary_emb(run.entered[None], torch.arange(1024)[None]), -1)[0]
    prefill = [row.tolist() for row in run.golden["prefill_len_per_layer"][:, None]]
    for rotary, (length,) in zip(run.rotary[0], prefill, strict=True):
        assert torch.equal(rotary, table[:length])
    for rotary, positions in zip(run.rotary[1:], run.golden["decode_position_per_layer"], strict=True):
        assert torch.equal(torch.cat(rotary), table[torch.tensor(positions)])


def test_tokens_and_logits(run):
    assert run.tokens == run.golden["tokens"].tolist()
    np.testing.assert_allclose(run.logits, run.golden["logits"], atol=2e-3, rtol=0)


def test_kept_tokens(run):
    """Per stage, and traced back to the patches of the picture."""
    golden, stages = run.golden, run.result.stages
    layers = golden["layer_list"].tolist()
    if "enc_kept_indices" not in golden:
        assert all(torch.equal(stage.kept[0][0], torch.arange(576)) for stage in stages)
        return
    assert [stage.name for stage in stages] == ["vision", *(f"layer {layer}" for layer in layers)]
    assert stages[0].kept[0][0].tolist() == golden["enc_kept_indices"][0].tolist()
    entered = torch.arange(len(stages[0].kept[0][0]))
    for number, stage in enumerate(stages[1:], start=1):
        entered = entered[stage.kept[0][0]]
        assert stage.kept[0][0].tolist() == golden[f"llm{number}_kept_indices"].tolist()
        assert entered.tolist() == golden[f"llm{number}_origin"].tolist()
        assert run.result.origin(number)[0][0].tolist() == golden[f"llm{number}_patch"].tolist()


def test_reported_budgets(run):
    text = len(run.ids) - 1
    assert run.result.tokens_per_layer == [[int(length) - text for length in run.golden["prefill_len_per_layer"]]]


@pytest.mark.parametrize("image", "ab")
def test_embeddings_through_the_methods_other_tools_call(loaded, image):
    tokenizer, model, processor = loaded
    golden = np.load(ROOT / "goldens" / f"llava15_{image}_none.npz")
    ids, pixels = inputs(golden, image, tokenizer, processor, model.config)
    start, count = int(golden["image_start"]), int(golden["num_image_embeds"])
    with torch.no_grad():
        encoded = model.encode_images(pixels)
        *_, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids[None], None, None, None, None, pixels)
        projected = model.model.mm_projector(model.get_vision_tower()(pixels))
    np.testing.assert_allclose(encoded[0].sum(-1), golden["image_embeds_sum"], atol=2e-3, rtol=0)
    assert torch.equal(embeds[0, start : start + count], encoded[0]) and torch.equal(projected, encoded)
    text = torch.cat([ids[:start], ids[start + 1 :]])
    around = torch.cat([embeds[0, :start], embeds[0, start + count :]])
    assert torch.equal(around, model.model.embed_tokens(text))


def test_the_patch_leaves_no_trace(loaded):
    tokenizer, model, processor = loaded
    compressed = compute(tokenizer, model, processor, STAGES[0])
    golden = np.load(ROOT / "goldens" / "llava15_a_none.npz")
    with torch.no_grad():
        encoded = model.encode_images(compressed.pixels)[0]
    np.testing.assert_allclose(encoded.sum(-1), golden["image_embeds_sum"], atol=2e-3, rtol=0)


@pytest.mark.parametrize("path", UNCOMPRESSED_ANYRES, ids=lambda path: path.stem)
def test_uncompressed_anyres_pictures(path):
    """Vision weights inside the 1.6 checkpoint win over those of the CLIP folder."""
    golden, name = np.load(path), path.stem.removeprefix("llava16_")
    tokenizer, model, processor, _ = load_pretrained_model(
        str(ROOT / "llava-v1.6-vicuna-tiny"), None, "llava-v1.6-vicuna-tiny", device="cpu"
    )
    ids, pixels = inputs(golden, name, tokenizer, processor, model.config)
    assert ids.tolist() == golden["input_ids"].tolist()
    np.testing.assert_allclose(pixels[..., ::16, ::16], golden["pixel_values_sample"], atol=1e-5, rtol=0)
    output = model.generate(
        ids[None], images=pixels, image_sizes=[tuple(golden["image_size"])], max_new_tokens=12,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert host.cache_of(output).get_seq_length() == golden["prefill_len_per_layer"][0] + 11
    assert output.sequences[0].tolist() == golden["tokens"].tolist()
    np.testing.assert_allclose(torch.stack(output.logits)[:, 0], golden["logits"], atol=2e-3, rtol=0)
