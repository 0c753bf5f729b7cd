"""What to compress and by how much: `ApetConfig`, checked before any model is touched, and the presets per family.

Budgets follow the published flags: `visual_token_num` tokens per image leave the vision stage, and directly after
decoder layer `layer_list[i]` (counted from 1) each image is cut to `image_token_list[i]` tokens. Ratios can stand in
for counts. Nothing given means no compression.
"""

import ast
import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POSITION_MODES = ("auto", "compact", "keep")
BUDGETS_PER = ("crop", "image", "prompt")
VIDEO_BUDGETS_PER = ("auto", "frame", "clip")
TOWER_MODES = ("merge", "restore", "lossless")
# Fields that only some methods read (`apet.methods.base.Method.reads`). `basis_token_num` and `seed` are none of them:
# the published scripts give the one to every method they compare, and sweeps the other.
METHOD_OPTIONS = ("basis_selection", "fps_start")


@dataclass(frozen=True)
class StagePreset:
    """How one stage of one family runs the algorithm (arguments of `apet.compress`)."""

    slots: str = "position"
    insertion: str = "overwrite"
    ridge: float = 1e-5


@dataclass(frozen=True)
class FamilyPreset:
    """The published settings of one model family: algorithm specification section 1.1, one row per stage.

    Attributes:
        vision: Vision stage of images, and of videos as a whole.
        llm: Stages inside the decoder.
        position_mode: Positions of the surviving tokens.
        frame: Vision stage of videos frame by frame.
        video_budget_per: What a video's budget is for: each "frame", or the "clip".
        budgets: Published budgets, as fields of `ApetConfig`; LLM budgets are for the middle layer.
    """

    vision: StagePreset = StagePreset()
    llm: StagePreset = StagePreset(slots="error")
    position_mode: str = "compact"
    frame: StagePreset = StagePreset()
    video_budget_per: str = "clip"
    budgets: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def stage(self, name: str) -> StagePreset:
        """The preset of stage "vision" or "llm"."""
        return self.vision if name == "vision" else self.llm


_QWEN = FamilyPreset(
    vision=StagePreset(insertion="blend"),
    llm=StagePreset(slots="error", insertion="blend", ridge=0.1),
    position_mode="keep",
    frame=StagePreset(insertion="blend"),
    budgets={"image_token_ratio": 0.3, "image_token_ratio_list": (0.333,)},
)

FAMILY_PRESETS: Mapping[str, FamilyPreset] = {
    "llava": FamilyPreset(),
    "llava_next": FamilyPreset(),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "video_llava": FamilyPreset(
        frame=StagePreset(insertion="append"), video_budget_per="frame", budgets={"video_token_num": 22}
    ),
    "llava_onevision": FamilyPreset(),
    "internvl": FamilyPreset(),
}


def _flag(default: Any) -> Any:
    """A field that the programs have a flag for; the others are given as ``--apet name=value,...``."""
    return dataclasses.field(default=default, metadata={"flag": True})


