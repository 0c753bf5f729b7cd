"""Presets with few narrow layers: the same prompts, budgets and code paths on a laptop."""

import dataclasses

from apet.bench.presets import PRESETS, Preset

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def shrunk(name: str) -> Preset:
    preset = PRESETS[name]
    config = preset.config()
    for field, value in (SMALL | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16}).items():
        setattr(config.text_config, field, value)
    vision = config.vision_config
    if hasattr(vision, "depth"):
        vision.depth, vision.hidden_size, vision.intermediate_size = 3, 64, 96
        vision.num_heads, vision.fullatt_block_indexes, vision.out_hidden_size = 4, [1], 64
        config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    else:
        for field, value in (SMALL | {"num_hidden_layers": 3, "projection_dim": 64}).items():
            setattr(vision, field, value)
    return dataclasses.replace(preset, config=lambda: config)
