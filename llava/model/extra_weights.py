"""Weights that lie beside a checkpoint's own: the CLIP tower's folder, a trained projector, LoRA adapters.

All of them are read tensor by tensor and copied or added into a model that is already loaded.

Why LoRA is merged here and not by `peft`: an adapter's names are those of the original layout, so reading, renaming,
ranks, alphas and checks stay here anyway (213 lines with peft 0.21, 210 without). It would add the product alone, take
an adapter that lacks half of its matrices without a word, and call what transformers 5.24 deprecates. That both give
the same weights is tested.
"""

import json
import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

_BUFFERS = ("inv_freq", "position_ids")
_LORA_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_TOWER = "model.vision_tower."


def is_buffer(name: str) -> bool:
    """Whether a name is of a buffer that old checkpoints hold and models compute by themselves."""
    return name.endswith(_BUFFERS)


def load_vision_weights(model: torch.nn.Module, tower: str) -> None:
    """Copy the weights of a CLIP folder (or hub id) into the model's vision tower.

    Raises:
        ValueError: The folder has no weights, or they do not fit the tower.
    """
    target = model.state_dict()
    missing = {name for name in target if name.startswith(_TOWER) and not is_buffer(name)}
    for name, tensor in _stored(tower, "model", "pytorch_model"):
        key = _in_model(f"{_TOWER}{name.removeprefix('vision_model.')}", target)
        if key in missing:  # a full CLIP model holds its text side too
            _copy(target, key, tensor, f"vision tower {tower}: {name}")
            missing.discard(key)
    if missing:
        raise ValueError(f"vision tower {tower} lacks {len(missing)} weights, for example {sorted(missing)[0]}")


def load_trained_parts(model: torch.nn.Module, path: str, renames: Mapping[str, str]) -> set[str]:
    """Complete a base language model with what a projector-only or LoRA checkpoint holds.

    Args:
        model: The model, loaded from the base.
        path: Folder or hub id with `mm_projector.bin`, or with `adapter_config.json`, `adapter_model.*` and
            `non_lora_trainables.bin`.
        renames: From original names to the model's.

    Returns:
        Names of the parameters that got a value; those an adapter was only added to are not among them.

    Raises:
        ValueError: The folder holds neither, or weights the model does not have.
    """
    names = ["mm_projector", "non_lora_trainables"]
    stored = [item for name in names for item in _stored(path, name, required=False)]
    adapter = _file(path, "adapter_config.json")
    if not stored and adapter is None:
        raise ValueError(
            f"{path} holds neither mm_projector.bin nor adapter_config.json, so nothing completes the base model; "
            "leave out --model-base for a checkpoint with all its weights"
        )
    target = model.state_dict()
    filled = set()
    for name, tensor in _without_wrappers(stored):
        if is_buffer(name):
            continue
        key = _in_model(_rename(name, renames), target)
        _copy(target, key, tensor, f"{path}: {name}")
        filled.add(key)
    if adapter is not None:
        _merge_adapter(target, path, json.loads(Path(adapter).read_text(encoding="utf-8")), renames)
    return filled


def is_partial(path: str) -> bool:
    """Whether a folder holds trained parts and no whole language model."""
    return any(_file(path, name) for name in ("adapter_config.json", "mm_projector.bin")) and not any(
        _file(path, f"{name}{index}")
        for name in ("model.safetensors", "pytorch_model.bin")
        for index in ("", ".index.json")
    )


