"""Put the frozen parts and the trained ones together: an ordinary transformers folder with processor and model card."""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from examples.sample_vlm.real import wheels
from examples.sample_vlm.real.base import load_base
from examples.sample_vlm.real.chat import CHAT_TEMPLATE, IMAGE_TOKEN
from examples.sample_vlm.real.model import GRID, PIXEL_MEAN, PIXEL_STD, LoraLinear, RealVlm
from examples.sample_vlm.real.train import load_trained, read_trained
from examples.sample_vlm.scenes import CANVAS, PATCH

_WHEELS = {"tower": wheels.TOWER, "decoder": wheels.DECODER}


def assemble(base_folder: Path, trained_file: Path, out: Path) -> None:
    """Write the model folder.

    Args:
        base_folder: written by `base`.
        trained_file: `trained.safetensors` of a training run.
        out: where config, weights (bf16), processor, chat template and README.md go.

    Raises:
        SystemExit: the trained parts are missing or belong to another model.
    """
    if not trained_file.exists():
        raise SystemExit(f"there are no trained parts at {trained_file}; train them first (the command `train`)")
    trained, notes = read_trained(trained_file)
    model = RealVlm(load_base(base_folder, torch.bfloat16))
    load_trained(model, trained)
    llava = to_llava(model, base_folder)
    llava.save_pretrained(out)
    save_processor(base_folder / "tokenizer", out)
    proofs = json.loads((base_folder / "proofs.json").read_text())
    (out / "README.md").write_text(model_card(notes, proofs), encoding="utf-8")
    licence = Path(__file__).parents[3] / "LICENSE"
    shutil.copy(licence, out / "LICENSE-APACHE-2.0.txt")


@torch.no_grad()
def to_llava(model: RealVlm, base_folder: Path) -> LlavaForConditionalGeneration:
    """The same model as transformers' class, bf16, LoRA merged and the projector's statistics folded in."""
    vision = model.tower.config.to_dict() | {"image_size": CANVAS}  # positions are stored for this size
    vision.pop("_name_or_path", None)  # a folder of the machine that assembles
    text = model.decoder.config.to_dict()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_folder / "tokenizer")
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    llava = LlavaForConditionalGeneration(config).bfloat16().eval()
    tower = model.tower.state_dict() | {"embeddings.position_embeddings": model.positions[None]}
    llava.model.vision_tower.load_state_dict(tower)
    llava.model.multi_modal_projector.load_state_dict(model.projector.folded())
    llava.model.language_model.load_state_dict(merged_decoder(model))
    llava.tie_weights()
    llava.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return llava


def merged_decoder(model: RealVlm) -> dict[str, Tensor]:
    """LlamaModel's state with the trained matrices added."""
    state = {name: value for name, value in model.decoder.state_dict().items() if not name.endswith((".up", ".down"))}
    for name, module in model.decoder.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.merged().detach()
    return state


def save_processor(tokenizer_folder: Path, out: Path) -> None:
    """Tokenizer, image processor and chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    images = CLIPImageProcessor(
        size={"shortest_edge": CANVAS},
        crop_size={"height": CANVAS, "width": CANVAS},
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(out)
    images.save_pretrained(out)  # the file of its own that LLaVA's programs and serving engines read


def model_card(notes: dict[str, str], proofs: dict[str, float]) -> str:
    """The folder's README.md: what each part is, where it comes from, under which terms, and how it was proved."""
    card = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:.3g} |" for name, value in proofs.items())
    words = {f"{{{part}.{name}}}": value for part, wheel in _WHEELS.items() for name, value in vars(wheel).items()}
    words |= {f"{{{name}}}": f"{float(notes[name]):,.0f}" for name in ("pictures", "questions", "seconds")}
    words |= {"{transformers}": importlib.metadata.version("transformers"), "{proofs}": rows}
    return re.sub(r"\{[\w.]+\}", lambda found: words[found[0]], card)
