"""Tiny models and prompts of the families that are compressed behind their projector.

A prompt is a list of parts: a number is so many text tokens, ("image", ...) and ("video", ...) are pictures whose size
each family reads in its own way. Pixels and text depend on the part only, so a prompt is the same alone and in a batch.
"""

import inspect
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tiny import randomise

IMAGE, VIDEO, START, END, VOCAB = 90, 91, 92, 93, 96
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
PLACEHOLDERS = {"image": IMAGE, "video": VIDEO}


@dataclass
class Sample:
    """One prompt: ids, kinds (0 text, 1 image, 2 video), and per kind the model's inputs of every picture."""

    ids: list[int]
    kinds: list[int]
    pictures: dict[str, list[dict[str, torch.Tensor]]] = field(default_factory=dict)


def noise(*shape: int, seed: Any = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    return torch.randn(*shape, generator=generator)


class Family:
    """A family's tiny model, its prompts, and what an independent implementation must know about it."""

    prompts: list[list]
    mrope: str | None = None  # "split" or "interleaved"
    position_mode = "compact"
    vision_preset: dict[str, Any] = {}
    frame_preset: dict[str, Any] = {}
    llm_preset: dict[str, Any] = {"slots": "error"}
    per_frame = False
    wrapped = True
    has_video = True
    beams = (0, 2)

    def build(self, attention: str):
        model = randomise(self.make(attention)).eval()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model

    def make(self, attention: str):
        raise NotImplementedError

    def runs(self, part: tuple) -> list[int]:
        """Lengths of the placeholder runs of a picture."""
        raise NotImplementedError

    def pixels(self, part: tuple) -> dict[str, torch.Tensor]:
        """The model's inputs of a picture."""
        raise NotImplementedError

    def roles(self, part: tuple) -> list[tuple[int, int, bool]]:
        """Per token of a picture its frame or tile, its line, and whether it follows the line (class, newline)."""
        return [(0, 0, False)] * sum(self.runs(part))

    def encode(self, model, inputs: dict, kind: str, names: list[str]):
        """The host's features of all images or videos of a batch."""
        method = getattr(model.model, f"get_{kind}_features")
        return method(*[inputs[name] for name in names], return_dict=True)

    def sample(self, parts: list) -> Sample:
        ids, kinds, pictures = [1], [0], {"image": [], "video": []}
        for part in parts:
            if isinstance(part, int):
                ids += (noise(part, seed=parts).abs() * 40 % 80).long().add(3).tolist()
                kinds += [0] * part
                continue
            pictures[part[0]].append(self.pixels(part))
            for length in self.runs(part):
                ends = ([START], [END]) if self.wrapped else ([], [])
                ids += [*ends[0], *[PLACEHOLDERS[part[0]]] * length, *ends[1]]
                kinds += [*[0] * len(ends[0]), *[1 + (part[0] == "video")] * length, *[0] * len(ends[1])]
        return Sample(ids, kinds, pictures)

    def inputs(self, prompts: list[list]) -> dict[str, torch.Tensor]:
        """A left-padded batch."""
        samples = [self.sample(parts) for parts in prompts]
        width = max(len(one.ids) for one in samples)
        inputs = {
            "input_ids": torch.tensor([[0] * (width - len(one.ids)) + one.ids for one in samples]),
            "attention_mask": torch.tensor([[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in samples]),
        }
        if self.mrope:
            inputs["mm_token_type_ids"] = torch.tensor(
                [[0] * (width - len(one.ids)) + one.kinds for one in samples], dtype=torch.int32
            )
        for kind in PLACEHOLDERS:
            pictures = [picture for one in samples for picture in one.pictures[kind]]
            for name in pictures[0] if pictures else ():
                inputs[name] = self.collate(name, [picture[name] for picture in pictures])
        return inputs

    def collate(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(values)


class Qwen2(Family):
    """Parts ("image", h, w) and ("video", t, h, w) in merged patches."""

    mrope, position_mode = "split", "keep"
    vision_preset = frame_preset = {"insertion": "blend"}
    llm_preset = {"slots": "error", "insertion": "blend", "ridge": 0.1}
    prompts = [
        [3, ("image", 4, 5), 6],
        [2, ("image", 3, 4), 3, ("image", 2, 6), 4],
        [9],
        [2, ("video", 4, 2, 3), 5],
        [1, ("image", 5, 3), 2, ("video", 2, 3, 4), 3],
    ]
    patch, rows = 14, 3 * 2 * 14 * 14
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}

    def make(self, attention):
        vision = {
            "depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64, "patch_size": 14,
        }  # fmt: skip
        config = transformers.Qwen2VLConfig(
            vision_config=vision, text_config=self.text, attn_implementation=attention, **self.ids
        )
        return transformers.Qwen2VLForConditionalGeneration(config)

    def runs(self, part):
        return [torch.tensor(part[1:]).prod().item()]

    def roles(self, part):
        steps = part[1] if part[0] == "video" else 1
        return [(step, 0, False) for step in range(steps) for _ in range(sum(self.runs(part)) // steps)]

    def pixels(self, part):
        steps = part[1] if part[0] == "video" else 1
        grid = torch.tensor([[steps, 2 * part[-2], 2 * part[-1]]])
        values = noise(int(grid.prod()), self.rows, seed=part)
        if part[0] == "video":
            return {"pixel_values_videos": values, "video_grid_thw": grid}
        return {"pixel_values": values, "image_grid_thw": grid}


class Qwen25(Qwen2):
    def make(self, attention):
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
            "tokens_per_second": 2, "window_size": 56, "fullatt_block_indexes": [1], "out_hidden_size": 64,
        }  # fmt: skip
        config = transformers.Qwen2_5_VLConfig(
            vision_config=vision, text_config=self.text, attn_implementation=attention, **self.ids
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)


class VideoLlava(Family):
    """Parts ("image", number) and ("video", number): 16 patches a picture, 3 frames with a class token a video."""

    frame_preset = {"insertion": "append"}
    per_frame, wrapped, side, frames = True, False, 56, 3
    prompts = [
        [3, ("video", 0), 6],
        [2, ("image", 0), 7],
        [9],
        [2, ("image", 1), ("video", 1), 5],
        [1, ("image", 2), ("image", 3), 3],
    ]

    def make(self, attention):
        vision = {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": self.side, "patch_size": 14, "projection_dim": 32,
        }  # fmt: skip
        config = transformers.VideoLlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=IMAGE, video_token_index=VIDEO, attn_implementation=attention,
        )  # fmt: skip
        return transformers.VideoLlavaForConditionalGeneration(config)

    def runs(self, part):
        patches = (self.side // 14) ** 2
        return [patches if part[0] == "image" else self.frames * (patches + 1)]

    def roles(self, part):
        if part[0] == "image":
            return super().roles(part)
        patches = (self.side // 14) ** 2
        return [(frame, frame, token == 0) for frame in range(self.frames) for token in range(patches + 1)]

    def pixels(self, part):
        if part[0] == "video":
            return {"pixel_values_videos": noise(1, self.frames, 3, self.side, self.side, seed=part)}
        newest = "pixel_values" in inspect.signature(transformers.VideoLlavaForConditionalGeneration.forward).parameters
        return {"pixel_values" if newest else "pixel_values_images": noise(1, 3, self.side, self.side, seed=part)}


class LlavaOnevision(Family):
    """Parts ("image", height, width) in pixels, ("image", number) for one of several, ("video", number).

    A crop has 3x3 patches. Crops of large images are scaled down together to at most twice as many.
    """

    side, frames = 42, 3
    grids = {(84, 84): (4, 4), (42, 84): (3, 6), (50, 84): (3, 5)}
    prompts = [
        [3, ("image", 42, 84), 6],
        [2, ("image", 84, 84), 4],
        [9],
        [2, ("video", 0), 5],
        [1, ("image", 0), 2, ("image", 1), 3],
        [1, ("image", 50, 84), ("video", 1), 3],
    ]

    def make(self, attention):
        vision = transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=self.side,
            patch_size=14, vision_use_head=False,
        )  # fmt: skip
        config = transformers.LlavaOnevisionConfig(
            vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=[[42, 84], [84, 42], [84, 84]],
            vision_aspect_ratio="anyres_max_2", attn_implementation=attention,
        )  # fmt: skip
        return transformers.LlavaOnevisionForConditionalGeneration(config)

    def runs(self, part):
        return [len(self.roles(part))]

    def roles(self, part):
        if part[0] == "video":
            tokens = [(frame, 0, False) for frame in range(self.frames) for _ in range(4)]
            return [*tokens, (self.frames - 1, 0, True)]
        if len(part) == 2:
            return [(0, 0, False)] * 9 + [(0, 0, True)]
        height, width = self.grids[part[1:]]
        overview = [(0, -1, False)] * 9
        return overview + [(0, line, column == width) for line in range(height) for column in range(width + 1)]

    def pixels(self, part):
        if part[0] == "video":
            return {"pixel_values_videos": noise(1, self.frames, 3, self.side, self.side, seed=part)}
        return {
            "pixel_values": noise(1, 5, 3, self.side, self.side, seed=part),
            "image_sizes": torch.tensor([part[1:] if len(part) == 3 else (60, 60)]),
        }

    def inputs(self, prompts):
        inputs = super().inputs(prompts)
        if "pixel_values" in inputs:
            counts = [sum(not isinstance(part, int) and part[0] == "image" for part in parts) for parts in prompts]
            inputs["batch_num_images"] = torch.tensor(counts)
        return inputs

    def encode(self, model, inputs, kind, names):
        if kind == "video":
            output = super().encode(model, inputs, kind, names)
            if output.pooler_output.shape[1] == 4 * self.frames:  # transformers 5.17 adds the newline later
                newline = model.model.image_newline.expand(len(output.pooler_output), 1, -1)
                output.pooler_output = torch.cat([output.pooler_output, newline], 1)
            return output
        return model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs["batch_num_images"], return_dict=True
        )


class InternVL(Family):
    """Parts ("image", tiles, number): 9 tokens a tile."""

    has_video, tiles, side = False, True, 84
    beams = (1, 2)  # transformers 5.17 itself hands the tiles of an image to the wrong beams
    prompts = [
        [3, ("image", 2, 0), 6],
        [2, ("image", 1, 1), 7],
        [9],
        [1, ("image", 3, 2), ("image", 1, 3), 3],
    ]

    def make(self, attention):
        vision = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [self.side, self.side], "patch_size": [14, 14],
        }  # fmt: skip
        config = transformers.InternVLConfig(
            vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_id=IMAGE,
            tie_word_embeddings=False, attn_implementation=attention,
        )  # fmt: skip
        return transformers.InternVLForConditionalGeneration(config)

    def runs(self, part):
        return [9 * part[1]]

    def roles(self, part):
        return [(tile, 0, False) for tile in range(part[1]) for _ in range(9)]

    def pixels(self, part):
        return {"pixel_values": noise(part[1], 3, self.side, self.side, seed=part)}


class Qwen3(Qwen2):
    """As Qwen2; the frames of a video stand apart, and the first two layers add features."""

    mrope, patch, rows = "interleaved", 16, 3 * 2 * 16 * 16
    text = TEXT | {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
        },
    }  # fmt: skip

    def make(self, attention):
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        config = transformers.Qwen3VLConfig(
            vision_config=vision, text_config=self.text, attn_implementation=attention, **self.ids
        )
        return transformers.Qwen3VLForConditionalGeneration(config)

    def runs(self, part):
        return [part[-2] * part[-1]] * (part[1] if part[0] == "video" else 1)


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Qwen2(),
    "qwen2_5_vl": Qwen25(),
    "qwen3_vl": Qwen3(),
    "video_llava": VideoLlava(),
    "llava_onevision": LlavaOnevision(),
    "internvl": InternVL(),
}
SUPPRESSED = [IMAGE, VIDEO, START, END]
