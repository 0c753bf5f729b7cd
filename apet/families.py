"""docs/families.md, the table of model families, from the registry; scripts/make_docs.py writes it."""

from apet.adapters import Adapter, registered
from apet.config import FAMILY_PRESETS, FamilyPreset

_HEAD = """# Model families

Written by `python scripts/make_docs.py` from the registered adapters. Any model of these
transformers classes can be given to `apet.apply_patch`; `apet.preset_config(model)` holds the preset budgets.

"""

_COLUMNS = (
    "family",
    "transformers class",
    "vision stage",
    "decoder stages",
    "positions",
    "several images",
    "video",
    "preset budgets",
    "proof",
)

_NOTES = """
- **Vision stage.** Before the projector, only kept rows pass through it. On the embedded tokens, the encoder's
  output is compressed where the decoder receives it. `budget_per` says what a budget is for: a crop or tile, an
  image, or the prompt (on embedded tokens only; an image may vanish).
- **Video.** `video_budget_per="frame"` compresses frame by frame, `"clip"` selects across all frames of a clip;
  the table gives the default. Class tokens of frames and newlines take no budget and stay as long as a token of
  their frame or line does. Video-LLaVA's frames get their basis tokens appended: class token + 22 merged + 10
  basis = 33 rows of 257. Budgets inside the decoder are the clip's.
- **Positions.** "keep" leaves the surviving tokens their positions, "compact" numbers them anew;
  `position_mode` sets either.
- **Programs.** `python -m llava.eval.model_vqa_loader`, `model_vqa`, `model_vqa_mmbench`, `model_vqa_science` and
  `run_llava` answer with checkpoints of every family; `python -m llava.eval.video_qa` with those that see videos,
  InternVL by showing it the frames as images.
- **Preset budgets.** Published for Qwen2.5-VL and Video-LLaVA; Qwen2-VL and Qwen3-VL take those of Qwen2.5-VL.
  The published Qwen2.5-VL code leaves its decoder stage off and so keeps 30 % in all layers; with it the
  average is 20 %.
- **Proof.** `tests/test_patch_families.py` and `tests/test_patch_reference.py` compare greedy tokens and logits
  with an independent float64 decoder that has no cache and no padding: no stage, vision stage, decoder stage,
  both; one prompt and a left-padded batch of different images, several images, text only and, where the model
  has them, videos; sdpa and eager attention; dynamic, static and no cache; both position modes. They also check
  that keeping all tokens and removing the patch are bit-identical. LLaVA-NeXT is held to invariances (batch,
  caches, budgets, bit-identity) instead. All of this on tiny models with random weights, with the oldest and
  the newest supported transformers.
"""


def page() -> str:
    """The whole document."""
    rows = [_row(adapter) for adapter in registered()]
    lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS), *(" | ".join(row) for row in rows)]
    return _HEAD + "".join(f"| {line} |\n" for line in lines) + _NOTES


def _row(adapter: type[Adapter]) -> tuple[str, ...]:
    preset = FAMILY_PRESETS[adapter.family]
    before = adapter.projector is not Adapter.projector
    limited = adapter.first_stage_layer is not Adapter.first_stage_layer
    video = f"{adapter.videos}; per {preset.video_budget_per}" if adapter.videos else "-"
    return (
        f"`{adapter.family}`",
        ", ".join(f"`{name}`" for name in adapter.classes),
        "before the projector" if before else "on the embedded tokens",
        "behind the layers that add visual features" if limited else "after any layer",
        f"{'M-RoPE, ' if adapter.position_axes == 3 else ''}{preset.position_mode}",
        "tiles that touch are one image" if adapter.runs_are_items else "yes",
        video,
        _budgets(preset),
        ", ".join(f"`{path}`" for path in adapter.proof),
    )


def _budgets(preset: FamilyPreset) -> str:
    parts = [f"`{name}={list(value) if isinstance(value, tuple) else value}`" for name, value in preset.budgets.items()]
    if any(name.endswith("_list") for name in preset.budgets):
        parts.append("after the middle layer")
    return ", ".join(parts) or "-"
