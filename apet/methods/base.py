"""What a compression method is, what it may ask for, and the registry.

A method decides which tokens of a block survive and with which content. It sees token blocks only: no model, no
family. The patch asks it once per stage and group of equally long blocks, and hands it the few things it declared
(`Method.needs`): one attention row, keys, text.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apet.config import ApetConfig, StagePreset
from apet.core.types import CompressedTokens
from apet.methods.context import INPUTS, StageContext, StageInputs, missing_input


class Method:
    """Base class of compression methods: frozen dataclasses whose fields are the hyper-parameters.

    Layers of `needs_cls_attention` and `needs_vision_keys` index the vision tower; those of the decoder inputs count
    from the stage: 0 is the layer about to run, -1 the one before.

    Attributes:
        name: Lower-case name users type.
        paper: Name of the paper or origin.
        arxiv: Its arXiv number, "" if it has none.
        idea: One line for the table of methods.
        stages: Stages at which the method can run.
        features: Where its vision stage reads tokens: "pre_projector" or "post_projector".
        reads_sizes: Whether it weighs rows with the tokens that earlier stages folded into them.
        size_bias: Whether its rows count for as many tokens as they stand for where `ApetConfig.size_bias` does not say
            and the host's attention can take it.
        position_mode: Where its tokens stand where `ApetConfig.position_mode` does not say and the host can: "compact",
            "keep", or "auto" for what the model's family was published with.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    idea: ClassVar[str] = ""
    stages: ClassVar[tuple[str, ...]] = ("vision", "llm")
    features: ClassVar[str] = "pre_projector"
    reads_sizes: ClassVar[bool] = False
    size_bias: ClassVar[bool] = False
    position_mode: ClassVar[str] = "auto"

    needs_cls_attention: ClassVar[tuple[int, ...]] = ()
    needs_vision_keys: ClassVar[tuple[int, ...]] = ()
    needs_vision_states: ClassVar[bool] = False
    needs_vision_features: ClassVar[bool] = False
    needs_clip_relevance: ClassVar[bool] = False
    needs_text_embeddings: ClassVar[bool] = False
    needs_image_embeddings: ClassVar[bool] = False
    needs_text_hidden: ClassVar[bool] = False
    needs_attention_row: ClassVar[tuple[int, ...]] = ()
    needs_text_attention: ClassVar[tuple[int, ...]] = ()
    needs_keys: ClassVar[tuple[int, ...]] = ()
    needs_text_keys: ClassVar[tuple[int, ...]] = ()
    needs_final_norm: ClassVar[bool] = False

    @property
    def adaptive(self) -> bool:
        """Whether a block may get fewer rows than its budget; what is missing then has index -1 and stands last."""
        return False

    def select(self, tokens: Tensor, keep: int, context: StageContext) -> CompressedTokens:
        """Reduce blocks (B, N, D) to exactly `keep` rows each, 1 <= keep < N, `indices` ascending."""
        raise NotImplementedError

    def needs(self, stage: str) -> dict[str, tuple[int, ...]]:
        """Inputs the method asks for at a stage, by name, with their layers (empty where there is no layer)."""
        declared = {name: getattr(self, f"needs_{name}") for name, (at, _) in INPUTS.items() if stage in at}
        return {name: need if isinstance(need, tuple) else () for name, need in declared.items() if need}

    def reads(self, config: ApetConfig) -> Collection[str]:
        """Those of `apet.config.METHOD_OPTIONS` that have an effect in this configuration."""
        return ()

    def plan(self, average: float, tokens: int, layers: int) -> dict[str, Any]:
        """Budget fields of `ApetConfig` that spend `average` tokens per decoder layer as the method was published.

        Args:
            average: Visual tokens per image, averaged over the decoder layers.
            tokens: Visual tokens of an uncompressed image.
            layers: Decoder layers.

        Raises:
            ValueError: The method's stages cannot reach this average.
        """
        return {} if average >= tokens else {"visual_token_num": max(1, round(average))}


_METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method available under its name."""
    if cls.name != cls.name.lower():
        raise ValueError(f"method name {cls.name!r} must be lower case")
    if cls.name in _METHODS:
        raise ValueError(f"method name {cls.name!r} is already taken by {_METHODS[cls.name].__name__}")
    _METHODS[cls.name] = cls
    return cls


def method_names() -> list[str]:
    """Names of the registered methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str, **options: Any) -> Method:
    """The method registered under `name`, with hyper-parameters other than the published ones.

    Raises:
        ValueError: Unknown name or option, or an option out of range; the message gives the available ones.
    """
    if name not in _METHODS:
        raise ValueError(unknown_name("method", name, method_names()))
    known = [field.name for field in dataclasses.fields(_METHODS[name])]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of method {name!r}:", option, known or ["none at all"]))
    hints = typing.get_type_hints(_METHODS[name])
    return _METHODS[name](**{option: _typed(name, option, value, hints[option]) for option, value in options.items()})


