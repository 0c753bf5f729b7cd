"""Find and load the vision tower a LLaVA config names."""

from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessorPil, CLIPVisionModel

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

_HUB_OWNERS = ("openai", "laion")


def resolve_vision_tower(name: str | None, checkpoint: str | Path | None = None, override: str | None = None) -> str:
    """Folder (or hub id) of a vision tower.

    Looked for, in this order: `override`; `name` as a path; a folder of that name inside the checkpoint folder or
    beside it; a folder beside it called like the last component of `name`; a hub id of openai, laion or ShareGPT4V.

    Raises:
        ValueError: None of them; the message lists where it was looked for.
    """
    if override:
        if not Path(override).is_dir() and not _is_hub_id(override):
            raise ValueError(f"vision tower {override!r} is not a folder; give the folder of the CLIP checkpoint")
        return override
    if not name:
        raise ValueError("config.json names no vision tower (mm_vision_tower); give its folder with vision_tower=")
    candidates = [Path(name)]
    if checkpoint is not None and Path(checkpoint).is_dir():
        folder = Path(checkpoint).resolve()
        candidates += [folder / name, folder.parent / name, folder.parent / Path(name).name]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return str(candidate)
    if _is_hub_id(name):
        return name
    looked = ", ".join(dict.fromkeys(map(str, candidates)))
    raise ValueError(
        f"vision tower {name!r} (mm_vision_tower in config.json) was not found; looked for: {looked}. Put the CLIP "
        "folder beside the checkpoint, or name it with vision_tower=/path/to/clip"
    )


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> CLIPVisionTower:
    """Load the tower that `vision_tower_cfg.mm_vision_tower` (or `.vision_tower`) names, as a standalone CLIP model."""
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    path = resolve_vision_tower(name)
    model = CLIPVisionModel.from_pretrained(path, **kwargs)
    return CLIPVisionTower(model, CLIPImageProcessorPil.from_pretrained(path), vision_tower_cfg)


def _is_hub_id(name: str) -> bool:
    return "/" in name and not name.startswith(("/", ".")) and (name.startswith(_HUB_OWNERS) or "ShareGPT4V" in name)
