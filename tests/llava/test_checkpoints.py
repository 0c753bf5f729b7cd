"""Checkpoints in both layouts through `load_pretrained_model`: recorded answers, the known traps, bad files."""

import builtins
import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizer, LlavaConfig, LlavaForConditionalGeneration

from apet.adapters import host
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import load_tokenizer, open_checkpoint, read_config
from llava.model.multimodal_encoder.builder import build_vision_tower, resolve_vision_tower

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "llava" / "tiny"
CLIP = TINY / "clip-tiny-patch14-28"
FULL_CLIP = GOLDEN / "end_to_end" / "clip-tiny-patch14-336"
RECORDED = json.loads((GOLDEN / "llava" / "tiny.json").read_text(encoding="utf-8"))
RUNS = [
    (checkpoint["dir"], index) for checkpoint in RECORDED["checkpoints"] for index in range(len(checkpoint["runs"]))
]
V15, V16 = "llava-v1.5-tiny", "llava-v1.6-vicuna-tiny"


def load(path, **options):
    """(tokenizer, model, image processor, context length) on the CPU."""
    return load_pretrained_model(str(path), options.pop("model_base", None), "any name", device="cpu", **options)


def recorded(name: str, index: int = 0) -> dict:
    return next(one for one in RECORDED["checkpoints"] if one["dir"] == name)["runs"][index]


