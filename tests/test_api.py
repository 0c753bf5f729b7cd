"""One line to compress: the same call for every family, what it predicts is what happens, and any wrapper will do."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from families import FAMILIES, VideoLlava
from PIL import Image
from test_cost import counted
from tiny import IMAGE_ID, PATCHES, images, left_pad, prompt, randomise, tiny_llava
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

import apet
from apet.api import TEXT_TOKENS
from apet.bench.components import tower_stops_early
from apet.bench.presets import get_preset
from apet.cost import ModelDims
from apet.methods import method_names

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def one(seed: int = 0, text: int = TEXT_TOKENS) -> dict:
    """A prompt with one image for `tiny_llava`."""
    return left_pad([prompt(text, (3,), seed)]) | {"pixel_values": images(1, seed)}


def tiny_next() -> LlavaNextForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, image_grid_pinpoints=[[140, 140]]
    )
    return randomise(LlavaNextForConditionalGeneration(config)).eval()


def next_inputs(model) -> dict:
    count = 5 * PATCHES + 10
    ids = torch.tensor([[1] + [IMAGE_ID] * count + [7, 9]])
    pixels = torch.randn(1, 5, 3, 70, 70, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[140, 140]])}


def eight_frames() -> VideoLlava:
    family = VideoLlava()
    family.frames = 8
    return family


# The usual image of each tiny model: how it is built, and a prompt with that image.
USUAL = {
    "qwen2_vl": (FAMILIES["qwen2_vl"], ("image", 36, 36)),
    "qwen2_5_vl": (FAMILIES["qwen2_5_vl"], ("image", 36, 36)),
    "qwen3_vl": (FAMILIES["qwen3_vl"], ("image", 31, 31)),
    "internvl": (FAMILIES["internvl"], ("image", 5, 0)),
    "llava_onevision": (FAMILIES["llava_onevision"], ("image", 84, 84)),
    "video_llava": (eight_frames(), ("video", 0)),
}


def usual(name: str) -> tuple[torch.nn.Module, dict]:
    """A tiny model and a prompt with its usual image."""
    if name == "llava":
        return tiny_llava(), one()
    if name == "llava_next":
        model = tiny_next()
        return model, next_inputs(model)
    family, part = USUAL[name]
    return family.build("sdpa"), family.inputs([[3, part, 5]])


ALL = ["llava", "llava_next", *USUAL]
HOW = [{"tokens": 8}, {"ratio": 0.25}, {"tokens": 6, "method": "random"}, {"ratio": 0.3, "method": "apet_plus"}]


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("name", ALL)
def test_what_is_predicted_is_what_happens(name, how):
    model, inputs = usual(name)
    with torch.inference_mode():
        untouched = model(**inputs).logits
        with apet.compressed(model, **how):
            said, output = model.apet, model(**inputs)
        kept = output.apet.tokens_per_layer[0]
        assert said.tokens_in == output.apet.tokens_in[0][0] and kept[-1] < said.tokens_in
        if said.beside == 0:
            assert said.tokens_per_layer == kept
        else:
            assert all(low - said.beside <= got <= low for low, got in zip(said.tokens_per_layer, kept, strict=True))
        assert torch.equal(model(**inputs).logits, untouched) and not hasattr(model, "apet")


@pytest.mark.parametrize(("tokens", "counts"), [(192, (288, 96)), (128, (192, 64)), (64, (96, 32))])
def test_the_published_budgets(tokens, counts):
    model = get_preset("llava-1.5-7b").build(torch.device("meta"), torch.bfloat16)
    wanted = apet.ApetConfig(visual_token_num=counts[0], layer_list=[16], image_token_list=[counts[1]])
    assert apet.config_for(model, tokens=tokens) == apet.config_for(model, ratio=tokens / 576) == wanted
    shown = str(apet.describe(apet.compress_model(model, tokens=tokens)))
    assert shown == str(model.apet)
    lines = [line.split() for line in shown.splitlines()]
    assert lines[2] == ["vision", "1-16", str(counts[0]), f"{counts[0] / 576:.1%}"]
    assert lines[3] == ["after", "layer", "16", "17-32", str(counts[1]), f"{counts[1] / 576:.1%}"]
    assert lines[4] == ["average", "1-32", str(tokens), f"{tokens / 576:.1%}"]
    assert model.apet.cache_bytes[1] == (tokens + TEXT_TOKENS) * 2**19


@pytest.mark.parametrize("method", method_names())
def test_every_method_by_name(method):
    model = tiny_llava(layers=8)
    if method == "none":
        with pytest.raises(ValueError, match="keep every visual token"):
            apet.compress_model(model, tokens=14, method=method)
    elif method == "vscan":  # it reads more layers of the tower than this one has
        with pytest.raises(ValueError, match="needs cls_attention of layer .* has 3 layers"):
            apet.compress_model(model, tokens=14, method=method)
    elif method == "cdpruner":  # CLIP's text tower is no part of the model
        with pytest.raises(ValueError, match="clip_relevance"):
            apet.compress_model(model, tokens=14, method=method)
        apet.compress_model(model, tokens=14, method="cdpruner:relevance=embeddings")
    else:
        with torch.inference_mode(), apet.compressed(model, tokens=14, method=method):
            output = model(**one())
            assert model.apet.tokens_per_layer == output.apet.tokens_per_layer[0]
            assert model.apet.layer_averaged_tokens == pytest.approx(14, abs=1)


def test_the_costs_are_those_of_a_run():
    model, inputs = tiny_llava("eager"), one()

    def run():
        return model(**inputs, use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        full = counted(run)
        with apet.compressed(model, tokens=8, method="random"):
            said, real, early = model.apet, counted(run), tower_stops_early(model, run)
    # Before 5.23 transformers does not say which layer of the tower it reads, so the last one runs for nothing.
    last = 0 if early else ModelDims.of(model.config).tower.layer_flops()
    assert said.flops == (full, real - last) and said.speedup == full / (real - last)


@pytest.mark.parametrize("name", ALL)
def test_solved_for_a_speedup_and_for_flops(name):
    model, _ = usual(name)
    base = apet.describe(model).flops[0]
    by_speed = apet.config_for(model, speedup=1.1)
    assert by_speed == apet.config_for(model, target_flops=base / 1.1)
    said = apet.compress_model(model, speedup=1.1).apet
    assert said.speedup >= 1.1 and apet.active_config(model) == by_speed
    # No more is dropped than that takes.
    assert said.speedup < 1.15
    with pytest.raises(ValueError, match=r"speedup=1000 cannot be reached: with \d+ visual tokens on average"):
        apet.compress_model(model, speedup=1000)
    assert apet.active_config(model) is not None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "give exactly one of tokens=, ratio=, target_flops=, speedup= .* got none"),
        ({"tokens": 8, "ratio": 0.5}, "got tokens=8, ratio=0.5"),
        ({"tokens": 0}, "tokens=0 must be a number above 0"),
        ({"tokens": True}, "tokens=True must be a number above 0"),
        ({"ratio": 1.0}, "ratio=1.0 must be a share below 1"),
        ({"tokens": 25}, r"tokens=25 lets method 'apet' keep every visual token of one image of 70 x 70 pixels \(25\)"),
        ({"speedup": 1}, "speedup=1 asks for no less than the uncompressed"),
        ({"target_flops": 1}, "target_flops=1 cannot be reached"),
        ({"tokens": 8, "method": "apex"}, "unknown method 'apex'. Did you mean 'apet'"),
        ({"tokens": 3, "method": "fastv"}, "method 'fastv' cannot average 3 tokens"),
        ({"speedup": 100, "method": "fastv"}, "cannot be reached"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(how, message):
    model = tiny_llava()
    with pytest.raises(ValueError, match=message):
        apet.compress_model(model, **how)
    assert apet.active_config(model) is None and not hasattr(model, "apet")


def test_other_models_are_refused():
    model = transformers.LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(TypeError, match="not a model ApET can patch"):
        apet.compress_model(model, tokens=8)


def test_budgets_that_say_nothing_about_other_images_are_not_described():
    model = tiny_llava()
    for config in (apet.ApetConfig(visual_token_num=[9, 8]), apet.ApetConfig(visual_token_num=9, compat="published")):
        apet.apply_patch(model, config)
        with pytest.raises(ValueError, match="apet.last_result"):
            apet.describe(model)


class TestTheAttribute:
    def test_copies_have_it_and_lose_it_alone(self):
        model = apet.compress_model(tiny_llava(), tokens=8)
        keys = set(tiny_llava().state_dict())
        assert set(model.state_dict()) == keys
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.apet == model.apet and apet.active_config(twin) == apet.active_config(model)
            apet.restore(twin)
            assert not hasattr(twin, "apet") and hasattr(model, "apet")
            assert torch.equal(twin(**one()).logits, tiny_llava()(**one()).logits)

    @pytest.mark.parametrize("off", [apet.restore, apet.remove_patch])
    def test_it_goes_with_the_patch(self, off):
        model = apet.compress_model(tiny_llava(), tokens=8)
        assert off(model) is model
        assert "apet" not in vars(model) and apet.active_config(model) is None
        assert apet.restore(model) is model

    def test_a_second_compression_replaces_the_first(self):
        model = apet.compress_model(tiny_llava(), tokens=8)
        apet.compress_model(model, tokens=12)
        assert model.apet.layer_averaged_tokens == 12
        apet.apply_patch(model, apet.ApetConfig(visual_token_num=5))
        assert not hasattr(model, "apet") and apet.describe(model).layer_averaged_tokens == 5

    def test_a_block_restores_what_was(self):
        model = apet.compress_model(tiny_llava(), tokens=8)
        before, config = model.apet, apet.active_config(model)
        with pytest.raises(KeyboardInterrupt), apet.compressed(model, ratio=0.5, method="random") as same:
            assert same is model and model.apet.method == "random"
            raise KeyboardInterrupt
        assert model.apet == before and apet.active_config(model) == config
        apet.restore(model)
        assert not hasattr(model, "apet")


def words() -> transformers.PreTrainedTokenizerFast:
    """Bytes and a placeholder, 260 tokens."""
    inner = Tokenizer(models.BPE({s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.padding_side = "left"
    return tokenizer


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}assistant:"
)


@pytest.fixture(scope="module")
def speaking() -> tuple:
    """A tiny LLaVA of bytes with a processor, and a picture."""
    tokenizer = words()
    model = tiny_llava()
    config = model.config
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.vocab_size = len(tokenizer)
    model = randomise(transformers.LlavaForConditionalGeneration(config)).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = tokenizer.pad_token_id, None
    size = {"height": 70, "width": 70}
    pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": 70}, crop_size=size)
    processor = transformers.LlavaProcessor(
        pixels, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>", chat_template=TEMPLATE,
    )  # fmt: skip
    noise = torch.randint(0, 255, (90, 110, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return model, processor, Image.fromarray(noise.numpy())


def chat(picture) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]


def templated(processor, picture):
    return processor.apply_chat_template(
        chat(picture), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


@pytest.mark.host
class TestInAnyHands:
    def test_chat_template(self, speaking):
        model, processor, picture = speaking
        with apet.compressed(model, tokens=8):
            model.generate(**templated(processor, picture), **GREEDY)
            assert apet.last_result(model).layer_averaged_tokens == [8]

    @pytest.mark.parametrize("what", ["model", "pipeline"])
    def test_pipeline(self, speaking, what):
        model, processor, picture = speaking
        pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        with apet.compressed(model if what == "model" else pipe, tokens=8):
            (answer,) = pipe(text=chat(picture), generate_kwargs=GREEDY, return_full_text=False)
            assert apet.last_result(model).layer_averaged_tokens == [8] and pipe.model.apet is model.apet
            ids = model.generate(**templated(processor, picture), **GREEDY)
        wanted = processor.decode(ids[0, -4:], skip_special_tokens=True)
        assert answer["generated_text"] == wanted

    def test_streamer(self, speaking):
        model, processor, picture = speaking
        inputs = templated(processor, picture)
        with apet.compressed(model, tokens=8):
            wanted = processor.decode(model.generate(**inputs, **GREEDY)[0, -4:], skip_special_tokens=True)
            streamer = transformers.TextIteratorStreamer(
                processor.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
            thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
            thread.start()
            text = "".join(streamer)
            thread.join()
        assert text == wanted

    # peft asks transformers for what it has renamed.
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
    def test_peft(self):
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(tiny_llava(), lora).eval()
        with torch.inference_mode():
            untouched = wrapped(**one()).logits
            with apet.compressed(wrapped, tokens=8):
                adapted = wrapped(**one())
                assert wrapped.apet.layer_averaged_tokens == adapted.apet.layer_averaged_tokens[0] == 8
                with wrapped.disable_adapter():
                    plain = wrapped(**one()).logits
            assert torch.equal(wrapped(**one()).logits, untouched) and not hasattr(wrapped, "apet")
            assert not torch.equal(adapted.logits, plain)
            merged = apet.compress_model(wrapped, tokens=8).merge_and_unload()
            torch.testing.assert_close(merged(**one()).logits, adapted.logits, rtol=1e-3, atol=1e-3)
            assert apet.describe(apet.restore(merged)).method == "no compression"

    def test_int8(self):
        quantization = pytest.importorskip("torchao.quantization")
        model = tiny_llava()
        with torch.inference_mode():
            exact = model(**one()).logits
            quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
            untouched = model(**one()).logits
            assert not torch.equal(untouched, exact)
            for method in ("apet", "fastv"):  # fastv recomputes attention from the quantised layer
                with apet.compressed(model, tokens=15, method=method):
                    assert model(**one()).apet.layer_averaged_tokens == [model.apet.layer_averaged_tokens]
            assert torch.equal(model(**one()).logits, untouched)

    @pytest.mark.parametrize("where", ["cpu", "disk"])
    @pytest.mark.parametrize("method", ["apet", "fastv", "visionzip"])
    def test_offload(self, where, method, tmp_path):
        accelerate = pytest.importorskip("accelerate")
        with torch.inference_mode():
            with apet.compressed(tiny_llava(), tokens=15, method=method) as wanted:
                logits = wanted(**one()).logits
            model = tiny_llava()
            untouched = model(**one()).logits
            if where == "cpu":
                accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            else:
                accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
            assert next(model.model.language_model.layers[0].parameters()).is_meta
            with apet.compressed(model, tokens=15, method=method):
                assert torch.equal(model(**one()).logits, logits)
            assert torch.equal(model(**one()).logits, untouched)


NEWCOMER = """
import apet

model = build()
apet.compress_model(model, tokens=8)
print(model.apet)
with torch.inference_mode():
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
print(apet.last_result(model).layer_averaged_tokens)
apet.restore(model)
"""


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "video_llava"])
def test_a_newcomers_ten_lines(name, capsys):
    model, inputs = usual(name)
    exec(compile(NEWCOMER, "newcomer", "exec"), {"build": lambda: model, "inputs": inputs, "torch": torch})  # noqa: S102
    said, counted = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert said.startswith(f"{name} with apet: ") and "predicted" in said
    assert 0 < float(counted.strip("[]")) < 160
