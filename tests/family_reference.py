"""An independent compressed decoder for the families of `families`: float64, one sample, no padding, no cache.

Everything is recomputed at every step. Shared with the product is `apet.compress` only (golden data test it), and with
the host the vision features and, for M-RoPE, the rotary positions of the uncompressed prompt.
"""

from dataclasses import dataclass

import torch
from families import SUPPRESSED, Family, Sample
from torch import Tensor
from torch.nn.functional import silu

import apet
from apet import ApetConfig


@dataclass
class Tokens:
    """The prompt in the course of its compression; all with one entry per token.

    `item` is -1 for text; `part` is the frame or tile inside the item; `follows` marks class and newline tokens, which
    stay with their `line`; `deep` (levels, L, D) is added behind the first layers.
    """

    hidden: Tensor
    positions: Tensor
    item: list[int]
    video: list[bool]
    part: list[int]
    line: list[int]
    follows: list[bool]
    deep: Tensor

    def take(self, source: list[int], hidden: Tensor) -> "Tokens":
        kept = (self.item, self.video, self.part, self.line, self.follows)
        lists = [[values[column] for column in source] for values in kept]
        return Tokens(hidden, self.positions[:, source], *lists, self.deep[:, source])


class FamilyReference:
    """Greedy decoding of one sample."""

    def __init__(self, family: Family, model, config: ApetConfig) -> None:
        self.family, self.model, self.config = family, model, config
        self.weights = {name: value.detach().double() for name, value in model.state_dict().items()}
        self.text = model.config.text_config
        mode = family.position_mode if config.position_mode == "auto" else config.position_mode
        self.keep = mode == "keep"

    @torch.no_grad()
    def generate(self, parts: list, steps: int) -> tuple[list[int], Tensor]:
        """Greedy tokens and logits (steps, V)."""
        sample = self.family.sample(parts)
        prompt = self.prompt(parts, sample)
        vision, *budgets = self.config.stage_budgets
        prompt = self.shorten(prompt, vision, True)
        tokens, logits = [], []
        for _ in range(steps):
            logits.append(self.logits(prompt, budgets, tokens))
            allowed = logits[-1].clone()
            allowed[SUPPRESSED] = -torch.inf
            tokens.append(int(allowed.argmax()))
        return tokens, torch.stack(logits)

    def prompt(self, parts: list, sample: Sample) -> Tokens:
        hidden = self.weights["model.language_model.embed_tokens.weight"][torch.tensor(sample.ids)].clone()
        kinds = torch.tensor(sample.kinds)
        inputs = self.family.inputs([parts])
        deep = torch.zeros(0, *hidden.shape, dtype=torch.float64)
        for number, kind in enumerate(("image", "video"), 1):
            if not (kinds == number).any():
                continue
            output = self.family.encode(self.model, inputs, kind, list(sample.pictures[kind][0]))
            features = output.pooler_output
            features = torch.cat(list(features)) if not isinstance(features, Tensor) else features.flatten(0, 1)
            hidden[kinds == number] = features.double()
            levels = getattr(output, "deepstack_features", None) or []
            if levels and not len(deep):
                deep = torch.zeros(len(levels), *hidden.shape, dtype=torch.float64)
            for level, values in enumerate(levels):
                values = torch.cat(list(values)) if not isinstance(values, Tensor) else values
                deep[level, kinds == number] = values.double()
        self.length = length = len(sample.ids)
        item, video, frame, line, follows = ([value] * length for value in (-1, False, 0, 0, False))
        cursors = {"image": 0, "video": 0}
        columns = {kind: [c for c in range(length) if kinds[c] == n] for n, kind in enumerate(("image", "video"), 1)}
        for index, part in enumerate(part for part in parts if not isinstance(part, int)):
            for role in self.family.roles(part):
                column = columns[part[0]][cursors[part[0]]]
                cursors[part[0]] += 1
                item[column], video[column] = index, part[0] == "video"
                frame[column], line[column], follows[column] = role
        return Tokens(hidden, self.positions(sample, inputs, length), item, video, frame, line, follows, deep)

    def positions(self, sample: Sample, inputs: dict, length: int) -> Tensor:
        if not self.family.mrope:
            return torch.arange(length)[None]
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        if not any(sample.kinds):
            return torch.arange(length).expand(3, -1)
        found, _ = self.model.model.get_rope_index(
            torch.tensor([sample.ids]), mm_token_type_ids=torch.tensor([sample.kinds]), **grids
        )
        return found[:, 0]

    def shorten(self, tokens: Tokens, budget, vision: bool) -> Tokens:
        """One stage: pool the visual tokens as the configuration says and cut every pool."""
        config = self.config
        per_frame = vision and {"auto": self.family.per_frame}.get(
            config.video_budget_per, config.video_budget_per == "frame"
        )
        per_tile = vision and config.budget_per == "crop" and getattr(self.family, "tiles", False)
        pools: dict[tuple, list[int]] = {}
        for column, item in enumerate(tokens.item):
            if item >= 0:
                parted = per_frame if tokens.video[column] else per_tile
                key = ("all",) if config.budget_per == "prompt" else (item, tokens.part[column] if parted else None)
                pools.setdefault(key, []).append(column)
        emitted: dict[int, list[tuple[int, Tensor]]] = {
            column: [(column, tokens.hidden[column])] for column in range(len(tokens.item))
        }
        for columns in pools.values():
            framed = tokens.video[columns[0]] and per_frame
            options = self.family.llm_preset
            if vision:
                options = self.family.frame_preset if framed else self.family.vision_preset
            limit = budget
            if vision and tokens.video[columns[0]] and config.video_token_num is not None:
                limit = config.video_token_num
            candidates = [column for column in columns if not tokens.follows[column]]
            count = len(candidates) if limit is None else limit
            if isinstance(limit, float):
                count = max(1, int(limit * len(candidates)))
            if count >= len(candidates):
                continue
            result = apet.compress(
                tokens.hidden[candidates][None].float(), count, basis=config.basis_token_num, **options
            )
            if result.indices.shape[1] >= len(candidates):
                continue
            kept = [candidates[index] for index in result.indices[0].tolist()]
            rows = list(zip(kept, result.tokens[0].double(), strict=True))
            alive = {(tokens.item[column], tokens.line[column]) for column in kept}
            followers = [
                (column, tokens.hidden[column])
                for column in columns
                if tokens.follows[column] and (tokens.item[column], tokens.line[column]) in alive
            ]
            for column in columns:
                emitted[column] = []
            if options.get("insertion") == "append":
                emitted[columns[0]] = followers + rows
            else:
                for column, row in followers + rows:
                    emitted[column] = [(column, row)]
        flat = [pair for column in range(len(tokens.item)) for pair in emitted[column]]
        return tokens.take([column for column, _ in flat], torch.stack([row for _, row in flat]))

    def logits(self, prompt: Tokens, budgets: list, generated: list[int]) -> Tensor:
        """Next-token logits (V,)."""
        embed = self.weights["model.language_model.embed_tokens.weight"]
        count, axes = len(generated), len(prompt.positions)
        tail = (prompt.positions[:, -1:] + 1 + torch.arange(count)).expand(axes, -1)
        tokens = Tokens(
            torch.cat([prompt.hidden, embed[torch.tensor(generated, dtype=torch.long)]]),
            torch.cat([prompt.positions, tail], 1),
            prompt.item + [-1] * count, prompt.video + [False] * count, prompt.part + [0] * count,
            prompt.line + [0] * count, prompt.follows + [False] * count,
            torch.cat([prompt.deep, torch.zeros(len(prompt.deep), count, embed.shape[1], dtype=torch.float64)], 1),
        )  # fmt: skip
        stages = dict(zip(self.config.layer_list, budgets, strict=True))
        for layer in range(self.text.num_hidden_layers):
            if layer in stages:
                tokens = self.shorten(tokens, stages[layer], False)
            whole = len(tokens.hidden) == self.length + count
            places = tokens.positions if self.keep or whole else torch.arange(len(tokens.hidden)).expand(axes, -1)
            tokens.hidden = self.layer(layer, tokens.hidden, places)
            if layer < len(tokens.deep):
                tokens.hidden = tokens.hidden + tokens.deep[layer]
        hidden = self.norm(tokens.hidden, "model.language_model.norm.weight")
        return self.weights["lm_head.weight"] @ hidden[-1]

    def norm(self, hidden: Tensor, name: str) -> Tensor:
        scale = (hidden.square().mean(-1, keepdim=True) + self.text.rms_norm_eps).rsqrt()
        return hidden * scale * self.weights[name]

    def linear(self, hidden: Tensor, name: str) -> Tensor:
        return hidden @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0)

    def layer(self, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
        prefix = f"model.language_model.layers.{index}."
        heads, kv_heads = self.text.num_attention_heads, self.text.num_key_value_heads
        size = getattr(self.text, "head_dim", None) or self.text.hidden_size // heads
        inputs = self.norm(hidden, prefix + "input_layernorm.weight")

        def project(name: str, count: int) -> Tensor:
            states = self.linear(inputs, prefix + f"self_attn.{name}_proj").view(-1, count, size)
            scale = prefix + f"self_attn.{name}_norm.weight"
            return (self.norm(states, scale) if scale in self.weights else states).transpose(0, 1)

        query, key = (self.rotate(project(name, count), positions) for name, count in (("q", heads), ("k", kv_heads)))
        key = key.repeat_interleave(heads // kv_heads, 0)
        value = project("v", kv_heads).repeat_interleave(heads // kv_heads, 0)
        scores = query @ key.transpose(1, 2) / size**0.5
        future = torch.ones(len(hidden), len(hidden)).triu(1).bool()
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        hidden = hidden + self.linear(mixed.transpose(0, 1).reshape(len(hidden), -1), prefix + "self_attn.o_proj")
        inputs = self.norm(hidden, prefix + "post_attention_layernorm.weight")
        gate = silu(self.linear(inputs, prefix + "mlp.gate_proj"))
        return hidden + self.linear(gate * self.linear(inputs, prefix + "mlp.up_proj"), prefix + "mlp.down_proj")

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding; with M-RoPE each frequency reads the time, height or width row of the positions."""
        half = states.shape[-1] // 2
        parameters = getattr(self.text, "rope_parameters", None) or {}
        frequency = parameters.get("rope_theta", 10000.0) ** (-torch.arange(half, dtype=torch.float64) / half)
        axis = [0] * half
        if self.family.mrope == "split":
            axis = [axis for axis, count in enumerate(parameters["mrope_section"]) for _ in range(count)]
        elif self.family.mrope == "interleaved":
            _, height, width = parameters["mrope_section"]
            for number, count in ((1, height), (2, width)):
                for turn in range(count):
                    axis[3 * turn + number] = number
        angle = positions.double()[axis].T * frequency
        first, second = states[..., :half], states[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