def picture(size, k: int) -> Image.Image:
    """The synthetic picture of the golden files."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    channels = [7 * x + 3 * y + k, 5 * x + 11 * y + 2 * k, x + y + 3 * k]
    return Image.fromarray((np.stack(channels, -1) % 256).astype(np.uint8))


@dataclass(frozen=True)
class Answer:
    """Ids, prompt embeddings (L, D), new ids, logits (steps, V) and prompt columns of the cache of one answer."""

    ids: list[int]
    embeds: torch.Tensor
    new: list[int]
    logits: torch.Tensor
    columns: int


def answer(loaded, run: dict) -> Answer:
    """Answer a recorded prompt about its picture."""
    tokenizer, model, processor, _ = loaded
    conversation = conv_templates[run["conv_mode"]].copy()
    conversation.append_message(conversation.roles[0], "<image>\n" + run["question"])
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() == run["prompt"]
    ids = tokenizer_image_token(run["prompt"], tokenizer, return_tensors="pt")
    image = picture(run["image"]["size_wh"], run["image"]["k"])
    images = {"images": process_images([image], processor, model.config), "image_sizes": [image.size]}
    output = model.generate(ids[None], **images, max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        *_, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids[None], None, None, None, None, **images)
    new = output.sequences[0].tolist()
    columns = host.cache_of(output).get_seq_length() - len(new) + 1
    return Answer(ids.tolist(), embeds[0], new, torch.cat(output.logits), columns)


def answers_as_recorded(loaded, name: str = V15, tolerance: float = 1e-3) -> None:
    """The first recorded run, tokens and largest logits."""
    run = recorded(name)
    result = answer(loaded, run)
    assert result.ids == run["input_ids"] and result.new == run["new_token_ids"]
    for token, value in run["first_logits_top5"]:
        assert float(result.logits[0, token]) == pytest.approx(value, abs=tolerance)


@pytest.fixture
def folder(tmp_path) -> Callable[..., Path]:
    """`folder(name, **fields)` copies a tiny checkpoint and its tower; fields of config.json, None removes one."""

    def copy(name: str = V15, target: str | None = None, clip: bool = True, **fields) -> Path:
        path = tmp_path / (target or name)
        shutil.copytree(TINY / name, path)
        if clip and not (tmp_path / CLIP.name).exists():
            shutil.copytree(CLIP, tmp_path / CLIP.name)
        config = json.loads((path / "config.json").read_text()) | fields
        config = {key: value for key, value in config.items() if value is not None}
        (path / "config.json").write_text(json.dumps(config))
        return path

    return copy


def edit_weights(path: Path, edit: Callable[[dict], dict]) -> None:
    file = path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in edit(load_file(file)).items()}, file)


def shard(path: Path, kind: str, parts: int) -> None:
    """Rewrite the weights of a folder as "bin", "old bin" (no zip archive) or "safetensors", in some parts."""
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    zipped, kind = kind != "old bin", kind.split()[-1]
    stem = "pytorch_model" if kind == "bin" else "model"
    names, index = sorted(weights), {}
    for part in range(parts):
        file = f"{stem}-{part + 1:05d}-of-{parts:05d}.{kind}" if parts > 1 else f"{stem}.{kind}"
        own = {key: weights[key] for key in names[part::parts]}
        if kind == "bin":
            torch.save(own, path / file, _use_new_zipfile_serialization=zipped)
        else:
            save_file(own, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(own, file)
    if parts > 1:
        (path / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def refusal(kind: type[Exception], path, *words: str, **options) -> None:
    """Loading raises exactly `kind` with one line that holds the words."""
    with pytest.raises(kind) as caught:
        load(path, **options)
    message = str(caught.value)
    assert caught.type is kind and "\n" not in message.strip() and len(message) < 500
    for word in words:
        assert word in message


@pytest.fixture
def records():
    """Log records of transformers, at every level that is shown by default."""

    class Collector(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    found: list[str] = []
    handler = Collector(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield found
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture(scope="module")
def v15():
    return load(TINY / V15)


@pytest.fixture(scope="module")
def v16():
    return load(TINY / V16)


class TestRecordedRuns:
    @pytest.mark.parametrize(("name", "index"), RUNS)
    def test_answers(self, v15, v16, name, index):
        run = recorded(name, index)
        result = answer(v15 if name == V15 else v16, run)
        assert result.ids == run["input_ids"] and result.new == run["new_token_ids"]
        assert result.columns == len(result.embeds) == run["sequence_length"]
        assert result.columns - len(result.ids) + 1 == run["n_image_tokens"]
        assert float(result.embeds.abs().mean()) == pytest.approx(run["embeds_mean_abs"], abs=1e-5)
        top = result.logits[0].topk(5)
        assert top.indices.tolist() == [token for token, _ in run["first_logits_top5"]]
        assert top.values.tolist() == pytest.approx([value for _, value in run["first_logits_top5"]], abs=1e-3)
        assert float(result.logits[0].mean()) == pytest.approx(run["first_logits_mean"], abs=1e-3)
        best = result.logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).tolist() == pytest.approx(run["greedy_gap_per_step"], abs=2e-3)

    def test_eight_runs_of_two_checkpoints(self):
        assert [name for name, _ in RUNS] == [V15] * 4 + [V16] * 4

    def test_every_weight_has_its_recorded_place(self, v16):
        stored, state = load_file(TINY / V16 / "model.safetensors"), v16[1].state_dict()
        mapping = {name: target for name, target, _ in RECORDED["original_to_hf5"]}
        assert set(mapping) == set(stored)
        for name, value in stored.items():
            assert torch.equal(state[mapping[name]], value)

    def test_vision_weights_of_the_folder_fill_a_checkpoint_without_any(self, v15, v16):
        tower = load_file(CLIP / "model.safetensors")
        name = "embeddings.patch_embedding.weight"
        inside = next(value for key, value in tower.items() if key.endswith(name))
        assert torch.equal(v15[1].model.vision_tower.state_dict()[name], inside)
        assert not torch.equal(v16[1].model.vision_tower.state_dict()[name], inside)

    def test_the_source_of_the_vision_weights_is_logged(self, caplog):
        caplog.set_level(logging.INFO, "llava")
        for name in (V15, V16):
            load(TINY / name)
        assert [record.message.rpartition("/")[2] for record in caplog.records] == [CLIP.name, V16]

    def test_the_newline_belongs_to_unpad_only(self, v15, v16):
        assert "model.image_newline" in v16[1].state_dict() and "model.image_newline" not in v15[1].state_dict()
        assert v16[1].model.image_newline.abs().sum() > 0


class TestTokenizer:
    def test_class_comes_from_tokenizer_config(self, folder):
        tokenizer = load(folder())[0]
        assert type(tokenizer) is LlamaTokenizer
        # The generic class drops the mark in front of every text.
        assert "".join(tokenizer.convert_ids_to_tokens(tokenizer("the cat").input_ids)) == "<s>▁the▁cat"

    @pytest.mark.parametrize("name", ["LlamaTokenizerFast", None])
    def test_fast_and_absent_names(self, folder, name):
        path = folder()
        file = path / "tokenizer_config.json"
        fields = json.loads(file.read_text()) | {"tokenizer_class": name}
        file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
        assert load_tokenizer(str(path))("a cat").input_ids == load_tokenizer(str(TINY / V15))("a cat").input_ids

    def test_a_class_that_loses_word_boundaries_is_refused(self, folder, monkeypatch):
        """What a wrong class does to the same files."""
        monkeypatch.setattr(LlamaTokenizer, "convert_ids_to_tokens", lambda self, ids: ["A"])
        refusal(ValueError, folder(), "word boundary", "'A'")

    def test_missing_files(self, folder):
        path = folder()
        (path / "tokenizer.model").unlink()
        refusal(ValueError, path, str(path), "tokenizer")
        (path / "tokenizer_config.json").unlink()
        refusal(FileNotFoundError, path, "tokenizer_config.json")

    def test_broken_files(self, folder):
        path = folder()
        (path / "tokenizer.model").write_bytes(b"not a model")
        refusal(ValueError, path, "tokenizer files", str(path))

    def test_image_tokens_the_config_asks_for(self, folder):
        """The patch token is the default of a config without the field; it changes no answer."""
        path = folder(mm_use_im_patch_token=None, mm_use_im_start_end=True)
        tokenizer, model, *_ = loaded = load(path)
        assert tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [384, 385, 386]
        assert (
            model.model.embed_tokens.weight.shape[0] == model.lm_head.weight.shape[0] == model.config.vocab_size == 387
        )
        assert model.config.mm_use_im_start_end is True and model.config.image_token_id == 387
        answers_as_recorded(loaded)

    def test_no_image_tokens_otherwise(self, v15):
        assert len(v15[0]) == v15[1].config.vocab_size == v15[1].model.embed_tokens.weight.shape[0] == 384


class TestConfig:
    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("name", [V15, V16])
    def test_no_warnings(self, records, name):
        load(TINY / name)
        assert records == []

    @pytest.mark.parametrize("kind", ["llava", "llava_llama", None])
    def test_the_model_type_of_the_original_does_not_matter(self, folder, kind):
        loaded = load(folder(model_type=kind, architectures=None))
        assert type(loaded[1]) is LlavaLlamaForCausalLM and loaded[1].config.model_type == "llava"
        answers_as_recorded(loaded)

    @pytest.mark.parametrize(
        "fields",
        [{"model_type": "llava_mistral"}, {"model_type": "llava", "architectures": ["LlavaMistralForCausalLM"]}],
    )
    def test_mistral(self, folder, fields):
        """Without a window Mistral's layers are Llama's."""
        loaded = load(folder(**fields, sliding_window=None))
        assert type(loaded[1]) is LlavaMistralForCausalLM
        assert loaded[1].config.text_config.model_type == "mistral"
        answers_as_recorded(loaded)

    def test_rope_theta_reaches_the_decoder(self, folder):
        ids = torch.tensor([[1, 300, 340, 271]])
        with torch.no_grad():
            first, second = (
                load(folder(target=str(theta), rope_theta=theta))[1](input_ids=ids).logits for theta in (1e4, 1e6)
            )
        assert not torch.equal(first, second)

    def test_context_length(self, folder):
        assert load(TINY / V15)[3] == 2048
        assert load(folder(max_sequence_length=777))[3] == 777

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            (
                {"architectures": ["LlavaMPTForCausalLM"], "model_type": "llava_mpt"},
                ["LlavaMPTForCausalLM", "supported"],
            ),
            ({"architectures": ["LlavaQwenForCausalLM"]}, ["LlavaQwenForCausalLM", "LlavaLlamaForCausalLM"]),
            ({"s2": True, "s2_scales": "28,56"}, ["s2"]),
            ({"mm_projector_type": "resampler"}, ["mm_projector_type='resampler'", "mlp2x_gelu"]),
            ({"mm_vision_tower": ""}, ["names no vision tower", "vision_tower="]),
            ({"mm_vision_tower": "nowhere/clip"}, ["nowhere/clip", "mm_vision_tower", "vision_tower="]),
        ],
    )
    def test_what_is_not_supported(self, folder, fields, words):
        refusal(ValueError, folder(**fields), *words)

    def test_missing_and_broken_config(self, folder, tmp_path):
        refusal(FileNotFoundError, tmp_path / "nowhere", "nowhere", "does not exist", "--model-path")
        refusal(FileNotFoundError, "./llava/nowhere", "does not exist")
        refusal(FileNotFoundError, "some/deep/folder", "does not exist")
        path = folder()
        for text, words in (("{", ["not valid JSON"]), ("[1]", ["JSON object", "list"]), ("\x00", ["not valid JSON"])):
            (path / "config.json").write_text(text)
            refusal(ValueError, path, "config.json", *words)
        (path / "config.json").unlink()
        refusal(FileNotFoundError, path, "no config.json")


class TestVisionTower:
    def test_absolute(self, folder, tmp_path):
        path = folder(clip=False, mm_vision_tower=str(shutil.copytree(CLIP, tmp_path / "elsewhere" / "x")))
        answers_as_recorded(load(path))

    def test_relative_to_the_working_directory(self, folder, tmp_path, monkeypatch):
        shutil.copytree(CLIP, tmp_path / "cwd" / "models" / "clip")
        monkeypatch.chdir(tmp_path / "cwd")
        answers_as_recorded(load(folder(clip=False, mm_vision_tower="models/clip")))

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("clip", "llava-v1.5-tiny/clip"),
            ("towers/clip", "llava-v1.5-tiny/towers/clip"),
            ("clip", "clip"),
            ("towers/clip", "towers/clip"),
            ("openai/clip-vit-tiny", "openai/clip-vit-tiny"),
            ("openai/clip-vit-tiny", "clip-vit-tiny"),
            ("/data/model/clip-vit-tiny", "clip-vit-tiny"),
        ],
    )
    def test_near_the_checkpoint(self, folder, tmp_path, name, place):
        path = folder(clip=False, mm_vision_tower=name)
        shutil.copytree(CLIP, tmp_path / place)
        answers_as_recorded(load(path))

    def test_order(self, tmp_path, monkeypatch):
        """The working directory, inside the checkpoint, beside it, beside it by the last component."""
        checkpoint = tmp_path / "run" / "llava"
        places = [tmp_path / "cwd/a/clip", checkpoint / "a/clip", tmp_path / "run/a/clip", tmp_path / "run/clip"]
        for place in places:
            place.mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "cwd")
        for place in reversed(places):
            (place / "config.json").write_text("{}")
            assert Path(resolve_vision_tower("a/clip", checkpoint)).resolve() == place.resolve()

    def test_a_folder_without_config_is_passed_over(self, tmp_path):
        (tmp_path / "llava" / "clip").mkdir(parents=True)
        (tmp_path / "clip").mkdir()
        (tmp_path / "clip" / "config.json").write_text("{}")
        assert resolve_vision_tower("clip", tmp_path / "llava") == str(tmp_path / "clip")

    def test_override_wins(self, folder, tmp_path):
        path = folder(mm_vision_tower=str(FULL_CLIP), clip=True)
        answers_as_recorded(load(path, vision_tower=str(tmp_path / CLIP.name)))
        refusal(ValueError, path, "'nowhere'", "CLIP", vision_tower="nowhere")

    @pytest.mark.parametrize(
        "name", ["openai/clip-vit-large-patch14-336", "laion/CLIP-ViT", "Lin-Chen/ShareGPT4V-7B_x"]
    )
    def test_hub_ids_stay_as_they_are(self, tmp_path, name):
        assert resolve_vision_tower(name, tmp_path) == name == resolve_vision_tower("x", tmp_path, override=name)

    @pytest.mark.parametrize("name", ["google/siglip", "/openai/clip", "./openai/clip", "clip", "openai"])
    def test_what_is_no_hub_id_must_exist(self, tmp_path, name):
        with pytest.raises(ValueError) as caught:
            resolve_vision_tower(name, tmp_path)
        looked = str(caught.value).partition("looked for: ")[2].partition(". Put")[0].split(", ")
        assert str(tmp_path.parent / Path(name).name) in looked and len(set(looked)) == len(looked)
        assert repr(name) in str(caught.value) and "vision_tower=" in str(caught.value)

    @pytest.mark.parametrize(("kind", "parts"), [("bin", 1), ("bin", 3), ("safetensors", 3), ("old bin", 1)])
    def test_kinds_of_files(self, folder, tmp_path, kind, parts):
        path = folder()
        shard(tmp_path / CLIP.name, kind, parts)
        answers_as_recorded(load(path))

    def test_a_full_clip_folder(self, folder, tmp_path):
        """`clip` config with text and vision sides, old image processor fields, weights in a .bin."""
        path = folder(mm_vision_tower=str(FULL_CLIP), mm_hidden_size=32)
        edit_weights(path, lambda weights: weights | {"model.mm_projector.0.weight": torch.zeros(32, 32)})
        _, model, processor, _ = load(path)
        stored = torch.load(FULL_CLIP / "pytorch_model.bin", weights_only=True)
        state = model.model.vision_tower.state_dict()
        for name, value in state.items():
            if not name.endswith("position_ids"):
                assert torch.equal(value, stored[f"vision_model.{name.removeprefix('vision_model.')}"])
        assert (model.get_vision_tower().num_patches, processor.crop_size["height"]) == (576, 336)

    def test_standing_alone(self):
        class Config:
            mm_vision_tower, mm_vision_select_layer = str(CLIP), -1

        tower = build_vision_tower(Config())
        assert tower(torch.zeros(1, 3, 28, 28)).shape == (1, 4, 16) and tower.select_layer == -1
        assert tower.image_processor.crop_size["height"] == 28

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda clip: (clip / "model.safetensors").unlink(), ["neither", "pytorch_model.bin"]),
            (
                lambda clip: (clip / "model.safetensors").write_bytes(b"nothing"),
                ["cannot be read", "model.safetensors"],
            ),
            (lambda clip: edit_weights(clip, lambda all: dict(list(all.items())[:9])), ["lacks", "for example"]),
            (
                lambda clip: edit_weights(
                    clip, lambda all: {k: v[:2] if "pre_layrnorm" in k else v for k, v in all.items()}
                ),
                ["pre_layrnorm", "(2,)", "(16,)"],
            ),
            (lambda clip: (clip / "config.json").write_text('{"model_type": "bert"}'), ["'bert'", "CLIP"]),
            (lambda clip: (clip / "config.json").write_text("{"), ["config.json", "cannot be read"]),
        ],
        ids=["no weights", "broken weights", "missing weights", "other shapes", "other model", "broken config"],
    )
    def test_damaged(self, folder, tmp_path, damage, words):
        path = folder()
        damage(tmp_path / CLIP.name)
        refusal(ValueError, path, CLIP.name, *words)

    def test_without_image_processor(self, folder, tmp_path):
        path = folder()
        (tmp_path / CLIP.name / "preprocessor_config.json").unlink()
        refusal(FileNotFoundError, path, CLIP.name, "preprocessor_config.json")

    def test_half_a_tower_inside_the_checkpoint_is_not_completed_silently(self, folder):
        path = folder(V16)
        edit_weights(path, lambda all: {k: v for k, v in all.items() if "layers.1.layer_norm1.bias" not in k})
        refusal(ValueError, path, "1 missing", "layers.1.layer_norm1.bias")


class TestWeights:
    @pytest.mark.parametrize(("kind", "parts"), [("bin", 1), ("bin", 2), ("safetensors", 3), ("old bin", 1)])
    @pytest.mark.parametrize("name", [V15, V16])
    def test_kinds_of_files(self, folder, name, kind, parts):
        path = folder(name)
        shard(path, kind, parts)
        answers_as_recorded(load(path), name)

    def test_half_weights_are_float32_on_a_cpu(self, folder):
        path = folder(torch_dtype="float16")
        edit_weights(path, lambda all: {name: value.half() for name, value in all.items()})
        _, model, *_ = load(path)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        stored = load_file(path / "model.safetensors")["lm_head.weight"]
        assert torch.equal(model.lm_head.weight, stored.float())

    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "bfloat16"], ids=str)
    def test_dtype(self, name, dtype):
        loaded = load(TINY / V15, **{name: dtype})
        expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        assert {parameter.dtype for parameter in loaded[1].parameters()} == {expected} == {loaded[1].dtype}
        assert len(answer(loaded, recorded(V15)).new) > 0

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("name", [V15, V16])
    def test_attention(self, name, attention):
        loaded = load(TINY / name, attn_implementation=attention)
        config = loaded[1].config
        for part in (config, config.text_config, config.vision_config):
            assert part._attn_implementation == attention
        answers_as_recorded(loaded, name)

    def test_flash_attention_is_handed_on(self):
        with pytest.raises((ImportError, ValueError), match="(?i)flash"):
            load(TINY / V15, use_flash_attn=True)

    @pytest.mark.parametrize(
        "options",
        [
            {"device": "cpu"},
            {"device_map": {"": "cpu"}},
            {"device_map": "cpu"},
            {"device_map": {"model": "cpu", "lm_head": "cpu"}},
            {"device_map": {"": torch.device("cpu")}},
            pytest.param({}, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="loads on the GPU")),
            pytest.param(
                {"device_map": "cuda:0"}, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="loads on the GPU")
            ),
        ],
        ids=str,
    )
    def test_devices(self, options):
        loaded = load_pretrained_model(str(TINY / V15), None, "llava", False, False, **options)
        assert {parameter.device.type for parameter in loaded[1].parameters()} == {"cpu"}
        assert loaded[1].dtype == torch.float32 and loaded[1].device.type == "cpu"
        answers_as_recorded(loaded)

    def test_parts_on_disk(self, tmp_path):
        """Decoder layers may be offloaded; a tower that is cannot be filled, which must not pass silently."""
        places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
        places |= {"model.language_model": "disk"}
        load_on = dict(offload_folder=str(tmp_path / "offload"))
        loaded = load_pretrained_model(str(TINY / V15), None, "llava", device_map=places, **load_on)
        answers_as_recorded(loaded)
        places["model.vision_tower"] = "disk"
        with pytest.raises(ValueError, match="offloaded by device_map"):
            load_pretrained_model(str(TINY / V15), None, "llava", device_map=places, **load_on)

    def test_arguments_other_tools_pass(self):
        answers_as_recorded(load(TINY / V15, llm_pruning=True, multimodal=True))

    def test_the_model_is_ready_for_inference(self, v15):
        assert not v15[1].training

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_weights_are_never_held_twice(self, folder, monkeypatch, kind):
        """The model is built without storage, and files are mapped into memory, not read as a whole."""
        path = folder()
        for place in (path, path.parent / CLIP.name):
            shard(place, kind, 2)
        built, reads = [], []
        own_init, own_load = LlavaLlamaForCausalLM.__init__, torch.load

        def init(self, *args, **kwargs):
            own_init(self, *args, **kwargs)
            built.extend(parameter.device.type for parameter in self.parameters())

        def read(*args, **kwargs):
            reads.append(kwargs.get("mmap") is True or kwargs.get("map_location") == "meta")
            return own_load(*args, **kwargs)

        def whole(*args, **kwargs):
            raise AssertionError("a file was read as a whole")

        monkeypatch.setattr(LlavaLlamaForCausalLM, "__init__", init)
        monkeypatch.setattr(torch, "load", read)
        monkeypatch.setattr("safetensors.torch.load_file", whole)
        monkeypatch.setattr("safetensors.torch.load", whole)
        answers_as_recorded(load(path))
        assert set(built) == {"meta"} and (kind == "safetensors" or (len(reads) >= 4 and all(reads)))


class TestDamagedWeights:
    @pytest.mark.parametrize(
        ("edit", "words"),
        [
            (lambda all: {k: v for k, v in all.items() if k != "lm_head.weight"}, ["1 missing", "lm_head.weight"]),
            (lambda all: {k: v for k, v in all.items() if "mm_projector.0" not in k}, ["2 missing", "projector"]),
            (lambda all: {k: v for k, v in all.items() if "layers.1." not in k}, ["9 missing"]),
            (lambda all: all | {"model.extra.weight": torch.zeros(2)}, ["1 unknown", "model.extra.weight"]),
            (lambda all: all | {"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}, ["1 unknown", "layers.2"]),
            (
                lambda all: all | {"model.norm.weight": torch.ones(31)},
                ["1 of another shape", "model.language_model.norm"],
            ),
            (
                lambda all: all | {"model.embed_tokens.weight": torch.ones(9, 32)},
                ["1 of another shape", "embed_tokens"],
            ),
        ],
    )
    def test_they_do_not_fit(self, folder, edit, words):
        path = folder()
        edit_weights(path, edit)
        refusal(ValueError, path, str(path), "do not fit", *words)

    def test_buffers_of_old_versions_do_not_matter(self, folder):
        path = folder()
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        edit_weights(path, lambda all: all | extra)
        answers_as_recorded(load(path))

    def test_a_newline_without_unpad_is_unknown(self, folder):
        refusal(ValueError, folder(V16, mm_patch_merge_type="spatial"), "1 unknown", "image_newline")

    def test_unpad_without_a_newline_is_missing(self, folder):
        refusal(ValueError, folder(mm_patch_merge_type="spatial_unpad"), "1 missing", "image_newline")

    def test_no_weights(self, folder):
        path = folder()
        (path / "model.safetensors").unlink()
        refusal(ValueError, path, str(path), "weights")

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_a_missing_shard(self, folder, kind):
        path = folder()
        shard(path, kind, 2)
        next(path.glob(f"*-00002-of-00002.{kind}")).unlink()
        refusal(ValueError, path, "00002-of-00002", "cannot be read")

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_a_truncated_file(self, folder, kind):
        path = folder()
        shard(path, kind, 1)
        file = next(path.glob(f"*.{kind}"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        refusal(ValueError, path, str(path), "cannot be read")


class TestGenerationConfig:
    def test_sampling_values_are_reset(self, v15, tmp_path):
        stored = json.loads((TINY / V15 / "generation_config.json").read_text())
        assert stored["temperature"] == 0.9 and "do_sample" not in stored
        config = v15[1].generation_config
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
        assert not config.do_sample and config.temperature in (None, 1.0) and config.top_p in (None, 1.0)
        v15[1].save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "generation_config.json").is_file()

    @pytest.mark.parametrize("end", [7, [2, 7]])
    def test_its_own_end_token_wins(self, folder, end):
        """Chat models end a turn with another token than the base model's."""
        path = folder()
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "bos_token_id": 1}))
        assert load(path)[1].generation_config.eos_token_id == end

    def test_without_the_file(self, folder):
        path = folder(pad_token_id=-1)
        (path / "generation_config.json").unlink()
        config = load(path)[1].generation_config
        assert (config.eos_token_id, config.pad_token_id) == (2, 2)


