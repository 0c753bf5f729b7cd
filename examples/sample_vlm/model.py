"""The sample model while it is trained: a CLIP tower, an MLP projector and a LLaMA decoder, all from transformers.

Three things differ from plain LLaVA inference, none of which changes what the exported model computes:

* Windows. A picture may be a window of the 336-pixel canvas. Its patches then use the position embeddings of their true
  places, so that a small window trains the very same tower. The decoder simply sees fewer image tokens.
* Several questions per picture. They share the picture's tokens: every question attends to the prefix, the picture and
  itself, and its positions start right after the picture, so it equals a single-turn prompt of its own.
* Auxiliary heads on the tower's features (what each patch shows; what the whole picture contains). They make the tower
  see within minutes instead of hours, are switched off before training ends, and are not exported.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from examples.sample_vlm.scenes import CANVAS, COLOR_LABELS, KINDS, MAX_LETTERS, PATCH

GRID = CANVAS // PATCH
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
IGNORE = -100
_BACKGROUND_WEIGHT = 0.1  # most patches show nothing


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths. The tower's last layer is never used (select layer -2) but belongs to the format."""

    tower_hidden: int
    tower_mlp: int
    tower_layers: int
    tower_heads: int
    hidden: int
    mlp: int
    layers: int
    heads: int


SIZES = {
    "small": ModelSize(192, 768, 6, 6, 128, 320, 12, 4),
    "full": ModelSize(224, 896, 7, 7, 192, 448, 16, 6),
    "mini": ModelSize(32, 64, 3, 2, 32, 64, 12, 2),
}


