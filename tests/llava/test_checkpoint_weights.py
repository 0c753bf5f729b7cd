"""The vision tower's folder and the weights of a checkpoint: where and how they may lie, and damage to them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import (
    CLIP,
    FULL_CLIP,
    TINY,
    V15,
    V16,
    answer,
    answers_as_recorded,
    edit_weights,
    load,
    recorded,
    refusal,
    shard,
)

from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_vision_tower, resolve_vision_tower


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