def save(loaded, path: Path, model=None) -> Path:
    """Save as transformers does: model, tokenizer, image processor."""
    (model or loaded[1]).save_pretrained(path)
    loaded[0].save_pretrained(path)
    loaded[2].save_pretrained(path)
    return path


def same_logits(first, second, run: dict) -> None:
    """Same weights, same answer, same logits to the bit."""
    states = first[1].state_dict(), second[1].state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for _, model, *_ in (first, second):
        for parameter in model.parameters():
            # Weights lie where the file has them; how they are aligned decides the last bit of a product.
            parameter.data = parameter.data.clone()
    one, two = answer(first, run), answer(second, run)
    assert (one.ids, one.new) == (two.ids, two.new) and torch.equal(one.logits, two.logits)


class TestHuggingFaceLayout:
    @pytest.mark.parametrize("name", [V15, V16])
    def test_round_trip(self, tmp_path, records, name):
        first = load(TINY / name)
        second = load(save(first, tmp_path / "saved"))
        assert records == []
        same_logits(first, second, recorded(name))
        third = load(save(second, tmp_path / "again"))
        same_logits(first, third, recorded(name))

    def test_what_is_saved_is_a_transformers_checkpoint(self, v15, tmp_path):
        path = save(v15, tmp_path / "saved")
        model, info = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        state = v15[1].state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("size", ["10GB", "60KB"])
    def test_a_checkpoint_written_by_transformers(self, v15, tmp_path, size):
        """Under the names of the public conversions (`language_model.model.*`), with nothing of the original config."""
        config = LlavaConfig(
            vision_config=v15[1].config.vision_config, text_config=v15[1].config.text_config, vision_feature_layer=-2,
            image_token_index=383,
        )  # fmt: skip
        model = LlavaForConditionalGeneration(config)
        model.load_state_dict(v15[1].state_dict())
        path = tmp_path / "hf"
        model.save_pretrained(path, max_shard_size=size)
        v15[0].save_pretrained(path)
        v15[2].save_pretrained(path)
        written = set(load_file(next(path.glob("*.safetensors"))))
        assert any(name.startswith(("language_model.model.", "vision_tower.")) for name in written)
        assert "mm_vision_tower" not in read_config(str(path))
        loaded = load(path)
        same_logits(v15, loaded, recorded(V15))
        config = loaded[1].config
        assert (config.image_aspect_ratio, config.mm_projector_type, config.mm_hidden_size) == ("pad", "mlp2x_gelu", 16)
        assert (config.mm_vision_select_layer, config.mm_vision_select_feature) == (-2, "patch")
        assert (config.mm_use_im_start_end, config.mm_use_im_patch_token) == (False, False)

    def test_the_whole_of_the_features(self, v15, tmp_path):
        path = save(v15, tmp_path / "hf")
        fields = read_config(str(path)) | {"vision_feature_select_strategy": "full"}
        fields = {name: value for name, value in fields.items() if not name.startswith("mm_")}
        (path / "config.json").write_text(json.dumps(fields))
        model = load(path)[1]
        assert model.encode_images(torch.zeros(1, 3, 28, 28)).shape[1] == 5

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"model_type": "idefics3"}, ["'idefics3'", "supported"]),
            ({"vision_feature_layer": [-2, -3]}, ["vision_feature_layer=[-2, -3]"]),
        ],
    )
    def test_what_is_not_supported(self, v15, tmp_path, fields, words):
        path = save(v15, tmp_path / "hf")
        (path / "config.json").write_text(json.dumps(read_config(str(path)) | fields))
        refusal(ValueError, path, *words)

    def test_a_missing_weight(self, v15, tmp_path):
        path = save(v15, tmp_path / "hf")
        edit_weights(path, lambda all: {k: v for k, v in all.items() if "patch_embedding" not in k})
        refusal(ValueError, path, "1 missing", "patch_embedding")

    def test_no_auto_model(self, v15, tmp_path, monkeypatch):
        """The classes are chosen here; what AutoModel makes of a model type is not asked for."""
        path = save(v15, tmp_path / "hf")

        def refuse(*args, **kwargs):
            raise AssertionError("an AutoModel class was used")

        for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel", "AutoTokenizer"):
            monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
        answers_as_recorded(load(path))
        answers_as_recorded(load(TINY / V15))


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu", "identity"])
def test_projectors(folder, kind):
    """Every kind gets its weights, and maps features as they say."""
    depth = {"linear": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3, "identity": 0}[kind]
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 16), (32, 32), (32, 32)][:depth]
    layers = [(torch.randn(shape, generator=generator), torch.randn(32, generator=generator)) for shape in shapes]

    def edit(weights):
        weights = {name: value for name, value in weights.items() if "mm_projector" not in name}
        for index, (weight, bias) in enumerate(layers):
            number = "" if kind == "linear" else f"{2 * index}."
            weights |= {f"model.mm_projector.{number}weight": weight, f"model.mm_projector.{number}bias": bias}
        return weights

    path = folder(mm_projector_type=kind)
    edit_weights(path, edit)
    features = expected = torch.randn(3, 16, generator=generator)
    for index, (weight, bias) in enumerate(layers):
        expected = torch.nn.functional.gelu(expected) if index else expected
        expected = expected @ weight.T + bias
    torch.testing.assert_close(load(path)[1].model.mm_projector(features), expected)


