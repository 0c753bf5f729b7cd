"""Answer and score a published benchmark: ``apet eval FAMILY BENCHMARK``.

What is published is in `apet.eval.recipes`; this is the command around it: settings from flags and environment
variables, the name of the run, and its steps one after another. An interrupted run goes on where it stopped when the
same command is started again.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apet.config import ApetConfig
from apet.eval.benchmarks.files import read_json, user_path
from apet.eval.chunks import Chunk, make_chunks, run_chunks, unfinished_count
from apet.eval.hub import write_benchmark
from apet.eval.recipes import FAMILIES, Family, Place, Recipe, Step, recipe
from apet.eval.scoring_cli import Parser

# Flags of the answering program that are set here: given twice, answers would go where nothing finds them.
_TAKEN = {
    "--answers-file": "OUT and EXPERIMENT (--out, --experiment) say where answers go",
    "--question-file": "DATA and SPLIT (--data, --split) say which questions",
    "--num-chunks": "CHUNKS (--chunks) says how many processes",
    "--chunk-idx": "CHUNKS (--chunks) says how many processes",
    "--model-path": "MODEL (--model) says which checkpoint",
}
_USUAL = "usual"  # instead of the id of a data set
_EXAMPLES = """examples:
  apet eval llava1_5 pope --tokens 64
  apet eval llava1_5 pope --tokens 64 --model data/sample/model/llava-v1.5-sample --data data/sample/eval   the sample
  apet eval llava1_5 gqa --tokens none --batch_size 8          the uncompressed model; --batch_size is the program's
  CUDA_VISIBLE_DEVICES=0,1 apet eval llava1_6 mme --limit 20   a process per GPU; a part is answered and not scored
  VISUAL_TOKEN_NUM=100 LAYER_LIST='[8,16]' IMAGE_TOKEN_LIST='[50,20]' apet eval llava1_5 textvqa

