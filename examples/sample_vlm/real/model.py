"""The model while it is trained: a frozen tower, a trained projector, a frozen decoder with trained LoRA.

What differs from plain inference of the assembled folder, none of which changes what it computes: pictures may be
windows of the 336-pixel canvas (with the tower's positions of their true place), and many questions share a picture's
tokens (see `batches`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from examples.sample_vlm.real.base import Base
from examples.sample_vlm.scenes import CANVAS, COLOR_LABELS, KINDS, PATCH

GRID = CANVAS // PATCH
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
RANK = 16
LORA_SCALE = 2.0  # what the product of the two factors is multiplied with
_NOTHING = "photo"  # the word for a patch that shows none of the things
_NOTHING_WEIGHT = 0.1  # most patches show nothing
_SHARPNESS = 20.0  # cosines to logits


class LoraLinear(nn.Module):
    """A frozen matrix plus a trained one of low rank.

    The sum is formed first and rounded to the frozen matrix's dtype, exactly as in the assembled folder. That is one
    small product per matrix and step, where the two factors applied to the tokens would pass over all of them twice.

    Args:
        linear: the frozen layer; it has no bias.
        rank: of the trained matrix.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach(), persistent=False)
        out_features, in_features = linear.weight.shape
        self.down = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def merged(self) -> Tensor:
        """The (out, in) matrix in the frozen one's dtype."""
        dtype = self.weight.dtype
        return torch.addmm(self.weight, self.up.to(dtype), self.down.to(dtype), alpha=LORA_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged())