class TestTrainedParts:
    """Checkpoints that complete a base language model."""

    @pytest.fixture
    def base(self, folder) -> Path:
        """A plain language model: the tiny checkpoint without its projector."""
        path = folder(target="vicuna-tiny", model_type="llama", architectures=["LlamaForCausalLM"])
        fields = {k: v for k, v in read_config(str(path)).items() if not k.startswith(("mm_", "image_"))}
        (path / "config.json").write_text(json.dumps(fields))
        edit_weights(path, lambda all: {k: v for k, v in all.items() if "mm_projector" not in k})
        return path

    @pytest.fixture
    def parts(self, folder) -> Callable[..., Path]:
        """`parts(name, {file: weights}, **config fields)`: config.json and some files, no whole model, no tokenizer."""

        def make(files: dict[str, dict], name: str = "llava-lora-tiny", adapter: dict | None = None, **fields) -> Path:
            path = folder(target=name, **fields)
            for file in ("model.safetensors", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
                (path / file).unlink()
            for file, weights in files.items():
                save_file(weights, path / file) if file.endswith("safetensors") else torch.save(weights, path / file)
            if adapter is not None:
                (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | adapter))
            return path

        return make

    @staticmethod
    def projector(prefix: str = "") -> dict:
        weights = load_file(TINY / V15 / "model.safetensors")
        return {prefix + name: value for name, value in weights.items() if "mm_projector" in name}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_projector_only(self, base, parts, dtype):
        weights = {name: value.to(dtype) for name, value in self.projector().items()}
        loaded = load(parts({"mm_projector.bin": weights}), model_base=str(base))
        assert torch.equal(loaded[1].model.mm_projector.linear_1.weight, weights["model.mm_projector.0.weight"].float())
        if dtype == torch.float32:
            answers_as_recorded(loaded)

    def test_projector_on_a_base_in_the_hugging_face_layout(self, v15, parts, tmp_path):
        path = save(v15, tmp_path / "hf")
        changed = {name: value + 1 for name, value in self.projector().items()}
        model = load(parts({"mm_projector.bin": changed}), model_base=str(path))[1]
        assert torch.equal(model.model.mm_projector.linear_2.bias, changed["model.mm_projector.2.bias"])
        assert torch.equal(model.lm_head.weight, v15[1].lm_head.weight)

    # (adapter file, prefix of its names, adapter_config, what scaling they mean for alpha 6 and rank 4)
    ADAPTERS = [
        ("adapter_model.bin", "base_model.model.", {"lora_alpha": 6, "r": 4}, 6 / 4),
        ("adapter_model.safetensors", "base_model.model.", {"lora_alpha": 6, "r": 4, "use_rslora": True}, 6 / 2),
        ("adapter_model.bin", "", {"lora_alpha": 6, "r": 4, "fan_in_fan_out": True}, 6 / 4),
        ("adapter_model.bin", "base_model.model.", {"lora_alpha": 1, "r": 64, "alpha_pattern": {"q_proj": 6}}, 6 / 4),
    ]

    @staticmethod
    def lora(modules: dict[str, tuple[int, int]], prefix: str, infix: str = "") -> dict:
        generator = torch.Generator().manual_seed(1)
        weights = {}
        for module, (rows, columns) in modules.items():
            weights[f"{prefix}{module}.lora_A{infix}.weight"] = torch.randn(4, columns, generator=generator)
            weights[f"{prefix}{module}.lora_B{infix}.weight"] = torch.randn(rows, 4, generator=generator)
        return weights

    @pytest.mark.parametrize(("file", "prefix", "adapter", "scaling"), ADAPTERS)
    def test_lora(self, base, parts, file, prefix, adapter, scaling):
        module = "model.layers.1.self_attn.q_proj"
        weights = self.lora({module: (32, 32)}, prefix, ".default" if prefix == "" else "")
        before = (base / "model.safetensors").read_bytes()
        files = {file: weights, "non_lora_trainables.bin": self.projector(prefix)}
        loaded = load(parts(files, adapter=adapter), model_base=str(base))
        state, plain = loaded[1].state_dict(), load(TINY / V15)[1].state_dict()
        inner, outer = weights.values()
        delta = scaling * (outer.double() @ inner.double())
        delta = delta.T if adapter.get("fan_in_fan_out") else delta
        key = "model.language_model.layers.1.self_attn.q_proj.weight"
        torch.testing.assert_close(state[key].double(), plain[key].double() + delta, atol=1e-5, rtol=0)
        assert all(torch.equal(value, plain[name]) for name, value in state.items() if name != key)
        assert (base / "model.safetensors").read_bytes() == before

    def test_lora_equals_the_merged_checkpoint(self, base, parts, folder):
        """All layers of decoder, projector and tower; the answer is that of a checkpoint merged beforehand."""
        modules = {
            "model.layers.0.self_attn.k_proj": (32, 32),
            "model.layers.0.mlp.down_proj": (32, 48),
            "model.layers.1.mlp.gate_proj": (48, 32),
            "model.mm_projector.2": (32, 32),
            "lm_head": (384, 32),
        }
        tower = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
        weights = {name: value / 20 for name, value in self.lora(modules | {tower: (32, 16)}, "").items()}
        adapter = {"adapter_model.bin": {f"base_model.model.{name}": value for name, value in weights.items()}}
        adapter["non_lora_trainables.bin"] = self.projector("base_model.model.")
        loaded = load(parts(adapter, adapter={"r": 4, "lora_alpha": 8}), model_base=str(base))

        def delta(module):
            return 2 * weights[f"{module}.lora_B.weight"] @ weights[f"{module}.lora_A.weight"]

        merged = folder(target="merged")
        edit_weights(merged, lambda all: all | {f"{m}.weight": all[f"{m}.weight"] + delta(m) for m in modules})
        own = load_file(CLIP / "model.safetensors")
        name = next(key for key in own if key.endswith("encoder.layers.0.mlp.fc1.weight"))
        edit_weights(merged.parent / CLIP.name, lambda all: all | {name: all[name] + delta(tower)})
        expected = answer(load(merged), recorded(V15))
        result = answer(loaded, recorded(V15))
        assert result.new == expected.new != recorded(V15)["new_token_ids"]
        torch.testing.assert_close(result.logits, expected.logits, atol=1e-4, rtol=0)

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    @pytest.mark.parametrize("rank_stabilised", [False, True])
    def test_lora_equals_what_peft_merges(self, base, parts, rank_stabilised):
        """An adapter that peft made and saved: ranks and alphas of its own for some layers."""
        peft = pytest.importorskip("peft", reason="the extra `test` has it")
        config = peft.LoraConfig(
            r=4, lora_alpha=6, use_rslora=rank_stabilised, target_modules=["q_proj", "k_proj", "up_proj"],
            rank_pattern={"layers.1.mlp.up_proj": 2}, alpha_pattern={"k_proj": 3, "0.mlp.up_proj": 9},
            init_lora_weights=False,
        )  # fmt: skip
        path = parts({"non_lora_trainables.bin": self.projector("base_model.model.")})
        theirs = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config)
        theirs.save_pretrained(path)
        merged = theirs.merge_and_unload().state_dict()
        state, plain = load(path, model_base=str(base))[1].state_dict(), load(TINY / V15)[1].state_dict()
        changed = 0
        for name, value in merged.items():
            key = name.replace("model.", "model.language_model.")
            torch.testing.assert_close(state[key], value, atol=1e-6, rtol=0)
            changed += not torch.equal(value, plain[key])
        assert changed == 6  # three layers of two blocks

    def test_lora_without_trained_projector_takes_the_bases(self, parts, folder):
        """A base that is a LLaVA itself."""
        base = folder(target="llava-base")
        files = {"adapter_model.bin": self.lora({"model.layers.0.mlp.up_proj": (48, 32)}, "base_model.model.")}
        files["adapter_model.bin"] = {name: value * 0 for name, value in files["adapter_model.bin"].items()}
        answers_as_recorded(load(parts(files, adapter={"r": 4}), model_base=str(base)))

    def test_embeddings_of_another_size_come_from_the_trained_parts(self, base, parts):
        rows = {"model.embed_tokens.weight": torch.ones(386, 32), "lm_head.weight": torch.ones(386, 32)}
        trained = {f"base_model.model.{name}": value for name, value in rows.items()}
        files = {"non_lora_trainables.bin": trained | self.projector("base_model.model.")}
        files["adapter_model.bin"] = self.lora({"model.layers.0.mlp.up_proj": (48, 32)}, "base_model.model.")
        adapter = {"r": 4, "lora_alpha": 4}
        model = load(parts(files, adapter=adapter, vocab_size=386), model_base=str(base))[1]
        assert torch.equal(model.lm_head.weight, torch.ones(386, 32)) and model.config.vocab_size == 386
        short = {"non_lora_trainables.bin": self.projector("base_model.model.")}
        path = parts(short | {"adapter_model.bin": files["adapter_model.bin"]}, "short", adapter, vocab_size=386)
        refusal(ValueError, path, "2 of another shape", model_base=str(base))

    @pytest.mark.parametrize(
        ("weights", "adapter", "words"),
        [
            ({"model.layers.0.q.lora_A.weight": torch.zeros(4, 32)}, {}, ["lora_A", "lora_B"]),
            ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, {}, ["lora_B"]),
            ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, {}, ["q_proj.bias", "cannot be merged"]),
            ({"model.embed_tokens.lora_embedding_A": torch.zeros(4, 32)}, {}, ["lora_embedding_A"]),
            ({}, {"use_dora": True}, ["DoRA"]),
            ({}, {"peft_type": "LOHA"}, ["LOHA"]),
            (
                {
                    "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 16),
                    "model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(32, 4),
                },
                {},
                ["(32, 16)", "(32, 32)"],
            ),
        ],
    )
    def test_adapters_that_do_not_fit(self, base, parts, weights, adapter, words):
        files = {"adapter_model.bin": {f"base_model.model.{name}": value for name, value in weights.items()}}
        files["non_lora_trainables.bin"] = self.projector("base_model.model.")
        refusal(ValueError, parts(files, adapter=adapter), "llava-lora-tiny", *words, model_base=str(base))

    @pytest.mark.parametrize(
        ("weights", "words"),
        [
            ({"model.mm_projector.4.weight": torch.zeros(32, 32)}, ["mm_projector.4", "unknown"]),
            ({"model.mm_projector.0.weight": torch.zeros(8, 16)}, ["(8, 16)", "(32, 16)"]),
        ],
    )
    def test_projectors_that_do_not_fit(self, base, parts, weights, words):
        path = parts({"mm_projector.bin": self.projector() | weights})
        refusal(ValueError, path, "llava-lora-tiny", *words, model_base=str(base))

    def test_an_incomplete_projector(self, base, parts):
        weights = {name: value for name, value in self.projector().items() if "0.bias" not in name}
        refusal(ValueError, parts({"mm_projector.bin": weights}), "1 missing", "linear_1.bias", model_base=str(base))

    def test_a_base_that_is_missing(self, base, parts):
        projector_only = parts({"mm_projector.bin": self.projector()}, "projector-only")
        refusal(ValueError, projector_only, "--model-base", "trained parts")
        refusal(FileNotFoundError, projector_only, "nowhere", model_base="./nowhere")
        lora = parts({"adapter_model.bin": {}}, adapter={"r": 4})
        refusal(ValueError, lora, "--model-base", "trained parts")

    def test_a_base_that_nothing_completes(self, base, folder):
        refusal(ValueError, folder(), "mm_projector.bin", "--model-base", model_base=str(base))