def _merge_adapter(target: dict[str, Tensor], path: str, config: Mapping[str, Any], renames: Mapping[str, str]) -> None:
    """W += scaling * B A for every adapted module, in float32.

    Raises:
        ValueError: An adapter that is not plain LoRA, or does not fit the model.
    """
    kind = "DoRA" if config.get("use_dora") else config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{path}: only plain LoRA adapters can be merged, this one is {kind}")
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in _without_wrappers(_stored(path, "adapter_model")):
        match = _LORA_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{path}: adapter weight {name} is no LoRA matrix of a linear layer, it cannot be merged")
        pairs[match[1]][match[2]] = tensor
    for module, pair in pairs.items():
        key = _in_model(_rename(f"{module}.weight", renames), target)
        if set(pair) != {"A", "B"} or key not in target:
            raise ValueError(f"{path}: the adapter of {module} does not fit: it needs lora_A, lora_B and such a layer")
        weight = target[key]
        _check_place(weight, f"{path}: {module}")
        outer, inner = (pair[side].to(weight.device, torch.float32) for side in "BA")
        delta = outer @ inner * _scaling(module, pair, config)
        delta = delta.T if config.get("fan_in_fan_out") else delta
        if delta.shape != weight.shape:
            shapes = f"{tuple(delta.shape)}, the layer {tuple(weight.shape)}"
            raise ValueError(f"{path}: the adapter of {module} is {shapes}")
        weight.copy_(weight.float() + delta)


def _scaling(module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> float:
    """lora_alpha / r (or its square root for rank-stabilised LoRA), with a pattern's own alpha where one matches."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    rank = pair["A"].shape[0]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _without_wrappers(stored: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Weights under their names in the bare model: training wraps it once (`base_model.`) or twice (`model.`)."""
    bare = [(name.removeprefix("base_model."), tensor) for name, tensor in stored]
    if any(name.startswith("model.model.") for name, _ in bare):
        bare = [(name.removeprefix("model."), tensor) for name, tensor in bare]
    return bare


def _rename(name: str, renames: Mapping[str, str]) -> str:
    for pattern, replacement in renames.items():
        name = re.sub(pattern, replacement, name, count=1)
    return name


def _in_model(name: str, target: Mapping[str, Tensor]) -> str:
    """The name with or without CLIP's level `vision_model`, whichever the model has."""
    bare = name.replace(f"{_TOWER}vision_model.", _TOWER)
    candidates = (bare, bare.replace(_TOWER, f"{_TOWER}vision_model."), name)
    return next((candidate for candidate in candidates if candidate in target), name)


def _copy(target: Mapping[str, Tensor], key: str, tensor: Tensor, what: str) -> None:
    if key not in target:
        raise ValueError(f"{what} is unknown to the model that config.json describes")
    if target[key].shape != tensor.shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, expected {tuple(target[key].shape)}")
    _check_place(target[key], what)
    target[key].copy_(tensor)


def _check_place(weight: Tensor, what: str) -> None:
    """Raise where values cannot be written: a copy would be lost without a word."""
    if weight.is_meta:
        raise ValueError(f"{what} was offloaded by device_map; keep this part of the model on a device")
    if not weight.is_floating_point():
        raise ValueError(f"{what} is quantised; load without load_4bit/load_8bit, save the model, and quantise that")


def _file(path: str, name: str) -> str | None:
    """Local path of a file of a folder or hub id, None if it has no such file."""
    return cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def _stored(path: str, *names: str, required: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of `name.safetensors` or `name.bin`, whole or in shards; the first that is found.

    Raises:
        ValueError: No such file, or one that cannot be read.
    """
    for file in (f"{name}{suffix}" for suffix in (".safetensors", ".bin") for name in names):
        whole, index = _file(path, file), _file(path, f"{file}.index.json")
        if whole is None and index is None:
            continue
        shards = [file] if whole else sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        for shard in shards:
            yield from _tensors(_file(path, shard), f"{path}/{shard}")
        return
    if required:
        files = " nor ".join(f"{name}{suffix}" for name in names for suffix in (".safetensors", ".bin"))
        raise ValueError(f"{path} has neither {files}")


def _tensors(file: str | None, shown: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file, lazily."""
    if file is None:
        raise ValueError(f"{shown} is missing, although the index names it")
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():
                    yield name, weights.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)).items()
    except (OSError, EOFError, UnpicklingError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{shown} cannot be read: {str(error).splitlines()[0]}") from error