def _typed(method: str, option: str, value: Any, hint: Any) -> Any:
    """The value as its field's type: an int does for a float, and False, which switches off, for 0.

    Raises:
        ValueError: It is of another type.
    """
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) in allowed or any(typing.get_origin(kind) for kind in allowed):
        return value
    number = value is False and (int in allowed or float in allowed)
    if number or (type(value) is int and float in allowed):
        return 0 if number else float(value)
    names = " or ".join("none" if kind is type(None) else kind.__name__ for kind in allowed)
    raise ValueError(f"option {option}={value!r} of method {method!r} must be {names}")


def keeps_positions(config: ApetConfig, family: str) -> bool:
    """Whether surviving tokens keep their positions: as the configuration says, else its method, else the family.

    Args:
        config: The configuration.
        family: What the model's family was published with, "compact" or "keep".
    """
    method = get_method(config.method, **config.method_options)
    return next(mode for mode in (config.position_mode, method.position_mode, family) if mode != "auto") == "keep"


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """Message for an unknown registry name: what, which value, the nearest and all allowed ones."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Available: {', '.join(known)}"


@dataclass(frozen=True)
class Selector:
    """A method bound to one stage of one configuration: a function of (blocks, keep).

    Attributes:
        method: The method with its hyper-parameters.
        context: What is known before the first call.
    """

    method: Method
    context: StageContext

    @property
    def needs(self) -> dict[str, tuple[int, ...]]:
        """Inputs the method will ask for at this stage; see `Method.needs`."""
        return self.method.needs(self.context.stage)

    @property
    def features(self) -> str:
        """Where the vision stage must take its tokens: "pre_projector" or "post_projector"."""
        return self.method.features

    @property
    def reads_sizes(self) -> bool:
        """Whether the method wants `sizes`."""
        return self.method.reads_sizes

    @property
    def size_bias(self) -> bool:
        """Whether sizes go into the attention of a host that can: the configuration's wish, else the method's."""
        wish = self.context.config.size_bias
        return self.method.size_bias if wish is None else wish

    @property
    def adaptive(self) -> bool:
        """Whether blocks may get fewer rows than asked for."""
        return self.method.adaptive

    def __call__(
        self,
        tokens: Tensor,
        keep: int,
        *,
        grid: tuple[int, int] | None = None,
        sizes: Tensor | None = None,
        inputs: StageInputs | None = None,
    ) -> CompressedTokens:
        """Reduce blocks (B, N, D) to `keep` rows; the keywords are fields of `StageContext`."""
        context = dataclasses.replace(self.context, grid=grid, sizes=sizes, inputs=inputs)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.method.select(tokens, keep, context)


def selector(
    config: ApetConfig,
    stage: str,
    preset: StagePreset,
    *,
    layer: int = 0,
    num_layers: int = 0,
    options: Mapping[str, Any] | None = None,
    available: Collection[str] | None = None,
) -> Selector:
    """The configured method as a function of (blocks, keep) for one stage.

    Args:
        config: The user's configuration; `config.method` names the method.
        stage: "vision" or "llm".
        preset: The family's settings for the stage.
        layer: Decoder layers that run before the stage.
        num_layers: Decoder layers of the model.
        options: Hyper-parameters that differ from those of the configuration.
        available: Names of the inputs (`INPUTS`) the model can provide; None to find out when they are asked for.

    Raises:
        ValueError: Unknown method or option, a method that cannot run at this stage, or one that needs what the model
            cannot provide.
    """
    method = get_method(config.method, **{**config.method_options, **(options or {})})
    if stage not in method.stages:
        runs = f"it runs at: {', '.join(method.stages)}" if method.stages else "it keeps every token"
        raise ValueError(f"method {method.name!r} has no {stage} stage ({runs}); leave that stage out of the budgets")
    for name, layers in method.needs(stage).items():
        if available is not None and name not in available:
            raise ValueError(missing_input(method.name, name, layers, stage, "the model does not provide it"))
    return Selector(method, StageContext(stage, preset, config, layer, num_layers))