class Projector(nn.Module):
    """LLaVA's two-layer MLP on features that are standardised first; `folded` writes the plain MLP."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """(..., width) of any dtype to (..., hidden) of that dtype; the statistics are applied in fp32."""
        dtype = features.dtype
        x = ((features.float() - self.mean) / self.std).to(dtype)
        x = F.gelu(F.linear(x, self.linear_1.weight.to(dtype), self.linear_1.bias.to(dtype)))
        return F.linear(x, self.linear_2.weight.to(dtype), self.linear_2.bias.to(dtype))

    def folded(self) -> dict[str, Tensor]:
        """fp32 weights of `LlavaMultiModalProjector` that computes the same from raw features."""
        weight = self.linear_1.weight.detach() / self.std
        return {
            "linear_1.weight": weight,
            "linear_1.bias": self.linear_1.bias.detach() - weight @ self.mean,
            "linear_2.weight": self.linear_2.weight.detach(),
            "linear_2.bias": self.linear_2.bias.detach(),
        }


def shared_picture_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention for transformers' layers where the mask covers only the last rows: (B, 1, region, T), added.

    The rows before them, prefix and picture, are plainly causal, which the fused kernels do without a mask.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    shared = key.shape[2] - attention_mask.shape[2]
    attend = F.scaled_dot_product_attention
    head = attend(query[:, :, :shared], key[:, :, :shared], value[:, :, :shared], is_causal=True, scale=scaling)
    tail = attend(query[:, :, shared:], key, value, attn_mask=attention_mask, scale=scaling)
    return torch.cat([head, tail], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("shared_picture", shared_picture_attention)


class RealVlm(nn.Module):
    """Tower, projector and decoder.

    Args:
        base: the frozen parts; their dtype is the one computed in. Trained weights are fp32.
    """

    def __init__(self, base: Base):
        super().__init__()
        self.tower, self.decoder, self.dtype = base.tower, base.decoder, base.decoder.dtype
        for part in (self.tower, self.decoder):
            part.requires_grad_(False)
        self.tower.set_attn_implementation("sdpa")
        self.decoder.config._attn_implementation = "shared_picture"
        for layer in self.decoder.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in list(block.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(block, name, LoraLinear(linear, RANK))
        width = self.decoder.config.hidden_size
        self.projector = Projector(self.tower.config.hidden_size, width)
        grid = self.tower.embeddings.interpolate_pos_encoding(
            torch.zeros(1, 1 + GRID * GRID, self.tower.config.hidden_size), CANVAS, CANVAS
        )
        self.register_buffer("positions", grid[0].detach().clone(), persistent=False)
        self.register_buffer("prefix", torch.tensor(base.chat.prefix), persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD), persistent=False)
        self._word_tables(base)
        nn.init.normal_(self.projector.linear_2.weight, std=float(self.word_norm) / width)

    def _word_tables(self, base: Base) -> None:
        """Centred unit embeddings of the words for what a patch shows, and the usual distance from the centre."""
        table = self.decoder.embed_tokens.weight.float()
        center = table.mean(0)
        self.register_buffer("word_center", center, persistent=False)
        self.register_buffer("word_norm", (table - center).norm(dim=1).mean(), persistent=False)
        for name, labels in (("kinds", KINDS), ("colors", COLOR_LABELS)):
            # Letters and digits stand alone, as in a word that is spelled; the others have a space in front.
            ids = [base.chat.ids(w)[0] if len(w) == 1 else base.chat.word(w) for w in (_NOTHING, *labels[1:])]
            self.register_buffer(name, F.normalize(table[ids] - center, dim=1), persistent=False)

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def see(self, pixels: Tensor, origins: Tensor) -> Tensor:
        """Patch features (B, N, width) at select layer -2 of pixels (B, side, side, 3) uint8 at origins (B, 2)."""
        images = ((pixels.float() / 255 - self.pixel_mean) / self.pixel_std).permute(0, 3, 1, 2)
        patches = self.tower.embeddings.patch_embeddings(images.to(self.dtype))
        span = torch.arange(pixels.shape[1] // PATCH, device=pixels.device)
        rows, cols = origins[:, 1, None] + span, origins[:, 0, None] + span
        places = 1 + (rows[:, :, None] * GRID + cols[:, None, :]).flatten(1)
        first = self.tower.embeddings.cls_token[0, 0] + self.positions[0]
        hidden = torch.cat([first.expand(len(patches), 1, -1), patches + self.positions[places]], dim=1)
        for layer in self.tower.encoder.layer[:-1]:
            hidden = layer(hidden)
        return hidden[:, 1:]

    @torch.no_grad()
    def measure(self, features: Tensor) -> None:
        """Take the projector's statistics from features (B, N, width)."""
        flat = features.float().flatten(0, 1)
        self.projector.mean.copy_(flat.mean(0))
        self.projector.std.copy_(flat.std(0) + 1e-3)

    def read(self, features: Tensor, batch: dict, compiled: bool = False) -> Tensor:
        """Hidden states (B, answers, hidden) at the answer tokens of a batch with features (B, N, width)."""
        size = len(features)
        embed = self.decoder.embed_tokens
        picture = self.projector(features)
        hidden = torch.cat([embed(self.prefix).expand(size, -1, -1), picture, embed(batch["ids"])], dim=1)
        shared = len(self.prefix) + features.shape[1]
        positions = torch.cat(
            [torch.arange(shared, device=hidden.device).expand(size, -1), shared + batch["offset"]], dim=1
        )
        mask = region_mask(batch["owner"], shared, self.dtype)
        rotary = self.decoder.rotary_emb(hidden, positions)
        for layer in self.decoder.layers:
            run = layer if compiled else layer.forward
            hidden = run(hidden, attention_mask=mask, position_embeddings=rotary)
        places = (shared + batch["places"])[..., None].expand(-1, -1, hidden.shape[-1])
        return self.decoder.norm(hidden.gather(1, places))

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits from hidden states, over the whole vocabulary."""
        return F.linear(hidden, self.decoder.embed_tokens.weight)

    def answer_loss(self, features: Tensor, batch: dict, compiled: bool = False) -> Tensor:
        """Weighted mean cross-entropy of the answer tokens."""
        logits = self.logits(self.read(features, batch, compiled)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        weights = batch["weights"].flatten()
        return (loss * weights).sum() / weights.sum()

    def word_loss(self, features: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """How far patches lie from the words of what they show, and the share of things' patches nearest to theirs.

        Args:
            features: (B, N, width).
            shown: (B, 2, n, n) kinds and colours.
        """
        kinds, colors = shown.flatten(2).unbind(1)
        moved = self.projector(features).float() - self.word_center
        cosines = F.normalize(moved, dim=-1)
        weight = torch.where(kinds == 0, _NOTHING_WEIGHT, 1.0)
        something = (kinds != 0).float()
        by_kind, by_color = cosines @ self.kinds.T, cosines @ self.colors.T
        loss_kind = F.cross_entropy(_SHARPNESS * by_kind.flatten(0, 1), kinds.flatten(), reduction="none")
        loss_color = F.cross_entropy(_SHARPNESS * by_color.flatten(0, 1), colors.flatten(), reduction="none")
        length = (moved.norm(dim=-1) / self.word_norm - 1).square().mean()
        near = (by_kind * F.one_hot(kinds, len(KINDS))).sum(-1) + (by_color * F.one_hot(colors, len(COLOR_LABELS))).sum(
            -1
        )
        loss = (loss_kind * weight.flatten()).sum() / weight.sum()
        loss = loss + (loss_color * something.flatten()).sum() / something.sum().clamp(min=1)
        loss = loss + length - (near * something).sum() / something.sum().clamp(min=1)
        hit = ((by_kind.argmax(-1) == kinds).float() * something).sum() / something.sum().clamp(min=1)
        return loss, hit

    @torch.no_grad()
    def right(self, batch: dict) -> Tensor:
        """(B, answers) bool: the likeliest token is the true one; a turn is right where all of its are."""
        hidden = self.read(self.see(batch["pixels"], batch["origins"]), batch)
        return self.logits(hidden).argmax(-1) == batch["targets"]


def region_mask(owner: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores: (B, 1, R, shared + R), zero where question tokens see, else the least number.

    Args:
        owner: (B, R) question of each token, -1 for padding.
        shared: tokens of prefix and picture, seen by all.
        dtype: of the scores.
    """
    size, region = owner.shape
    index = torch.arange(region, device=owner.device)
    own = (owner[:, :, None] == owner[:, None, :]) & (index[:, None] >= index[None, :])
    seen = torch.cat([own.new_ones(size, region, shared), own], dim=2)[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=owner.device).masked_fill_(~seen, torch.finfo(dtype).min)
