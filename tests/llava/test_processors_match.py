"""Prompts and pixels against transformers' own processors, where torchvision is there to build them.

Images are equal to the last bit. Frames differ by the rounding of another bicubic resize, two grey levels at most.
"""

import numpy as np
import pytest
import transformers
from families import FAMILIES
from family_checkpoints import write_checkpoint
from PIL import Image
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata

from apet.eval.videos import Clip
from llava.mm_utils import expand2square
from llava.model.processors import FamilyProcessor, Limits, load_processor

pytest.importorskip("torchvision", reason="transformers builds these processors with torchvision only")

# Family -> its processor, its video processor, and what the checkpoint's processor_config.json would say.
CLASSES = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor", {}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", {}),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", {}),
    "video_llava": (
        "VideoLlavaProcessor", "VideoLlavaVideoProcessor",
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": (
        "LlavaOnevisionProcessor", "LlavaOnevisionVideoProcessor",
        {"num_image_tokens": 9, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"},
    ),
    "internvl": ("InternVLProcessor", "InternVLVideoProcessor", {"image_seq_length": 9}),
}  # fmt: skip
INTERNVL_TOKENS = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def their_processor(family: str, ours: FamilyProcessor):
    """Transformers' processor with the same image processor and tokenizer."""
    name, video_name, fields = CLASSES[family]
    side = getattr(FAMILIES[family], "side", None)
    given = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if "qwen" in family:
        given |= {"patch_size": ours.image_processor.patch_size, "merge_size": 2, "temporal_patch_size": 2}
    elif family == "video_llava":
        given |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    else:
        given |= {"size": {"height": side, "width": side}}
    if family == "internvl":
        for key, token in INTERNVL_TOKENS.items():
            setattr(ours.tokenizer, key, token)
            setattr(ours.tokenizer, f"{key}_id", ours.tokenizer.convert_tokens_to_ids(token))
    video_processor = getattr(transformers, video_name)(**given)
    return getattr(transformers, name)(
        image_processor=ours.image_processor, tokenizer=ours.tokenizer, video_processor=video_processor, **fields
    )


def as_loaded(family: str, image: Image.Image, ours: FamilyProcessor) -> Image.Image:
    """What the published programs do with an image before the processor gets it."""
    if "qwen" in family:
        size = smart_resize(image.height, image.width, ours.factor, 4 * ours.factor**2, 16384 * ours.factor**2)
        return image.resize(size[::-1], Image.Resampling.BICUBIC)
    return expand2square(image, (127, 127, 127)) if family == "video_llava" else image


@pytest.mark.parametrize("shown", ["image", "two images", "video"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_prompt_and_pixels(family, shown, tmp_path):
    folder = write_checkpoint(family, tmp_path / family)
    ours = load_processor(str(folder), AutoConfig.from_pretrained(folder), Limits())
    theirs = their_processor(family, ours)
    images = {"image": [(120, 70)], "two images": [(120, 70), (64, 64)], "video": []}[shown]
    images = [picture(size, seed) for seed, size in enumerate(images)]
    clip, given = None, {"text": [ours.render("What?", len(images), not images, "llava_v1")], "return_tensors": "pt"}
    if images:
        loaded = [as_loaded(family, image, ours) for image in images]
        given["images"] = loaded if family == "video_llava" else [loaded]
    else:
        frames = tuple(picture((90, 60), seed) for seed in range(4))
        clip = Clip(frames, (0.0, 0.7, 1.4, 2.1), 3.0)
        given["videos"] = [np.stack([np.asarray(frame) for frame in frames])]
        given["video_metadata"] = [
            VideoMetadata(total_num_frames=30, fps=10.0, frames_indices=[0, 7, 14, 21], duration=3.0)
        ]
        given["do_sample_frames"] = False
    made, wanted = ours("What?", images, clip, "llava_v1"), theirs(**given)
    ids, expected = made.input_ids.tolist(), wanted["input_ids"][0].tolist()
    if (family, shown) == ("qwen3_vl", "video"):  # without the second pair of brackets around all times
        start, end = ours.config.vision_start_token_id, ours.config.vision_end_token_id
        expected.remove(start)
        del expected[len(expected) - 1 - expected[::-1].index(end)]
    assert ids == expected
    for name, value in made.tensors.items():
        other = wanted[name] if name in wanted else wanted["pixel_values_images"]
        tolerance = 4.5 / 255 if clip is not None and name.startswith("pixel_values") else 0
        np.testing.assert_allclose(value.float(), np.asarray(other, dtype=np.float32), rtol=0, atol=tolerance)