Other flags go to the program that answers (python -m llava.eval.model_vqa_loader --help). The variable in brackets sets
a flag, too. Further variables set the program's flags of their names: VISUAL_TOKEN_NUM, IMAGE_TOKEN_RATIO,
LAYER_LIST, IMAGE_TOKEN_LIST, IMAGE_TOKEN_RATIO_LIST, BASIS_TOKEN_NUM, BATCH_SIZE, NUM_WORKERS,
DTYPE, DEVICE, CONV_MODE; VIDEO_TOKEN_NUM sets --apet video_token_num. PYTHON is the interpreter of the programs."""


def parser() -> Parser:
    """The flags of the command; every one takes its default from the environment variable of its help."""
    flags = Parser(
        prog="apet eval", description="Answer and score a published benchmark with a model family.",
        usage="apet eval FAMILY BENCHMARK [options]", epilog=_EXAMPLES, allow_abbrev=False,
    )  # fmt: skip
    flags.add_argument("family", metavar="FAMILY", choices=tuple(FAMILIES), help=", ".join(FAMILIES))
    known = dict.fromkeys(name for family in FAMILIES.values() for name in family.benchmarks)
    flags.add_argument("benchmark", metavar="BENCHMARK", choices=tuple(known), help=", ".join(known))
    group = flags.add_argument_group("what is run")
    _add(group, "--tokens", "TOKENS", "a published budget of the family, or none for all tokens")
    _add(group, "--method", "METHOD", "compression method", "apet")
    _add(group, "--compat", "COMPAT", "published: the published accounting of LLaVA-1.6 images")
    _add(group, "--model", "MODEL", "checkpoint folder or hub id")
    _add(group, "--split", "SPLIT", "question file, where a benchmark has several")
    _add(group, "--ocr", "OCR", "1 or 0: TextVQA with or without OCR tokens in the prompt")
    _add(group, "--annotations", "ANNOTATIONS", "VQAv2 annotations with published answers, to score them here")
    _add(group, "--mme-part", "MME_PART", "1: score the MME categories that are there, where some are not")
    _add(group, "--judge", "JUDGE", "chat model that judges answers about videos (server: OPENAI_BASE_URL)")
    group = flags.add_argument_group("where and how")
    _add(group, "--data", "DATA", "folder of the benchmarks", "data/eval")
    about = "fill DATA first: a hub data set (ORG/NAME; no value: the usual one) or a folder of parquet files"
    _add(group, "--dataset", "DATASET", about, nargs="?", const=_USUAL)
    _add(group, "--image-folder", "IMAGE_FOLDER", "images of this benchmark (default: its own below DATA)")
    _add(group, "--out", "OUT", "root of answers and scores (default: DATA)")
    _add(group, "--experiment", "EXPERIMENT", "their name (default: checkpoint and settings)")
    _add(group, "--chunks", "CHUNKS", "processes (default: one per GPU of CUDA_VISIBLE_DEVICES)")
    _add(group, "--dry-run", "DRY_RUN", "print the commands instead of running them", switch=True)
    return flags


def _add(
    group: argparse._ArgumentGroup, flag: str, variable: str, about: str, default: str = "", switch=False, **more: Any
) -> None:
    given = _variable(variable, default)
    shown = f"{about} (default: {default})" if default else about
    options = {"action": "store_true"} if switch else {"metavar": "VALUE", **more}
    group.add_argument(flag, default=_is_on(given) if switch else given, help=f"{shown} [{variable}]", **options)


def _variable(name: str, default: str = "") -> str:
    """An environment variable; an empty one counts as not set."""
    return os.environ.get(name) or default


def _is_on(text: str) -> bool:
    return text not in ("", "0")


@dataclass(frozen=True)
class Run:
    """A benchmark that is to be answered and scored.

    Attributes:
        steps: Its recipe.
        chunks: The answering processes.
        overwrite: Answers that are there are replaced.
        partial: Only a part of the questions is answered, so nothing is scored.
        python: The interpreter.
    """

    steps: Recipe
    chunks: Sequence[Chunk]
    overwrite: bool
    partial: bool
    python: str


def plan(args: argparse.Namespace, arguments: Sequence[str]) -> Run:
    """The run that parsed flags and further arguments of the answering program describe.

    Raises:
        ValueError: A setting that cannot be.
    """
    family = FAMILIES[args.family]
    names = _checked(args, arguments)
    tokens = args.tokens or family.other_tokens.get(args.benchmark, family.tokens)
    model = args.model or family.model
    compression, budget_name = _budget(family, tokens, args, _layer(family, user_path(model) / "config.json"))
    ocr = args.ocr or family.ocr
    variants = [budget_name, args.compat, f"ocr{ocr}" if args.benchmark == "textvqa" and ocr != family.ocr else ""]
    experiment = args.experiment or "-".join(filter(None, [Path(model).name, *variants]))
    python = _variable("PYTHON", sys.executable)
    place = Place(
        Path(args.data), Path(args.out or args.data), experiment,
        os.path.abspath(python) if os.sep in python else python,  # official tools run in their own folders
        args.image_folder, args.split, ocr, args.annotations, _is_on(args.mme_part), args.judge,
    )  # fmt: skip
    steps = recipe(args.benchmark, place)
    overwrite = "--overwrite" in names
    command = [
        place.python, "-m", steps.program, "--model-path", model, "--question-file", str(steps.questions), *steps.flags,
        "--conv-mode", _variable("CONV_MODE", family.conv_mode), "--temperature", "0",
        "--batch_size", _variable("BATCH_SIZE", "1"), "--num_workers", _variable("NUM_WORKERS", "4"),
        "--dtype", _variable("DTYPE", "auto"), "--device", _variable("DEVICE", "auto"), *compression, *arguments,
        *([] if overwrite else ["--resume"]),
    ]  # fmt: skip
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    count = int(args.chunks or max(1, len(gpus)))
    chunks = make_chunks(command, steps.answers, count, gpus)
    return Run(steps, chunks, overwrite, "--limit" in names, place.python)


def _checked(args: argparse.Namespace, arguments: Sequence[str]) -> set[str]:
    """Names of the answering program's arguments, with dashes.

    Raises:
        ValueError: One of them, or of the settings, cannot be.
    """
    family = FAMILIES[args.family]
    if args.benchmark not in family.benchmarks:
        raise ValueError(f"{args.family} has no {args.benchmark}; choose {', '.join(family.benchmarks)}")
    if args.chunks and not (args.chunks.isdecimal() and int(args.chunks) > 0):
        raise ValueError(f"CHUNKS={args.chunks} must be a number of processes, 1 or more")
    if args.ocr not in ("", "0", "1"):
        raise ValueError(f"OCR={args.ocr} must be 1 (OCR tokens in the prompt) or 0")
    given = {word.partition("=")[0] for word in arguments}
    for name in given:
        if name.replace("_", "-") in _TAKEN:
            raise ValueError(f"{name} is set by this command; {_TAKEN[name.replace('_', '-')]}")
    return {name.replace("_", "-") for name in given}


def _layer(family: Family, config: Path) -> int:
    """The published decoder layer, or the middle one of a checkpoint that is too shallow for it.

    Raises:
        ValueError: The checkpoint's `config` is not JSON.
    """
    if not config.is_file():
        return family.layer
    stored = read_json(config)
    depth = stored.get("num_hidden_layers") or stored.get("text_config", {}).get("num_hidden_layers")
    return depth // 2 if depth and depth <= family.layer else family.layer


def _budget(family: Family, tokens: str, args: argparse.Namespace, layer: int) -> tuple[list[str], str]:
    """Compression flags of a budget, unless the environment gives others, and what sets them apart in a name.

    `layer` is where its decoder stage stands.

    Raises:
        ValueError: No published budget of the family.
    """
    variables = {name: _variable(name.upper()) for name in (family.vision_flag, "layer_list", family.llm_flag)}
    vision, layers, llm = variables.values()
    basis = _variable("BASIS_TOKEN_NUM")
    changed = any((vision, layers, llm, basis))
    basis = basis or "10"
    if tokens == "none":
        vision, layers, llm, name = family.all_tokens, "[]", "[]", "none"
    else:
        published = {**family.budgets, **(family.published if args.compat == "published" else {})}
        if tokens not in published:
            flags = f"{family.vision_flag.upper()} and {family.llm_flag.upper()}"
            raise ValueError(
                f"TOKENS={tokens} is not a published budget; choose {', '.join(published)}, or none, or set {flags}"
            )
        vision, llm = vision or published[tokens][0], llm or f"[{published[tokens][1]}]"
        layers = "[]" if llm == "[]" else layers or f"[{layer}]"
        name = f"{args.method}-{tokens}" if args.tokens or args.method != "apet" else ""
        if changed:
            values = "".join(one for one in f"v{vision}-l{layers}-t{llm}-b{basis}" if one not in "[] ")
            name = f"{args.method}-{values.replace(',', '+')}"
    settings = {
        family.vision_flag: vision, "layer_list": layers, family.llm_flag: llm, "basis_token_num": basis,
        "method": args.method, "compat": args.compat,
    }  # fmt: skip
    return [word for one, value in settings.items() if value for word in _flag(one, value)], name


def _flag(setting: str, value: str) -> list[str]:
    """A setting of `ApetConfig` as the answering program takes it."""
    own = ApetConfig.__dataclass_fields__[setting].metadata.get("flag")
    return [f"--{setting}", value] if own else ["--apet", f"{setting}={value}"]


def check_inputs(run: Run, model: str) -> None:
    """Stop before hours are spent on answers.

    Raises:
        ValueError: The checkpoint, a file or a folder is not there.
    """
    if find_spec("llava") is None:
        raise ValueError("the programs that answer are not installed: pip install apet-llava, or work in a checkout")
    # owner/name may be a hub id, which only the program can look up.
    folder = os.path.isabs(model) or model.count("/") != 1
    for path, what in [(Path(model), "checkpoint")] * folder + [(path, "file or folder") for path in run.steps.needs]:
        if not path.expanduser().exists():
            raise ValueError(
                f"{what} not found: {path} (data/README.md says where it comes from, apet check-data what else is "
                "missing; DATA and MODEL change the folders; a checkout has a sample: --model "
                "data/sample/model/llava-v1.5-sample --data data/sample/eval)"
            )


def execute(run: Run) -> int:
    """Carry a run out; exit status: of the first program that fails, 1 for a chunk, 130 where it was stopped."""
    for step in run.steps.before:
        if status := _do(step):
            return status
    first = run.chunks[0]
    first.answers.parent.mkdir(parents=True, exist_ok=True)
    other = unfinished_count(first.answers, first.count)
    if other is not None:
        print(
            f"note: an earlier run in {other} chunks was not finished; CHUNKS={other} goes on with its answers",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    try:
        succeeded = run_chunks(run.chunks)
    except KeyboardInterrupt:
        print(f"stopped; the same command{' without --overwrite' * run.overwrite} goes on from here", file=sys.stderr)
        return 130
    if not succeeded:
        print(
            "error: nothing was scored; mend the cause and start the same command again: the answers so far are kept\n"
            "(EXPERIMENT=<name> starts anew beside them)", file=sys.stderr,
        )  # fmt: skip
        return 1
    for step in _after(run):
        if status := _do(step):
            return status
    if run.partial:
        print("not scored: --limit answers only a part of the questions; without it the same command goes on from here")
    elif run.steps.upload is not None:
        print(f"to upload to the benchmark's server: {run.steps.upload}")
    return 0


def _after(run: Run) -> list[Step]:
    """What follows the answers: joining their parts, and scoring them if they are whole."""
    words = [run.python, "-m", "apet.eval.merge", "--answers-file", str(run.steps.answers)]
    words += ["--overwrite"] * run.overwrite + [str(chunk.part) for chunk in run.chunks]
    joining = [Step(tuple(words))] if len(run.chunks) > 1 else []
    return joining + ([] if run.partial else list(run.steps.after))


def _do(step: Step) -> int:
    """Run a step; its exit status, 0 for an official tool that fails."""
    if step.inside is not None:
        print(f"\n== {step.inside / step.words[1]}", flush=True)
    status = subprocess.run(step.words, cwd=step.inside, check=False).returncode
    if step.inside is not None and status:
        print(
            f"note: {step.words[1]} failed (it may want files that are not published); the score above is complete "
            "without it", file=sys.stderr,
        )  # fmt: skip
        return 0
    return status


def _commands(run: Run) -> list[str]:
    """The commands of a run as they can be typed."""
    every: list[Step | Chunk] = [*run.steps.before, *run.chunks, *_after(run)]
    return [shlex.join(one.words) if isinstance(one, Step) else str(one) for one in every]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status; what the user can mend is one line on stderr."""
    args, arguments = parser().parse_known_args(argv)
    try:
        if args.dataset and not args.dry_run:
            write_benchmark(args.benchmark, args.data, None if args.dataset == _USUAL else args.dataset)
        run = plan(args, arguments)
        if args.dry_run:
            print("\n".join(_commands(run)))
            return 0
        check_inputs(run, args.model or FAMILIES[args.family].model)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers fork
        return execute(run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
