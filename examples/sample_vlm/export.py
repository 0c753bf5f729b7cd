"""Export to the original LLaVA-1.5 layout: decoder, projector and tokenizer in one folder, the CLIP tower beside it.

    python -m examples.sample_vlm.export --out data/sample/model                         # random weights
    python -m examples.sample_vlm.export --checkpoint runs/sample_vlm/small/last.pt      # trained weights

config.json carries one key of our own, `sample_weights`: "random" or "trained". A score of random weights means
nothing, and programs can say so.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from examples.sample_vlm import tokenizer
from examples.sample_vlm.data import load_tokenizer, prefix_ids
from examples.sample_vlm.model import PIXEL_MEAN, PIXEL_STD, SIZES, ModelSize, SampleVlm
from examples.sample_vlm.scenes import CANVAS, PATCH

MODEL_NAME = "llava-v1.5-sample"
TOWER_NAME = "clip-sample-patch14-336"
_DECODER_FIELDS = (
    "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/sample/model"))
    parser.add_argument("--checkpoint", type=Path, help="training checkpoint; random weights without it")
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="of the random weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        torch.manual_seed(args.seed)
        model = new_model(SIZES[args.size])
    else:
        model = load_checkpoint(args.checkpoint)
    export(model, args.out, trained=args.checkpoint is not None)
    total = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {total / 1e6:.1f} MB")


def new_model(size: ModelSize) -> SampleVlm:
    """A model with random weights; seed torch first."""
    vocabulary = load_tokenizer()
    return SampleVlm(size, len(vocabulary), prefix_ids(vocabulary))


def load_checkpoint(path: str | Path) -> SampleVlm:
    """The model of a training checkpoint, on the CPU in fp32."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = new_model(ModelSize(**state["size"]))
    model.load_state_dict(state["model"])
    return model


def export(model: SampleVlm, out: Path, trained: bool) -> None:
    """Write both folders under `out`; existing files are overwritten."""
    model_folder, tower_folder = out / MODEL_NAME, out / TOWER_NAME
    tokenizer.build(model_folder)
    tower_folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(_language_tensors(model), model_folder / "model.safetensors")
    _save_tensors(_tower_tensors(model), tower_folder / "model.safetensors")
    _write_json(model_folder / "config.json", _model_config(model, trained))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.31.0"}
    _write_json(model_folder / "generation_config.json", {"_from_model_config": True, **generation})
    _write_json(tower_folder / "config.json", _tower_config(model))
    _write_json(tower_folder / "preprocessor_config.json", _preprocessor_config())


def _language_tensors(model: SampleVlm) -> dict[str, torch.Tensor]:
    """Decoder, head and projector under LLaVA's original names."""
    tensors = {f"model.{name}": t for name, t in model.llm.state_dict().items()}
    tensors |= {f"model.mm_projector.{name}": t for name, t in model.projector.state_dict().items()}
    return tensors | {"lm_head.weight": model.lm_head.weight}


def _tower_tensors(model: SampleVlm) -> dict[str, torch.Tensor]:
    """The tower under CLIP's names on disk, which newer transformers shorten in memory."""
    state = model.tower.state_dict().items()
    return {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in state}


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """fp16 safetensors."""
    half = {name: t.detach().to(torch.float16).contiguous() for name, t in tensors.items()}
    save_file(half, path, metadata={"format": "pt"})


def _model_config(model: SampleVlm, trained: bool) -> dict:
    """config.json with the keys of the published LLaVA-1.5 checkpoints."""
    text = {name: getattr(model.llm.config, name) for name in _DECODER_FIELDS}
    fields = text | {
        "_name_or_path": MODEL_NAME, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava",
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "max_length": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "pretraining_tp": 1,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "use_cache": True,
        "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False, "image_aspect_ratio": "pad",
        "mm_hidden_size": model.size.tower_hidden, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "use_mm_proj": True,
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "mm_vision_tower": TOWER_NAME,
        "sample_weights": "trained" if trained else "random",
        "torch_dtype": "float16", "transformers_version": "4.31.0",
    }  # fmt: skip
    return dict(sorted(fields.items()))


def _tower_config(model: SampleVlm) -> dict:
    """config.json of a CLIP vision model."""
    size = model.size
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": size.tower_hidden,
        "image_size": CANVAS,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": size.tower_mlp,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": size.tower_heads,
        "num_channels": 3,
        "num_hidden_layers": size.tower_layers,
        "patch_size": PATCH,
        "projection_dim": size.tower_hidden,
        "torch_dtype": "float16",
    }


def _preprocessor_config() -> dict:
    """CLIP's image processor at 336 pixels."""
    return {
        "crop_size": CANVAS,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "resample": 3,
        "size": CANVAS,
    }


def _write_json(path: Path, content: dict) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
