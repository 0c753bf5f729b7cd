"""What the patch must know about a model family, and the registry of families.

An adapter is data and a few look-ups; it never sees a compression method: base model, text model, placeholder ids,
where features can be compressed before the projector.
"""

from typing import ClassVar, Protocol

from torch import nn

from apet.adapters.vision import VisionStage
from apet.config import FAMILY_PRESETS, FamilyPreset


class Removable(Protocol):
    """Anything that can be taken off a model again: hook handles, wrapped methods."""

    def remove(self) -> None:
        """Undo it."""


class Adapter:
    """One model family. Subclasses set the class attributes and override look-ups that differ.

    Attributes:
        family: Key of the family's preset.
        model_types: `config.model_type` values of the transformers classes served.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def preset(self) -> FamilyPreset:
        """Published settings of the family."""
        return FAMILY_PRESETS[self.family]

    @property
    def base_model(self) -> nn.Module:
        """The model without its language-model head: receives input ids, encodes images, calls the text model."""
        return self.model.model

    @property
    def text_model(self) -> nn.Module:
        """The decoder, with `layers`, `rotary_emb` and `config`."""
        return self.base_model.language_model

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers in order."""
        return self.text_model.layers

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids that stand for visual tokens in `input_ids`."""
        return (self.model.config.image_token_id,)

    @property
    def projector(self) -> nn.Module | None:
        """Module whose input rows the vision stage compresses, or None to compress the embeddings it produced."""
        return None

    @property
    def single_crop(self) -> bool:
        """Whether every image is encoded as one crop, so that all budgets count the same tokens."""
        return True

    def attach_encoder(self, vision: VisionStage) -> list[Removable]:
        """What the family needs around its image encoder so that the vision stage knows how crops are arranged."""
        return []


_ADAPTERS: dict[str, type[Adapter]] = {}


def register(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: serve the adapter's model types."""
    for model_type in cls.model_types:
        if model_type in _ADAPTERS:
            raise ValueError(f"model type {model_type!r} already has an adapter: {_ADAPTERS[model_type].__name__}")
        _ADAPTERS[model_type] = cls
    return cls


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a transformers model.

    Raises:
        TypeError: The model is of no known family.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _ADAPTERS or not hasattr(model, "generate"):
        raise TypeError(
            f"{type(model).__name__} (model type {model_type!r}) is not a model ApET can patch; it serves the "
            f"...ForConditionalGeneration classes of: {', '.join(sorted(_ADAPTERS))}"
        )
    return _ADAPTERS[model_type](model)
