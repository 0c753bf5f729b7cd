"""How many tokens an image or video leaves in a prompt: functions of sizes alone."""

import numpy as np

from apet.adapters.stages import budget_for
from apet.adapters.vision import ImageLayout
from apet.config import ApetConfig, FamilyPreset


def image_tokens(config: ApetConfig, total: int) -> int:
    """Tokens left of an image of one crop with `total` tokens."""
    return budget_for(config.stage_budgets[0], total, 0, 1)


def tiled_image_tokens(config: ApetConfig, layout: ImageLayout) -> int:
    """Tokens left of an image of several crops: the budget of its crops or its own, and every newline.

    Newlines stay also where nothing is left of their line, as it is not known before encoding which lines those are.
    """
    real = layout.shown.sum(1)
    newlines = len(layout.columns) - int(real.sum())
    if config.budget_per == "image":
        # Every crop that shows something keeps at least one token.
        kept = max(image_tokens(config, int(real.sum())), int((real > 0).sum()))
    else:
        kept = int(np.minimum(image_tokens(config, layout.length), real).sum())
    return kept + newlines


def video_blocks(config: ApetConfig, preset: FamilyPreset, frames: int, per_frame: int) -> tuple[int, int, int]:
    """How a video is compressed: (blocks, tokens per block, tokens kept per block).

    Args:
        config: Settings.
        preset: Of the family: whether budgets of videos are for frames or for the clip.
        frames: Steps of the video's grid in time.
        per_frame: Tokens of a step.
    """
    scope = preset.video_budget_per if config.video_budget_per == "auto" else config.video_budget_per
    blocks, length = (frames, per_frame) if scope == "frame" else (1, frames * per_frame)
    budget = config.stage_budgets[0] if config.video_token_num is None else config.video_token_num
    return blocks, length, budget_for(budget, length, 0, 1)