class TestQuantisation:
    @pytest.fixture
    def no_reading(self, monkeypatch):
        """Reading any weight or config fails the test."""

        def refuse(*args, **kwargs):
            raise AssertionError("the checkpoint was read")

        monkeypatch.setattr(LlavaLlamaForCausalLM, "from_pretrained", refuse)
        monkeypatch.setattr("llava.model.builder.read_config", refuse)

    @pytest.mark.parametrize("name", ["load_8bit", "load_4bit"])
    def test_without_bitsandbytes(self, monkeypatch, no_reading, name):
        import importlib.util

        own = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda module, *rest: None if module == "bitsandbytes" else own(module, *rest)
        )
        refusal(ImportError, TINY / V15, name, "bitsandbytes", **{name: True})

    def test_one_of_both(self, no_reading):
        refusal(ValueError, TINY / V15, "load_8bit", "load_4bit", load_8bit=True, load_4bit=True)

    def test_they_are_positional_too(self):
        """Scripts pass them as the fourth and fifth argument."""
        with pytest.raises(ValueError, match="exclude each other"):
            load_pretrained_model(str(TINY / V15), None, "llava", True, True)


def test_a_plain_language_model(tmp_path, folder):
    path = folder(model_type="llama", architectures=["LlamaForCausalLM"], clip=False)
    fields = {k: v for k, v in read_config(str(path)).items() if not k.startswith(("mm_", "image_"))}
    (path / "config.json").write_text(json.dumps(fields))
    edit_weights(path, lambda all: {k: v for k, v in all.items() if "mm_projector" not in k})
    tokenizer, model, processor, length = load(path)
    assert type(model).__name__ == "LlamaForCausalLM" and processor is None and length == 2048
    assert tokenizer("A").input_ids[0] == 1 and not model.training


def test_open_checkpoint_reads_no_weights(monkeypatch):
    opened = []
    own = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda file, *rest, **kw: (opened.append(str(file)), own(file, *rest, **kw))[1]
    )
    checkpoint = open_checkpoint(str(TINY / V16), read_config(str(TINY / V16)))
    assert checkpoint.vision_tower == str(CLIP) and math.isclose(checkpoint.config.text_config.rms_norm_eps, 1e-5)
    assert not any(name.endswith((".safetensors", ".bin")) for name in opened)
