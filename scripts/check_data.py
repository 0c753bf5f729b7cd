"""Say what is there of benchmarks and checkpoints, what is missing, and which file goes where.

Exit status 0 if everything asked for is complete, else 1: `python scripts/check_data.py --benchmarks gqa,pope`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from apet.eval.data_check import DATA, Finding, check_benchmark, complete, find_data, layout_table, markdown_table
from apet.eval.scoring_cli import Parser

_SCRIPTED = [entry.name for entry in DATA if entry.script]
_HUB = "the hub; the scripts expect data/model/<name>"
_CHECKPOINTS = (
    ("`llava-v1.5-7b`", "liuhaotian/llava-v1.5-7b", "`scripts/llava1_5`"),
    ("`llava-v1.6-vicuna-7b`", "liuhaotian/llava-v1.6-vicuna-7b", "`scripts/llava1_6`"),
    ("`Qwen2.5-VL-7B-Instruct`", "Qwen/Qwen2.5-VL-7B-Instruct", "`scripts/qwen2_5_vl`"),
    ("`Video-LLaVA-7B-hf`", "LanguageBind/Video-LLaVA-7B-hf", "`scripts/video_llava`"),
    ("`clip-vit-large-patch14-336`", "openai/clip-vit-large-patch14-336", "vision tower of LLaVA-1.5"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is there; exit status 0 if it is all that was asked for."""
    args = parser().parse_args(argv)
    if args.readme:
        sys.stdout.write(readme())
        return 0
    try:
        names = _SCRIPTED if args.benchmarks is None else [name for name in args.benchmarks.split(",") if name]
        found = {name: check_benchmark(find_data(name), args.data) for name in names}
        found |= {model: check_model(model) for model in args.model}
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 1
    return _report(found, args.any_size)


def parser() -> argparse.ArgumentParser:
    """The program's flags."""
    flags = Parser(prog="check_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", default=os.environ.get("DATA", "data/eval"), help="folder of the benchmarks")
    flags.add_argument("--benchmarks", help=f"separated by commas (default: {','.join(_SCRIPTED)})")
    flags.add_argument("--model", action="append", default=[], help="a checkpoint folder too; may be repeated")
    flags.add_argument("--any-size", action="store_true", help="accept files of another size than the published ones")
    flags.add_argument("--readme", action="store_true", help="print data/README.md instead")
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
    from llava.model.multimodal_encoder.builder import resolve_vision_tower

    name = config["mm_vision_tower"]
    try:
        tower = resolve_vision_tower(name, folder)
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


def readme() -> str:
    """The text of data/README.md."""
    scripted = layout_table([entry for entry in DATA if entry.script])
    others = layout_table([entry for entry in DATA if not entry.script])
    return f"""# Data: what goes where

Written by `python scripts/check_data.py --readme > data/README.md`; do not edit by hand. Nothing below `data/eval` and
`data/model` is in git. `data/sample` is: a small checkpoint and small benchmarks in the same layout
(`MODEL=data/sample/model/llava-v1.5-sample DATA=data/sample/eval LAYER_LIST='[6]' bash scripts/llava1_5/gqa.sh`).

`python scripts/check_data.py` says what is there and what is missing, by benchmark, and exits with 0 if all is
complete; `--benchmarks gqa,pope` restricts it, `--data` names another folder, `--model` a checkpoint to look at too,
and `--any_size` accepts files of another size than the published ones, as those of the sample are.

## Benchmarks: `data/eval`

Scripts take another folder from the variable `DATA`, and write answers and scores below it, or below `OUT`.

{scripted}
- GQA: the official `eval.py` needs files that were never published for this split. The scorer in this repository needs
  only the answers above; if `gqa/eval.py` is there, its numbers are printed too. The same goes for MME and
  `MME/eval_tool/calculation.py`.
- MME: images and ground truth may lie directly in `<category>/`, or in `<category>/images` and
  `<category>/questions_answers_YN`; `MME_Benchmark_release_version` may hold a further folder `MME_Benchmark`.
- POPE: `llava_pope_test.jsonl` belongs to the label files of August 2023 (2,910 random questions); newer ones work too.
- ScienceQA: an image is `images/test/<question id>/image.png`.
- MSVD-QA, MSRVTT-QA, TGIF-QA, ActivityNet-QA: a video is `<video_name>` with the extension .mp4, .avi, .mov or .mkv;
  for ActivityNet-QA `v_<video_name>`. Answers are joined by `question_id` where `test_a.json` has it, else by place.
- VizWiz, VQAv2: their answers are with the evaluation servers; the scripts write the file to upload. MMBench is scored
  here and has an upload file as well.

Without scripts, but known to the programs (`--benchmark`):

{others}
## Checkpoints: `data/model`

{markdown_table(("folder", "checkpoint on the hub", "what for"), _CHECKPOINTS)}
Other checkpoints of these families: `MODEL=<folder or hub id> bash scripts/...`. A vision tower that is not beside its
checkpoint is taken from the hub.
"""


if __name__ == "__main__":
    sys.exit(main())
