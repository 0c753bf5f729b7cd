"""Proofs that the conversion keeps what the wheels hold; `base` runs them and keeps the figures in `proofs.json`."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Dinov2Model

from examples.sample_vlm.real import wheels
from examples.sample_vlm.real.base import load_decoder

_SELECTED = "/backbone/encoder/layer.10/Add_1_output_0"  # what hidden_states[-2] is in the graph
_TOWER_LIMIT = 1e-3  # features reach some tens; fp32 sums in another order differ by far less


def prove(tower_file: Path, decoder_file: Path, base: Path) -> dict[str, float]:
    """All proofs; raises SystemExit with the figure where one fails."""
    figures = prove_tower(tower_file, base) | prove_decoder(decoder_file, base)
    allowed = {"tower_max_difference": _TOWER_LIMIT, "tower_bf16_relative_error": 0.03}
    for name, value in figures.items():
        if not value <= allowed.get(name, 0.0):
            raise SystemExit(f"conversion is wrong: {name} is {value}, at most {allowed.get(name, 0.0)} is allowed")
    return figures


@torch.no_grad()
def prove_tower(tower_file: Path, base: Path) -> dict[str, float]:
    """Largest difference of hidden_states[-2] between ONNX Runtime and torch, and what rounding to bf16 changes."""
    import onnx
    import onnxruntime

    graph = onnx.load(str(tower_file))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(_SELECTED, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    truth = torch.from_numpy(session.run([_SELECTED], {"input_image": pixels})[0])
    saved = Dinov2Model.from_pretrained(base / "tower", dtype=torch.float32).eval()
    rounded = saved(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-2]
    exact = Dinov2Model.from_pretrained(None, config=saved.config, state_dict=wheels.read_tower(tower_file)).eval()
    ours = exact(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-2]
    return {
        "tower_max_difference": float((ours - truth).abs().max()),
        "tower_bf16_relative_error": float((rounded - truth).norm() / truth.norm()),
    }


def prove_decoder(decoder_file: Path, base: Path) -> dict[str, float]:
    """Largest difference of our weights to the package gguf's values, and to transformers' own GGUF loader."""
    import gguf

    ours = load_decoder(base / "decoder").state_dict()
    worst = 0.0
    for tensor in gguf.GGUFReader(str(decoder_file)).tensors:
        truth = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        mine = ours[wheels.llama_name(tensor.name)][: len(truth)]
        # Rows of query and key are stored in another order: compare them sorted here, in order below.
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            truth, mine = truth.sort(0).values, mine.sort(0).values
        worst = max(worst, float((truth - mine).abs().max()))
    theirs = AutoModelForCausalLM.from_pretrained(
        decoder_file.parent, gguf_file=decoder_file.name, dtype=torch.float32
    ).model.state_dict()
    order = max(float((theirs[name] - ours[name][: len(theirs[name])]).abs().max()) for name in theirs)
    return {"decoder_max_difference_gguf": worst, "decoder_max_difference_transformers": order}
