"""An independent compressed LLaVA decoder for the tests: float64, one sample, no padding, no cache.

Everything is recomputed at every step. Only `apet.compress` is shared with the product: which tokens survive is tested
against golden data elsewhere; here the question is what the patched model does with them.
"""

import torch
from torch import Tensor

import apet
from apet import ApetConfig


def image_blocks(ids: list[int], image_id: int, length: int) -> list[tuple[int, int]]:
    """(start, length) of every image in the ids."""
    blocks, column = [], 0
    while column < len(ids):
        if ids[column] == image_id:
            blocks.append((column, length))
            column += length
        else:
            column += 1
    return blocks


class Reference:
    """Greedy decoding of one sample with the weights of a `LlavaForConditionalGeneration`."""

    def __init__(self, model, config: ApetConfig, keep_positions: bool) -> None:
        self.model, self.config, self.keep = model, config, keep_positions
        self.weights = {name: value.detach().double() for name, value in model.state_dict().items()}
        self.text = model.config.text_config

    def embeddings(self, ids: list[int], pixels: Tensor | None) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
        """Prompt embeddings after the vision stage (L, D), image blocks, and the positions (L,) of its tokens."""
        embed = self.weights["model.language_model.embed_tokens.weight"]
        base = self.model.model
        hidden = embed[torch.tensor(ids)].clone()
        blocks = image_blocks(ids, self.model.config.image_token_id, 25)
        rows, positions, new_blocks, cursor = [], [], [], 0
        self.sizes = torch.ones(len(ids), dtype=torch.float64)
        sizes = []
        for image, (start, length) in enumerate(blocks):
            features = base.vision_tower(pixels[image : image + 1], output_hidden_states=True).hidden_states[-2][:, 1:]
            budget = self.config.stage_budgets[0]
            count = length if budget is None else max(1, int(budget * length)) if isinstance(budget, float) else budget
            kept, size = torch.arange(length), torch.ones(length)
            if count < length:
                result = apet.compress(features, count, basis=self.config.basis_token_num, start=self._start())
                features, kept = result.tokens, result.indices[0]
                size = self._sizes_after(result, size)
            projected = self._project(features[0].double())
            rows.append(hidden[cursor:start])
            sizes += [torch.ones(start - cursor), size]
            positions.append(torch.arange(cursor, start))
            new_blocks.append((sum(map(len, rows)), len(kept)))
            rows.append(projected)
            positions.append(start + kept)
            cursor = start + length
        rows.append(hidden[cursor:])
        positions.append(torch.arange(cursor, len(ids)))
        self.sizes = torch.cat([*sizes, torch.ones(len(ids) - cursor)]).double()
        return torch.cat(rows), new_blocks, torch.cat(positions)

    def logits(self, ids: list[int], pixels: Tensor | None, generated: list[int]) -> Tensor:
        """Next-token logits (V,) after the prompt and the tokens generated so far."""
        hidden, blocks, positions = self.embeddings(ids, pixels)
        embed = self.weights["model.language_model.embed_tokens.weight"]
        tail = torch.arange(len(ids), len(ids) + len(generated))
        hidden = torch.cat([hidden, embed[torch.tensor(generated, dtype=torch.long)]])
        positions = torch.cat([positions, tail])
        self.sizes = torch.cat([self.sizes, torch.ones(len(generated))])
        budgets = dict(zip(self.config.layer_list, self.config.stage_budgets[1:], strict=True))
        for layer in range(self.text.num_hidden_layers):
            if layer in budgets:
                hidden, blocks, positions = self._shorten(hidden, blocks, positions, budgets[layer])
            place = positions if self.keep else torch.arange(len(hidden))
            hidden = self._layer(layer, hidden, place)
        hidden = self._norm(hidden, "model.language_model.norm.weight")
        return self.weights["lm_head.weight"] @ hidden[-1]

    def generate(self, ids: list[int], pixels: Tensor | None, steps: int) -> tuple[list[int], Tensor]:
        """Greedy tokens and logits (steps, V)."""
        tokens, logits = [], []
        for _ in range(steps):
            logits.append(self.logits(ids, pixels, tokens))
            tokens.append(int(logits[-1].argmax()))
        return tokens, torch.stack(logits)

    @staticmethod
    def _sizes_after(result, sizes: Tensor) -> Tensor:
        after = torch.zeros(result.indices.shape[1])
        for token, row in enumerate(result.sources[0].tolist()):
            after[row] += sizes[token]
        return after

    def _start(self) -> int | None:
        return None if self.config.fps_start == "farthest" else self.config.fps_start

    def _shorten(self, hidden, blocks, positions, budget):
        rows, places, new_blocks, cursor, sizes = [], [], [], 0, []
        for start, length in blocks:
            count = max(1, int(budget * length)) if isinstance(budget, float) else min(budget, length)
            block, kept = hidden[start : start + length], torch.arange(length)
            size = self.sizes[start : start + length]
            if count < length:
                result = apet.compress(
                    block[None].float(), count, basis=self.config.basis_token_num, start=self._start(), slots="error"
                )
                block, kept = result.tokens[0].double(), result.indices[0]
                size = self._sizes_after(result, size)
            rows.append(hidden[cursor:start])
            sizes += [self.sizes[cursor:start], size]
            places.append(positions[cursor:start])
            new_blocks.append((sum(map(len, rows)), len(kept)))
            rows.append(block)
            places.append(positions[start + kept])
            cursor = start + length
        rows.append(hidden[cursor:])
        places.append(positions[cursor:])
        self.sizes = torch.cat([*sizes, self.sizes[cursor:]]).double()
        return torch.cat(rows), new_blocks, torch.cat(places)

    def _project(self, features: Tensor) -> Tensor:
        prefix, weights = "model.multi_modal_projector.", self.weights
        hidden = features @ weights[prefix + "linear_1.weight"].T + weights[prefix + "linear_1.bias"]
        hidden = torch.nn.functional.gelu(hidden)
        return hidden @ weights[prefix + "linear_2.weight"].T + weights[prefix + "linear_2.bias"]

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        scale = (hidden.square().mean(-1, keepdim=True) + self.text.rms_norm_eps).rsqrt()
        return hidden * scale * self.weights[name]

    def _layer(self, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
        prefix = f"model.language_model.layers.{index}."
        heads, kv_heads = self.text.num_attention_heads, self.text.num_key_value_heads
        size = self.text.hidden_size // heads
        inputs = self._norm(hidden, prefix + "input_layernorm.weight")

        def project(name: str, count: int) -> Tensor:
            return (inputs @ self.weights[prefix + f"self_attn.{name}.weight"].T).view(-1, count, size).transpose(0, 1)

        query, key = project("q_proj", heads), project("k_proj", kv_heads)
        value = project("v_proj", kv_heads).repeat_interleave(heads // kv_heads, 0)
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        key = key.repeat_interleave(heads // kv_heads, 0)
        scores = query @ key.transpose(1, 2) / size**0.5
        if self.config.size_bias:
            scores = scores + self.sizes.clamp(1, 16).log()
        future = torch.ones(len(hidden), len(hidden)).triu(1).bool()
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        hidden = (
            hidden + mixed.transpose(0, 1).reshape(len(hidden), -1) @ self.weights[prefix + "self_attn.o_proj.weight"].T
        )
        inputs = self._norm(hidden, prefix + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(inputs @ self.weights[prefix + "mlp.gate_proj.weight"].T)
        up = inputs @ self.weights[prefix + "mlp.up_proj.weight"].T
        return hidden + (gate * up) @ self.weights[prefix + "mlp.down_proj.weight"].T

    def _rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        half = states.shape[-1] // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = positions.double()[:, None] * frequency
        first, second = states[..., :half], states[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
