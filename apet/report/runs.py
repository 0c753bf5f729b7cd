"""Scored runs on disk: every `X.score.json` below some folders, with the run record `X.run.json` beside it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.files import read_json, require_keys, user_path

_BUDGET_FIELDS = (
    "visual_token_num", "image_token_ratio", "video_token_num", "video_budget_per", "layer_list", "image_token_list",
    "image_token_ratio_list",
)  # fmt: skip
_ALL_TOKENS = 576  # of LLaVA-1.5, whose runs may have them as a budget: no compression
_SCORE_KEYS = ("name", "metric", "value", "n_questions")
_RECORD_KEYS = (
    "status", "settings", "environment", "counts", "layer_averaged_tokens", "samples_per_second", "failures",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """What scores must have in common to be compared: a benchmark's name, metric, question file and question count."""

    benchmark: str
    metric: str
    questions: str
    n_questions: int


@dataclass(frozen=True)
class Run:
    """One scored run: the files `X.score.json` and `X.run.json`.

    Attributes:
        path: The score file.
        score: Its content.
        record: Content of the run record.
    """

    path: Path
    score: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def column(self) -> Column:
        """What the score may be compared with."""
        digest = self.record["settings"]["question_file_sha256"]
        return Column(self.score["name"], self.score["metric"], digest, self.score["n_questions"])

    @property
    def model(self) -> str:
        """Name of the checkpoint."""
        return self.record["settings"]["model_id"]

    @property
    def compression(self) -> Mapping[str, Any]:
        """The compression settings."""
        return self.record["settings"]["compression"]

    @cached_property
    def vision_budget(self) -> Any:
        """Count or share that the vision stage keeps; None for all."""
        ratio, count = self.compression.get("image_token_ratio"), self.compression.get("visual_token_num")
        if ratio not in (None, 1.0):
            return ratio
        llava = "family" not in self.record["settings"] and self.compression.get("budget_per", "crop") == "crop"
        return None if llava and isinstance(count, int) and count >= _ALL_TOKENS else count

    @property
    def video_budget(self) -> str:
        """The budget of videos as text, where they have their own."""
        count, per = self.compression.get("video_token_num"), self.compression.get("video_budget_per", "auto")
        unit = "" if per == "auto" else f" per {per}"
        return "" if count is None else f"video {count}{unit}"

    @property
    def method(self) -> str:
        """Compression method, "none" where no budget is below the image's tokens."""
        limited = self.vision_budget is not None or self.video_budget or self.compression.get("layer_list")
        return self.compression["method"] if limited else "none"

    @property
    def budget(self) -> str:
        """The budgets as text: "96, 32 after layer 16"."""
        if self.method == "none":
            return "all"
        cuts = self.compression.get("image_token_list") or self.compression.get("image_token_ratio_list") or []
        layers = self.compression.get("layer_list") or []
        after = [f"{cut} after layer {layer}" for layer, cut in zip(layers, cuts, strict=False)]
        vision = "" if self.vision_budget is None else str(self.vision_budget)
        return ", ".join(filter(None, [vision, self.video_budget, *after]))

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """All settings but the compression and the names of files: what a run shares with its uncompressed one."""
        left_out = ("model_path", "model_id", "question_file_sha256", "compression", "sample_weights")
        return _flat({key: value for key, value in self.record["settings"].items() if key not in left_out})

    @cached_property
    def options(self) -> dict[str, Any]:
        """Options of the compression beside method and budgets; none for an uncompressed run."""
        if self.method == "none":
            return {}
        shown = {key: value for key, value in self.compression.items() if key not in (*_BUDGET_FIELDS, "method")}
        # An option of a method may have the name of a field; then the method's own value is the one that acts.
        return _flat(shown) | dict(shown.get("method_options", {}))

    @property
    def row(self) -> str:
        """Key of the table row. Programs differ in max_new_tokens, so that benchmarks of one row may, too."""
        protocol = {key: value for key, value in self.protocol.items() if key != "max_new_tokens"}
        return json.dumps([self.model, protocol, self.method, self.budget, self.options], sort_keys=True)

    @property
    def reference(self) -> str:
        """Key that a run shares with its uncompressed one."""
        return json.dumps([self.model, list(vars(self.column).values()), self.protocol], sort_keys=True)

    @property
    def tokens(self) -> float | None:
        """Visual tokens per question, averaged over decoder layers."""
        return self.record["layer_averaged_tokens"]

    @property
    def speed(self) -> float | None:
        """Questions answered per second."""
        return self.record["samples_per_second"]


def find_runs(places: Sequence[str]) -> list[Run]:
    """All scored runs below some folders; a run that two of them hold counts once.

    Raises:
        ValueError: A folder without any scored run, a score without its run record, or a broken one.
    """
    paths: dict[Path, None] = {}
    for place in places:
        path = user_path(place)
        found = [path] if path.name.endswith(".score.json") else sorted(path.rglob("*.score.json"))
        if not found:
            raise ValueError(f"{place} holds no *.score.json; run a benchmark script first")
        paths |= dict.fromkeys(path.resolve() for path in found)
    return [_read(path) for path in paths]


def _read(path: Path) -> Run:
    record_path = path.with_name(path.name.removesuffix(".score.json") + ".run.json")
    if not record_path.is_file():
        raise ValueError(f"{path} has no run record {record_path.name} beside it")
    score, record = (_read_object(file, keys) for file, keys in ((path, _SCORE_KEYS), (record_path, _RECORD_KEYS)))
    if isinstance(score["value"], bool) or not isinstance(score["value"], int | float):
        raise ValueError(f"{path}: value {score['value']!r} is not a number")
    require_keys(record["settings"], ("model_id", "compression", "question_file_sha256"), f"{record_path} settings")
    require_keys(record["settings"]["compression"], ("method",), f"{record_path} compression")
    require_keys(record["counts"], ("answers", "seconds"), f"{record_path} counts")
    return Run(path, score, record)


def _read_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    require_keys(content, keys, str(path))
    return content


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without nesting: {"generation": {"temperature": 0}} becomes {"temperature": 0}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return flat