@dataclass(frozen=True)
class ApetConfig:
    """Budgets and options of one compression run. Frozen; checks itself.

    This is the one table of compression settings: the flags of the programs and docs/options.md are made of the fields,
    and the first sentence about a field is the help of its flag.

    Attributes:
        visual_token_num: Tokens kept per image at the vision stage. A list gives one count per image of the call, in
            prompt order. None, or at least the number of tokens of an image: no compression there.
        image_token_ratio: Share in (0, 1] of each image's tokens kept at the vision stage, in place of a count. Kept
            are int(ratio * N), at least 1.
        video_token_num: Tokens kept per frame or clip of a video at the vision stage (see `video_budget_per`). None: as
            for images. Tokens that a family adds (class tokens, the basis of Video-LLaVA's frames) come on top.
        layer_list: Decoder layers after which a stage cuts, counted from 1 and increasing.
        image_token_list: Tokens per image left by each decoder stage. An entry may be a list with one count per image.
        image_token_ratio_list: Shares of the tokens that enter each decoder stage, in place of counts.
        basis_token_num: Number k of basis tokens.
        method: Compression method of docs/methods.md.
        method_options: Hyper-parameters of the method that differ from the published ones, by name.
        basis_selection: How basis tokens are chosen: "fps", "dpc" or "random".
        fps_start: First basis token: "farthest" (from the mean), "first", or an index.
        position_mode: "compact" renumbers the surviving tokens, "keep" leaves them their original positions. "auto": as
            the method was made, where the host can; else what the model's family was published with.
        budget_per: What a budget is for: "crop", "image" or "prompt". "crop" is the published meaning for anyres
            images. "image": the vision budget is the image's and is split over its crops by error mass; the same for
            images of one crop. "prompt": all images and videos of a prompt share the budgets of every stage, as in the
            published code for Qwen2.5-VL; an image may vanish.
        video_budget_per: What a video's vision budget is for: each "frame", or the "clip", with selection across its
            frames; "auto" is what the family was published with. Budgets inside the decoder are the clip's.
        compat: "published" for the published accounting of anyres images, or None. With it, padding takes budget at the
            vision stage, and decoder stages cut only the first tokens of an image, as many as the previous budget.
        size_bias: Add the logarithm of the image tokens behind a token to its attention logits in the decoder. None: as
            the method was made, where the host can; engines such as vLLM cannot.
        seed: Seed of sampling, and of methods and bases that draw at random.
        tower_mode: What happens to patches inside the vision tower: "merge", "restore" or "lossless". "merge" keeps
            the worst rebuilt ones as method apet does and merges the rest into them, which count for their number in
            attention. "restore" computes only those that changed most, and puts the others back behind the tower by
            the mean change of their nearest computed ones. Both need a `tower_layer_list`; without one the tower runs
            whole. "lossless" leaves out patches whose pixels equal their prediction from the left, upper and
            upper-left patch.
        tower_layer_list: Layers of the vision tower after which patches are reduced, counted from 1 and increasing.
        tower_token_list: Patches per crop left by each tower stage, as counts, or as shares (below 1) of those that
            enter it.
        tower_key_layers: Layers behind a "restore" stage whose keys and values still hold every patch.
    """

    visual_token_num: int | tuple[int, ...] | None = _flag(None)
    image_token_ratio: float | None = _flag(None)
    video_token_num: int | None = None
    layer_list: tuple[int, ...] = _flag(())
    image_token_list: tuple[int | tuple[int, ...], ...] = _flag(())
    image_token_ratio_list: tuple[float, ...] = _flag(())
    basis_token_num: int = _flag(10)
    method: str = _flag("apet")
    method_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    basis_selection: str = "fps"
    fps_start: int | str = "farthest"
    position_mode: str = "auto"
    budget_per: str = "crop"
    video_budget_per: str = "auto"
    compat: str | None = None
    size_bias: bool | None = None
    seed: int = _flag(0)
    tower_mode: str = "merge"
    tower_layer_list: tuple[int, ...] = ()
    tower_token_list: tuple[int | float, ...] = ()
    tower_key_layers: int = 7

    def __post_init__(self) -> None:
        if not isinstance(self.method_options, Mapping):
            raise ValueError(f"method_options={self.method_options!r} must be a mapping of option names to values")
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if self.fps_start == "first":
            object.__setattr__(self, "fps_start", 0)
        for name in (field.name for field in dataclasses.fields(self) if field.name.endswith("_list")):
            values = () if getattr(self, name) is None else getattr(self, name)
            if not isinstance(values, tuple):
                raise ValueError(f"{name}={values!r} must be a list with one entry per stage")
            object.__setattr__(self, name, values)
        _check_counts("visual_token_num", self.visual_token_num)
        _check_counts("video_token_num", self.video_token_num)
        _check_ratio("image_token_ratio", self.image_token_ratio)
        self._check_layers()
        self._check_tower()
        self._check_options()
        self._check_decreasing()
        # A budget that is a float is a share, whole numbers included.
        if self.image_token_ratio is not None:
            object.__setattr__(self, "image_token_ratio", float(self.image_token_ratio))
        object.__setattr__(self, "image_token_ratio_list", tuple(map(float, self.image_token_ratio_list)))

    @property
    def stage_budgets(self) -> tuple[int | float | tuple[int, ...] | None, ...]:
        """One budget per stage: the vision stage first, then one per layer of `layer_list`. Ratios are floats."""
        vision = self.visual_token_num if self.image_token_ratio is None else self.image_token_ratio
        return (vision, *(self.image_token_list or self.image_token_ratio_list))

    @property
    def reduces_tower(self) -> bool:
        """Whether patches are reduced inside the vision tower."""
        return bool(self.tower_layer_list) or self.tower_mode == "lossless"

    def changed_options(self) -> dict[str, Any]:
        """Options that only some methods read, where they differ from their default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in METHOD_OPTIONS if getattr(self, name) != defaults[name]}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `ApetConfig.from_dict` reads them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ApetConfig":
        """Build from a mapping of field names.

        Raises:
            ValueError: An unknown field, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ValueError(f"unknown ApetConfig field {name!r}; known: {', '.join(sorted(known))}")
        return cls(**fields)

    @classmethod
    def from_json(cls, path: str) -> "ApetConfig":
        """Read a JSON file of field names and values."""
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def _check_layers(self) -> None:
        budgets = {"image_token_list": self.image_token_list, "image_token_ratio_list": self.image_token_ratio_list}
        given = [name for name, values in budgets.items() if values]
        if len(given) == 2:
            raise ValueError("give image_token_list or image_token_ratio_list, not both")
        if self.layer_list and not given:
            raise ValueError(f"layer_list={list(self.layer_list)} needs an image_token_list of the same length")
        for name in given:
            if len(budgets[name]) != len(self.layer_list):
                raise ValueError(
                    f"layer_list has {len(self.layer_list)} layers {list(self.layer_list)} but {name} has "
                    f"{len(budgets[name])} entries {list(budgets[name])}; give one entry per layer"
                )
        _check_increasing("layer_list", self.layer_list)
        for count in self.image_token_list:
            _check_counts("image_token_list", count)
        for ratio in self.image_token_ratio_list:
            _check_ratio("image_token_ratio_list", ratio)

    def _check_tower(self) -> None:
        layers, tokens = self.tower_layer_list, self.tower_token_list
        self._check_choice("tower_mode", TOWER_MODES)
        if not _is_int(self.tower_key_layers) or self.tower_key_layers < 0:
            raise ValueError(f"tower_key_layers={self.tower_key_layers!r} must be an int of at least 0")
        if len(layers) != len(tokens):
            raise ValueError(
                f"tower_layer_list has {len(layers)} layers {list(layers)} but tower_token_list has {len(tokens)} "
                f"entries {list(tokens)}; give one entry per layer"
            )
        most = {"merge": len(layers), "restore": 1, "lossless": 0}[self.tower_mode]
        if len(layers) > most:
            allowed = "one layer" if most else "no tower_layer_list: it acts in front of the first layer"
            raise ValueError(f"tower_layer_list={list(layers)}: tower_mode={self.tower_mode!r} takes {allowed}")
        _check_increasing("tower_layer_list", layers)
        for budget in tokens:
            share = isinstance(budget, float) and 0 < budget < 1
            if not share and not _is_count(budget):
                raise ValueError(
                    f"tower_token_list={list(tokens)} must hold counts of at least 1 or shares between 0 and 1; "
                    f"{budget!r} is neither"
                )
        counts = zip(layers, tokens, strict=True)
        check_not_growing([(f"the stage after tower layer {layer}", count) for layer, count in counts])

    def _check_options(self) -> None:
        if self.visual_token_num is not None and self.image_token_ratio is not None:
            raise ValueError("give visual_token_num or image_token_ratio, not both")
        if not _is_int(self.basis_token_num) or self.basis_token_num < 0:
            raise ValueError(f"basis_token_num={self.basis_token_num!r} must be an int of at least 0")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} must be an int of 0 .. 2**63 - 1")
        if self.basis_selection not in ("fps", "dpc", "random"):
            raise ValueError(f"basis_selection={self.basis_selection!r} is unknown; choose fps, dpc or random")
        if self.fps_start != "farthest" and not (_is_int(self.fps_start) and self.fps_start >= 0):
            raise ValueError(
                f"fps_start={self.fps_start!r} must be 'farthest' or a token index of at least 0 ('first' is 0)"
            )
        self._check_choice("position_mode", POSITION_MODES)
        self._check_choice("budget_per", BUDGETS_PER)
        self._check_choice("video_budget_per", VIDEO_BUDGETS_PER)
        if not isinstance(self.size_bias, bool | None):
            raise ValueError(f"size_bias={self.size_bias!r} must be true, false or none")
        if self.budget_per == "prompt":
            self._check_pooled()
        if self.compat not in (None, "published"):
            raise ValueError(f"compat={self.compat!r} is unknown; choose published, or leave it out")

    def _check_choice(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose {', '.join(allowed)}")

    def _check_pooled(self) -> None:
        """Raise where a budget shared by the prompt is given in parts."""
        if self.video_token_num is not None or self.video_budget_per == "frame":
            raise ValueError(
                "budget_per='prompt' pools videos with the images; leave out budgets of their own for videos"
            )
        if any(isinstance(budget, tuple) for budget in self.stage_budgets):
            raise ValueError("budget_per='prompt' shares one budget between the images; give a number, not a list")

    def _check_decreasing(self) -> None:
        stages = zip(self.layer_list, self.image_token_list, strict=False)
        check_not_growing([(f"the stage after layer {layer}", count) for layer, count in stages])


def attribute_texts(cls: type) -> dict[str, str]:
    """What the docstring of a class says about its attributes, by name, each as one line."""
    lines = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[2].split("\n\n")[0].splitlines()
    texts: dict[str, str] = {}
    for line in lines:
        name, colon, text = line.strip().partition(": ")
        if colon and line.startswith("    ") and not line.startswith("     "):
            texts[name] = text
        else:
            texts[next(reversed(texts))] += f" {line.strip()}"
    return texts


def check_not_growing(budgets: Sequence[tuple[str, Any]]) -> None:
    """Check (name, budget) pairs in the order of the stages; budgets that are no counts are passed over.

    Raises:
        ValueError: A stage that would keep more tokens than the one before leaves.
    """
    previous: tuple[str, int] | None = None
    for name, budget in budgets:
        if not _is_int(budget):
            continue
        if previous is not None and budget > previous[1]:
            raise ValueError(
                f"budgets must not grow from stage to stage: {name} keeps {budget} tokens but {previous[0]} leaves "
                f"only {previous[1]}"
            )
        previous = (name, budget)


def parse_list(text: str | Sequence | None, name: str) -> tuple:
    """A list flag as a tuple: a Python or JSON literal such as ``'[16]'``; None, ``'None'`` and ``'[]'`` are empty.

    The text is parsed as a literal, never evaluated.

    Raises:
        ValueError: The text is not a literal list.
    """
    if text is None:
        return ()
    value = text
    if isinstance(text, str):
        try:
            value = ast.literal_eval(text.strip() or "[]")
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"{name}={text!r} is not a list; write it like '[16]' or '[8, 16]'") from error
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}={text!r} is not a list; write it like '[{value}]'")
    return tuple(value)


def _plain(value: Any) -> Any:
    """Lists as tuples, numbers and arrays of numpy and torch as Python's."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _check_increasing(name: str, layers: Sequence[Any]) -> None:
    previous = 0
    for layer in layers:
        if not _is_int(layer) or layer <= previous:
            raise ValueError(
                f"{name}={list(layers)} must hold increasing layers counted from 1 (16 = after the 16th layer); "
                f"{layer!r} does not follow {previous}"
            )
        previous = layer


def _check_counts(name: str, value: Any) -> None:
    for count in value if isinstance(value, tuple) else (value,):
        if count is not None and (not _is_int(count) or count < 1):
            raise ValueError(f"{name}={value!r} must keep at least 1 token per image (leave it out to keep all)")


def _check_ratio(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value <= 1):
        raise ValueError(f"{name}={value!r} must be a share in (0, 1]")
