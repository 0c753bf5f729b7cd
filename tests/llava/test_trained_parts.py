"""Checkpoints that complete a base language model: projectors and LoRA adapters."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    CLIP,
    TINY,
    V15,
    answer,
    answers_as_recorded,
    edit_weights,
    load,
    recorded,
    refusal,
    save,
)

from llava.model.checkpoint import read_config


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
