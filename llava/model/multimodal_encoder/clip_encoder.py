"""The vision tower as LLaVA scripts know it: a view of the CLIP model inside a loaded model."""

from typing import Any

import torch
from torch import Tensor, nn

from apet.adapters import host


class CLIPVisionTower:
    """Features of a CLIP vision model for the projector.

    Owns no weights: it looks at a `CLIPVisionModel` that is part of the language model (or was loaded by
    `build_vision_tower`), so moving or casting the model moves the tower.

    Args:
        vision_model: A transformers CLIP vision model.
        image_processor: The processor of its checkpoint folder.
        args: Config with `mm_vision_select_layer` (-2) and `mm_vision_select_feature` ("patch" or "cls_patch").
    """

    is_loaded = True

    def __init__(self, vision_model: nn.Module, image_processor: Any, args: Any) -> None:
        self.vision_tower = vision_model
        self.image_processor = image_processor
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")

    def load_model(self, device_map: Any = None) -> None:
        """Nothing to do: the weights were loaded with the model."""

    def __call__(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """`forward`, which other tools replace by attribute."""
        return self.forward(images)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features (B, tokens, hidden) of pixels (B, 3, H, W); a list of (3, H, W) images gives a list."""
        if isinstance(images, list):
            return [self(image.unsqueeze(0)) for image in images]
        pixels = images.to(device=self.device, dtype=self.dtype)
        hidden, _ = host.tower_state(self.vision_tower, pixels, self.select_layer)
        return self.feature_select(hidden).to(images.dtype)

    def feature_select(self, hidden: Tensor) -> Tensor:
        """Drop the CLS token for "patch", keep it for "cls_patch".

        Raises:
            ValueError: Another `mm_vision_select_feature`.
        """
        if self.select_feature == "patch":
            return hidden[:, 1:]
        if self.select_feature == "cls_patch":
            return hidden
        raise ValueError(f"mm_vision_select_feature={self.select_feature!r} is unknown; use 'patch' or 'cls_patch'")

    @property
    def config(self) -> Any:
        """Config of the vision model."""
        return self.vision_tower.config

    @property
    def device(self) -> torch.device:
        """Device of the tower's weights."""
        return next(self.vision_tower.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the tower's weights."""
        return next(self.vision_tower.parameters()).dtype

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the square input."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, CLS not counted."""
        return self.num_patches_per_side**2

    @property
    def dummy_feature(self) -> Tensor:
        """Zeros (1, hidden_size)."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)
