"""What the patch must know about a model family, and the registry of families.

An adapter is data and a few look-ups; it never sees a compression method: base model, text model, placeholder ids,
where features can be compressed before the projector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.layout import Item, Layout, square
from apet.adapters.vision import ImageLayout
from apet.config import FAMILY_PRESETS, FamilyPreset

_IN_TOWER = ("cls_attention", "vision_keys", "vision_states")
_IN_LAYER = ("attention_row", "text_attention", "keys", "text_keys")


@dataclass(frozen=True)
class UsualImage:
    """The image, or clip, that predictions about a family speak of.

    Attributes:
        what: It in words, with its size.
        tokens: Visual tokens that budgets count.
        crops: Crops, tiles or frames that it is encoded as.
        beside: Newlines and class tokens, which take no budget, at most.
        grid: (rows, columns) of patches, where the family takes images of any size.
    """

    what: str
    tokens: int
    crops: int = 1
    beside: int = 0
    grid: tuple[int, int] | None = None


class Adapter:
    """One model family. Subclasses set the class attributes and override look-ups that differ.

    Attributes:
        family: Key of the family's preset.
        model_types: `config.model_type` values of the transformers classes served.
        classes: Names of these classes.
        videos: How videos reach the model; None where it takes none.
        proof: Test files that compare the family with an independent reference.
        position_axes: Rows of the rotary positions: 1, or 3 (time, height, width) with M-RoPE.
        runs_are_items: Encoded images whose placeholders touch are tiles of one image.
        no_class_token: Why nobody can ask for the attention of a class token, where `class_token_towers` is empty.
        tower_modes: Modes of the tower stage (`ApetConfig.tower_mode`) that the family can have.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    classes: ClassVar[tuple[str, ...]]
    videos: ClassVar[str | None] = None
    proof: ClassVar[tuple[str, ...]] = ()
    position_axes: ClassVar[int] = 1
    runs_are_items: ClassVar[bool] = False
    no_class_token: ClassVar[str] = "the vision tower has no class token"
    tower_modes: ClassVar[tuple[str, ...]] = ()

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
        """The decoder."""
        return self.base_model.language_model

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers in order."""
        return self.text_model.layers

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids that stand for visual tokens in `input_ids`: that of images, then that of videos."""
        config = self.model.config
        return (config.image_token_id,) if self.videos is None else (config.image_token_id, config.video_token_id)

    @property
    def projector(self) -> nn.Module | None:
        """Module whose input rows the vision stage compresses, or None to compress the embeddings it produced."""
        return None

    @property
    def row_projector(self) -> nn.Module | None:
        """Module that maps rows of a tower to tokens one by one, None where tokens are made otherwise."""
        return self.projector

    @property
    def towers(self) -> list[nn.Module]:
        """Vision models whose last layers may go unused."""
        return []

    @property
    def class_token_towers(self) -> list[nn.Module]:
        """Those of `towers` with a class token in front of patches that become tokens one by one."""
        return [tower for tower in self.towers if host.has_class_token(tower)]

    @property
    def reducible_towers(self) -> list[nn.Module]:
        """Vision models that a tower stage can run in."""
        return self.towers

    @property
    def tower_depth(self) -> int:
        """Layers of these in front of the features that are read.

        Raises:
            ValueError: Features of several layers are read.
        """
        layer = self.model.config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(f"the model joins the features of several tower layers (vision_feature_layer={layer})")
        count = min(len(host.tower_layers(tower)) for tower in self.towers)
        return layer if layer >= 0 else count + 1 + layer

    @property
    def crop_tokens(self) -> int | None:
        """Visual tokens of every crop, where all have equally many and that is known before one is seen."""
        return None

    @property
    def single_crop(self) -> bool:
        """Whether every image is encoded as one crop, so that all budgets count the same tokens."""
        return True

    @property
    def first_stage_layer(self) -> int:
        """Smallest layer in front of which a decoder stage may run."""
        return 1

    @property
    def usual_image(self) -> UsualImage:
        """What the family is usually asked about."""
        raise NotImplementedError

    def image_items(self, features: Sequence[Tensor], given: Mapping[str, Any]) -> list[Item]:
        """The images of an encoder call.

        Args:
            features: What `get_image_features` returned: per image (T, D).
            given: The arguments of the call.
        """
        return [Item((len(one),), grid=square(len(one))) for one in features]

    def video_items(self, features: Sequence[Tensor], given: Mapping[str, Any], per_frame: bool) -> list[Item]:
        """The same for videos; `per_frame` asks for the borders of the frames."""
        raise NotImplementedError

    def shorten_inputs(self, kwargs: dict, before: Layout, after: Layout, source: Tensor) -> dict:
        """What the text model gets beside embeddings, mask and positions, cut to the columns `source` (B, L')."""
        return kwargs

    def crop_layouts(self, given: Mapping[str, Any]) -> Sequence[ImageLayout] | None:
        """How the crops of an encoder call will be arranged, given its arguments; None where each is an image."""
        return None

    def unavailable(self, name: str, layers: Sequence[int]) -> str | None:
        """Why the family cannot provide an input of these layers; None if it can.

        Args:
            name: Key of `apet.methods.context.INPUTS`.
            layers: Of the tower as `attentions[layer]` counts them; of the decoder 0 is the layer about to run.
        """
        if name == "clip_relevance":
            return "CLIP's text tower is no part of the model"
        if name in _IN_TOWER:
            if not self.class_token_towers:
                return self.no_class_token
            depth = min(len(host.tower_layers(tower)) for tower in self.class_token_towers)
            return None if all(-depth <= layer < depth for layer in layers) else f"the vision tower has {depth} layers"
        if name == "vision_features" and self.row_projector is None:
            return "its tokens are not the tower's one by one"
        if name in _IN_LAYER and any(layer not in (-1, 0) for layer in layers):
            return "only the layer about to run (0) and the one before it (-1) are watched"
        return None


_ADAPTERS: dict[str, type[Adapter]] = {}


def registered() -> list[type[Adapter]]:
    """Every adapter once, in the order of registration."""
    return list(dict.fromkeys(_ADAPTERS.values()))


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
    if model_type in _ADAPTERS and hasattr(model, "generate"):
        return _ADAPTERS[model_type](model)
    inner = getattr(model, "module", None)
    hint = "pass its .module" if isinstance(inner, nn.Module) else "pass the whole model, with its language-model head"
    raise TypeError(
        f"{type(model).__name__} (model type {model_type!r}) is not a model ApET can patch; {hint}. It serves the "
        f"...ForConditionalGeneration classes of: {', '.join(sorted(_ADAPTERS))}"
    )
