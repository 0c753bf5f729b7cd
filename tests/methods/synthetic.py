"""Blocks, a stage context and inputs made of random numbers: everything a method can ask for, without a model."""

import dataclasses

import torch

from apet import ApetConfig
from apet.config import StagePreset
from apet.core.types import CompressedTokens
from apet.methods import Method, StageContext, get_method

HEADS, WIDTH, TEXT = 3, 4, 6

_TOKEN_AXIS = {
    "cls_attention": 2,
    "vision_keys": 2,
    "vision_states": 2,
    "vision_features": 1,
    "clip_relevance": 1,
    "attention_row": 2,
    "text_attention": 3,
    "keys": 2,
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Inputs:
    """All inputs of `StageInputs` as stored tensors; `rows` and `shuffled` follow what is done to the blocks."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    @classmethod
    def random(cls, batch: int, n: int, dim: int, seed: int = 0) -> "Inputs":
        draw = {
            "vision_features": noise(batch, n, 7, seed=seed + 1),
            "vision_states": noise(batch, 12, n, 5, seed=seed + 9),
            "clip_relevance": noise(batch, n, seed=seed + 2).tanh(),
            "text_embeddings": noise(batch, TEXT, dim, seed=seed + 3),
            "image_embeddings": noise(batch, n + 5, dim, seed=seed + 4),
            "text_hidden": noise(batch, TEXT, dim, seed=seed + 5),
        }
        for layer in (-1, -2, 1, 2, 5):
            own = seed + 10 * (layer + 3)
            share = noise(batch, HEADS, 1, seed=own).sigmoid()
            draw[f"cls_attention {layer}"] = noise(batch, HEADS, n, seed=own + 1).softmax(-1) * share
            draw[f"vision_keys {layer}"] = noise(batch, HEADS, n, WIDTH, seed=own + 2)
            draw[f"attention_row {layer}"] = noise(batch, HEADS, n, seed=own + 3).softmax(-1) * share
            draw[f"text_attention {layer}"] = noise(batch, HEADS, TEXT, n, seed=own + 4).softmax(-1)
            draw[f"keys {layer}"] = noise(batch, HEADS, n, WIDTH, seed=own + 5)
            draw[f"text_keys {layer}"] = noise(batch, HEADS, TEXT, WIDTH, seed=own + 6)
        mask = torch.arange(TEXT).unsqueeze(0) < TEXT - torch.arange(batch).unsqueeze(1) % 3
        return cls(draw | {"text mask": mask})

    def text_embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors["text_embeddings"], self.tensors["text mask"]

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        scale = 1 + torch.arange(hidden.shape[-1], device=hidden.device) / 10
        return hidden / hidden.float().square().mean(-1, keepdim=True).sqrt().to(hidden.dtype) * scale.to(hidden.dtype)

    def __getattr__(self, name: str):
        if name not in (key.partition(" ")[0] for key in self.__dict__["tensors"]):
            raise AttributeError(name)
        return lambda *layer: self.tensors[" ".join([name, *map(str, layer)])]

    def rows(self, part: slice) -> "Inputs":
        return Inputs({name: tensor[part] for name, tensor in self.tensors.items()})

    def shuffled(self, order: torch.Tensor) -> "Inputs":
        """The blocks' tokens in another order; text and other inputs stay."""
        moved = {}
        for key, tensor in self.tensors.items():
            at = _TOKEN_AXIS.get(key.partition(" ")[0])
            moved[key] = tensor if at is None else tensor.index_select(at, order)
        return Inputs(moved)

    def to(self, *args) -> "Inputs":
        """Another floating point type."""
        return Inputs({key: t.to(*args) if t.is_floating_point() else t for key, t in self.tensors.items()})

    def faked(self, mode) -> "Inputs":
        """Tensors without values, for a FakeTensorMode."""
        return Inputs({key: mode.from_tensor(tensor) for key, tensor in self.tensors.items()})


# A layer number other than 0, so that absolute and relative layers cannot be confused; its row is that of layer 2.
LAYER = 2


def run(
    method: str | Method,
    tokens: torch.Tensor,
    keep: int,
    *,
    stage: str | None = None,
    grid: tuple[int, int] | None = None,
    inputs: Inputs | None = None,
    sizes: torch.Tensor | None = None,
    seed: int = 0,
    **options,
) -> CompressedTokens:
    """`method` on `tokens`, at its first stage unless told otherwise."""
    method = get_method(method, **options) if isinstance(method, str) else dataclasses.replace(method, **options)
    stage = stage or method.stages[0]
    config = ApetConfig(method=method.name, seed=seed)
    layer = LAYER if stage == "llm" else 0
    context = StageContext(stage, StagePreset(), config, layer, 8, grid, sizes, inputs)
    return method.select(tokens, keep, context)
