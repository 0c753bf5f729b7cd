"""Checkpoints in both layouts through `load_pretrained_model`: recorded answers, the known traps, what is refused."""

import builtins
import json
import logging
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_checkpoints import (
    CLIP,
    RECORDED,
    TINY,
    V15,
    V16,
    answer,
    answers_as_recorded,
    edit_weights,
    load,
    recorded,
    refusal,
    same_logits,
    save,
)
from transformers import LlamaTokenizer, LlavaConfig, LlavaForConditionalGeneration

from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import load_tokenizer, open_checkpoint, read_config

RUNS = [
    (checkpoint["dir"], index) for checkpoint in RECORDED["checkpoints"] for index in range(len(checkpoint["runs"]))
]


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
