"""The tiny checkpoints of the golden files: loaded, asked as recorded, changed, and refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from apet.adapters import host
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "llava" / "tiny"
CLIP = TINY / "clip-tiny-patch14-28"
FULL_CLIP = GOLDEN / "end_to_end" / "clip-tiny-patch14-336"
RECORDED = json.loads((GOLDEN / "llava" / "tiny.json").read_text(encoding="utf-8"))
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
