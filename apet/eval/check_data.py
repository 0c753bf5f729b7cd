"""Say what is there of benchmarks and checkpoints, and what is missing: ``apet check-data``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from apet.eval.data_check import DATA, Finding, check_benchmark, complete, find_data
from apet.eval.loader import find_loader
from apet.eval.scoring_cli import Parser
from apet.tables import markdown_table

_SCRIPTED = [entry.name for entry in DATA if entry.script]
_ABOUT = """Say what is there of benchmarks and checkpoints, and what is missing.

The exit status is 0 if everything that was asked for is complete, else 1."""
_EXAMPLES = """examples:
  apet check-data --benchmarks gqa,pope
  apet check-data --data data/sample/eval --benchmarks gqa --any-size --model data/sample/model/llava-v1.5-sample"""
_HUB = "the hub; the scripts expect data/model/<name>"


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is there; exit status 0 if it is all that was asked for."""
    args = parser().parse_args(argv)
    try:
        names = _SCRIPTED if args.benchmarks is None else [name for name in args.benchmarks.split(",") if name]
        found = {name: check_benchmark(find_data(name), args.data) for name in names}
        found |= {model: check_model(model) for model in args.model}
    except ValueError as error:
        print(f"apet check-data: error: {error}", file=sys.stderr)
        return 1
    return _report(found, args.any_size)


def parser() -> argparse.ArgumentParser:
    """The program's flags."""
    flags = Parser(prog="apet check-data", description=_ABOUT, epilog=_EXAMPLES)
    flags.add_argument("--data", default=os.environ.get("DATA", "data/eval"), help="folder of the benchmarks")
    flags.add_argument("--benchmarks", help=f"separated by commas (default: {','.join(_SCRIPTED)})")
    flags.add_argument("--model", action="append", default=[], help="a checkpoint folder too; may be repeated")
    flags.add_argument("--any-size", action="store_true", help="accept files of another size than the published ones")
    return flags


def check_model(path: str) -> list[Finding]:
    """Findings about the config, weights, tokenizer and vision tower of a checkpoint folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [Finding("missing", str(folder), "", f"checkpoint: {_HUB}")]
    config = _read_object(folder / "config.json")
    if isinstance(config, Finding):
        return [config]
    findings = [Finding("ok", str(folder / "config.json"), config.get("model_type", ""), "configuration")]
    findings += [_weights(folder), _tokenizer(folder)]
    if "mm_vision_tower" in config:
        findings.append(_vision_tower(config, folder))
    return findings


def _read_object(path: Path) -> dict | Finding:
    if not path.is_file():
        return Finding("missing", str(path), "", f"checkpoint: {_HUB}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return Finding("broken", str(path), str(error), f"checkpoint: {_HUB}")


def _weights(folder: Path) -> Finding:
    """The shards an index names, or one file of weights."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if not (folder / name).is_file():
            continue
        index = _read_object(folder / name)
        if isinstance(index, Finding):
            return index
        shards = sorted(set(index["weight_map"].values()))
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        state, found = ("missing", f"without {', '.join(absent)}") if absent else ("ok", f"{len(shards)} shards")
        return Finding(state, str(folder / name), found, f"weights: {_HUB}")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return Finding("ok", str(folder / name), f"{(folder / name).stat().st_size / 1e6:,.0f} MB", "weights")
    return Finding("missing", str(folder / "model.safetensors"), "no *.index.json either", f"weights: {_HUB}")


def _tokenizer(folder: Path) -> Finding:
    present = [name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()]
    if present and (folder / "tokenizer_config.json").is_file():
        return Finding("ok", str(folder / present[0]), "", "tokenizer")
    absent = folder / ("tokenizer_config.json" if present else "tokenizer.model")
    return Finding("missing", str(absent), "", f"tokenizer: {_HUB}")


def _vision_tower(config: dict, folder: Path) -> Finding:
    name = config["mm_vision_tower"]
    try:
        tower = find_loader([]).resolve_vision_tower(name, folder)
    except ValueError as error:
        return Finding("missing", name, str(error), "vision tower (a CLIP folder)")
    if Path(tower).is_dir():
        return Finding("ok", tower, "", "vision tower")
    return Finding("ok", tower, f"not on disk: fetched from the hub, or put in {folder.parent}", "vision tower")


def _report(found: dict[str, list[Finding]], any_size: bool) -> int:
    present = ("ok", "other size")
    rows = [
        (name, one.state, one.path, one.found, "" if one.state in present else one.source)
        for name, findings in found.items()
        for one in findings
    ]
    print(markdown_table(("for", "state", "file or folder", "found", "what it is, and where it comes from"), rows))
    whole = [name for name, findings in found.items() if complete(findings, any_size)]
    lacking = [name for name in found if name not in whole]
    print(f"complete: {', '.join(whole) or 'none'}")
    if lacking:
        print(f"not complete: {', '.join(lacking)}")
    if any(finding.state == "other size" for findings in found.values() for finding in findings) and not any_size:
        print("scores of files of another size compare with no published number; --any_size accepts them")
    return 1 if lacking else 0