class SampleVlm(nn.Module):
    """Tower, projector, decoder, language head, and the auxiliary heads of training.

    Args:
        size: widths and depths.
        vocab_size: the tokenizer's.
        prefix: token ids in front of the picture (BOS, system text, `USER:`).
    """

    def __init__(self, size: ModelSize, vocab_size: int, prefix: list[int]):
        super().__init__()
        self.size = size
        self.tower = CLIPVisionModel(vision_config(size))
        self.projector = nn.Sequential(
            nn.Linear(size.tower_hidden, size.hidden), nn.GELU(), nn.Linear(size.hidden, size.hidden)
        )
        self.llm = LlamaModel(text_config(size, vocab_size))
        self.lm_head = nn.Linear(size.hidden, vocab_size, bias=False)
        self.patch_head = nn.Linear(size.tower_hidden, len(KINDS) + len(COLOR_LABELS) + MAX_LETTERS + 1)
        self.picture_head = nn.Linear(size.tower_hidden, len(KINDS) + len(COLOR_LABELS))
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        self._init_positions()

    def speed_up(self, attention: str, compiled: bool) -> None:
        """Choose transformers' attention implementation for training and compile every layer where asked for.

        Fused attention on a CPU spends its backward pass mostly on overhead at these sizes, so `eager` is faster there;
        compiling needs a C++ compiler.
        """
        self.tower.set_attn_implementation(attention)
        self.llm.set_attn_implementation(attention)
        if compiled:
            for layer in self.tower.encoder.layers:
                layer.compile(dynamic=False)  # a handful of picture sizes
            for layer in self.llm.layers:
                layer.compile()

    def _init_positions(self) -> None:
        """Sines and cosines of row and column: neighbours are alike from the start, also at places seen rarely."""
        dim = self.size.tower_hidden
        frequency = 0.8 ** torch.arange(dim // 4) * 2.0
        angle = torch.arange(GRID)[:, None] * frequency[None]
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (GRID, dim / 2)
        rows, cols = wave[:, None].expand(GRID, GRID, -1), wave[None].expand(GRID, GRID, -1)
        with torch.no_grad():
            table = self.tower.embeddings.position_embedding.weight
            table[1:] = 0.3 * torch.cat([rows, cols], dim=-1).reshape(GRID * GRID, dim)

    def see(self, pixels: torch.Tensor, origins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower's features at select layer -2.

        Args:
            pixels: (B, 3, side, side) uint8.
            origins: (B, 2) first patch column and row of the window on the full 24 x 24 grid.

        Returns:
            (B, tokens, dim) patch features and (B, dim) class-token features.
        """
        embeddings = self.tower.embeddings
        images = (pixels.float() / 255 - self.mean) / self.std
        patches = embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
        span = torch.arange(pixels.shape[-1] // PATCH, device=pixels.device)
        rows, cols = origins[:, 1, None] + span, origins[:, 0, None] + span
        places = 1 + (rows[:, :, None] * GRID + cols[:, None, :]).flatten(1)
        patches = patches + embeddings.position_embedding(places)
        first = embeddings.class_embedding + embeddings.position_embedding.weight[0]
        hidden = torch.cat([first.expand(len(patches), 1, -1), patches], dim=1)
        hidden = self.tower.pre_layrnorm(hidden)
        for layer in self.tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden[:, 1:], hidden[:, 0]

    def read(self, features: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
        """Hidden states of the questions' tokens, (B, Q, L, dim), from features (B, N, tower) and ids (B, Q, L)."""
        batch, number, length = questions.shape
        prefix = self.llm.embed_tokens(self.prefix).expand(batch, -1, -1)
        image = self.projector(features)
        text = self.llm.embed_tokens(questions.flatten(1))
        embeds = torch.cat([prefix, image.to(prefix.dtype), text], dim=1)
        shared = prefix.shape[1] + image.shape[1]
        mask, positions = block_layout(shared, number, length, embeds.device)
        kind = embeds.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else embeds.dtype
        hidden = self.llm(
            inputs_embeds=embeds,
            # Eager attention adds its mask, so it cannot be boolean.
            attention_mask=torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min),
            position_ids=positions[None].expand(batch, -1),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, shared:].reshape(batch, number, length, -1)

    def answer_loss(self, features: torch.Tensor, questions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the answer tokens; labels (B, Q, L) are the ids to be predicted *at* each place."""
        wanted = labels != IGNORE
        logits = self.lm_head(self.read(features, questions)[wanted])
        return F.cross_entropy(logits.float(), labels[wanted])

    def seeing_loss(
        self, patches: torch.Tensor, picture: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The auxiliary losses for targets (B, 3, n, n), and the accuracy on patches that show something."""
        sizes = (len(KINDS), len(COLOR_LABELS), MAX_LETTERS + 1)
        outputs = self.patch_head(patches).float().split(sizes, dim=-1)
        kinds, colors, places = targets.flatten(2).unbind(1)
        weight = torch.where(kinds == 0, _BACKGROUND_WEIGHT, 1.0)
        loss = sum(
            (F.cross_entropy(out.transpose(1, 2), target, reduction="none") * weight).sum() / weight.sum()
            for out, target in zip(outputs, (kinds, colors, places), strict=True)
        )
        contents = torch.cat([F.one_hot(kinds, sizes[0]).amax(1), F.one_hot(colors, sizes[1]).amax(1)], dim=1)
        loss = loss + F.binary_cross_entropy_with_logits(self.picture_head(picture).float(), contents.float())
        something = kinds != 0
        hit = (outputs[0].argmax(-1) == kinds)[something].float().mean()
        return loss, hit


def block_layout(
    shared: int, number: int, length: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (1, 1, T, T), true where seen, and positions (T,): `number` questions of `length` after `shared` tokens.

    Padding at a question's end needs no mask of its own: causality keeps it invisible to every real token.
    """
    total = shared + number * length
    index = torch.arange(total, device=device)
    block = torch.where(index < shared, -1, (index - shared) // length)
    positions = torch.where(index < shared, index, shared + (index - shared) % length)
    causal = index[:, None] >= index[None, :]
    visible = causal & ((block[None, :] == -1) | (block[:, None] == block[None, :]))
    return visible[None, None], positions


def vision_config(size: ModelSize) -> CLIPVisionConfig:
    """The tower's transformers configuration: patch 14 at 336 pixels."""
    return CLIPVisionConfig(
        hidden_size=size.tower_hidden,
        intermediate_size=size.tower_mlp,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=size.tower_heads,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=size.tower_hidden,
    )


def text_config(size: ModelSize, vocab_size: int) -> LlamaConfig:
    """The decoder's transformers configuration."""
    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
