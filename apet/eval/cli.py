"""Flag groups shared by the evaluation programs, and flags to `ApetConfig`.

Every flag is accepted with `_` and with `-`. Lists are parsed as literals, never evaluated.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from apet.config import ApetConfig, attribute_texts, parse_list
from apet.eval.batches import AUTO, CPU_BATCH_SIZE
from apet.eval.benchmarks.files import user_path
from apet.eval.run_options import RunOptions
from apet.eval.scoring_cli import Parser
from apet.methods import get_method, parse_method, parse_options
from apet.methods.base import unknown_name

# Tokens of an image in LLaVA-1.5: as its budget it keeps everything.
ALL_TOKENS = 576


def add_data_flags(parser: Parser, question_file: str) -> None:
    """Question, answer and image files, and sharding."""
    group = parser.add_argument_group("questions and answers")
    group.add_argument(
        "--question-file", type=str, metavar="FILE", default=question_file, help="the questions, JSON lines"
    )
    group.add_argument(
        "--image-folder", type=str, metavar="DIR", default="", help="folder that image paths are relative to"
    )
    group.add_argument("--answers-file", type=str, metavar="FILE", default="answer.jsonl", help="where the answers go")
    group.add_argument("--benchmark", default="vqa", metavar="NAME", help="how questions are read and answers written")
    ranks = " (default: the ranks of torchrun or accelerate launch)"
    group.add_argument("--num-chunks", type=int, default=1, metavar="N", action=_ChunkFlag, help="chunks" + ranks)
    group.add_argument("--chunk-idx", type=int, default=0, metavar="I", action=_ChunkFlag, help="this chunk, from 0")
    parser.set_defaults(chunks_given=False)


def add_runner_flags(parser: Parser) -> None:
    """How the run is carried out."""
    group = parser.add_argument_group("how the run is carried out")
    add_batch_flags(group)
    group.add_argument("--resume", action="store_true", help="continue a partial answers file of the same settings")
    group.add_argument("--overwrite", action="store_true", help="replace the answers file once a new answer is there")
    group.add_argument("--limit", type=int, metavar="N", help="only the first so many questions")
    group.add_argument(
        "--on_error", choices=("stop", "skip"), default="stop", help="a question that cannot be asked: stop, or list it"
    )


def add_batch_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Batches and worker processes."""
    parser.add_argument(
        "--batch_size", type=_batch_size, default=1, metavar="N",
        help=f"questions per batch, or auto: the most that fit on a GPU, {CPU_BATCH_SIZE} on a CPU",
    )  # fmt: skip
    parser.add_argument("--num_workers", type=int, default=4, metavar="N", help="processes that open images")


def add_compression_flags(parser: Parser) -> None:
    """Budgets and method: a flag for the fields of `ApetConfig` that have one, `--apet` for all others.

    Without them nothing is compressed.
    """
    group = parser.add_argument_group("visual-token compression")
    texts, types = attribute_texts(ApetConfig), get_type_hints(ApetConfig)
    for field in (field for field in fields(ApetConfig) if field.metadata.get("flag")):
        kind = _flag_type(types[field.name])
        options = {"type": kind, "default": None if field.default == () else field.default}
        if field.name == "visual_token_num":
            options |= {"default": ALL_TOKENS, "action": _TokensFlag}
        about = texts[field.name].partition(". ")[0].rstrip(".")
        options |= {"metavar": _METAVARS.get(field.name, "N"), "help": about[0].lower() + about[1:]}
        group.add_argument(f"--{field.name}", **options)
    parser.set_defaults(tokens_given=False)
    group.add_argument(
        "--apet", action="append", default=[], metavar="NAME=VALUE,...",
        help="further settings, and options of the method; docs/options.md has all",
    )  # fmt: skip
    group.add_argument("--llm_pruning", action="store_true", help="accepted for old scripts; has no effect")


_METAVARS = {
    "image_token_ratio": "SHARE",
    "layer_list": "'[16]'",
    "image_token_list": "'[32]'",
    "image_token_ratio_list": "'[0.3]'",
    "method": "NAME[:OPTION=VALUE,..]",
}


def _flag_type(hint: Any) -> type:
    """What the text of a flag becomes: the first type of a union; lists stay text, which `parse_list` reads."""
    first = get_args(hint)[0] if isinstance(hint, UnionType) else hint
    return str if get_origin(first) is tuple else first


def config_from_flags(args: argparse.Namespace) -> ApetConfig:
    """The configuration that parsed flags describe.

    Raises:
        ValueError: As `ApetConfig`, or a list that is not a literal.
    """
    method, options = parse_method(args.method)
    given = {field.name: getattr(args, field.name) for field in fields(ApetConfig) if field.metadata.get("flag")}
    for name in (name for name in given if name.endswith("_list")):
        given[name] = parse_list(given[name], f"--{name}")
    if given["image_token_ratio"] == 1.0:
        given["image_token_ratio"] = None
    # The flag's default means all tokens, and the method "none" takes no budget at all.
    if given["visual_token_num"] == ALL_TOKENS and (method == "none" or not args.tokens_given):
        given["visual_token_num"] = None
    further = _further_settings(args.apet, method)
    options |= {name: further.pop(name) for name in list(further) if name not in _FURTHER}
    get_method(method, **options)
    return ApetConfig(**{**given, **further, "method": method, "method_options": options})


_FURTHER = tuple(
    field.name for field in fields(ApetConfig) if not field.metadata.get("flag") and field.name != "method_options"
)


def _further_settings(texts: Sequence[str], method: str) -> dict[str, Any]:
    """What `--apet` sets: fields of `ApetConfig` and options of the method.

    Raises:
        ValueError: A name that is neither, or that has a flag of its own.
    """
    found: dict[str, Any] = {}
    for text in texts:
        found |= parse_options(text, f"--apet {text}", "--apet name=value,name=value")
    known = [*_FURTHER, *(option.name for option in fields(get_method(method)))]
    for name in found:
        if name in (field.name for field in fields(ApetConfig) if field.metadata.get("flag")):
            raise ValueError(f"--apet {name}: it has a flag of its own, --{name}")
        if name not in known:
            raise ValueError(unknown_name(f"setting of --apet with method {method!r}:", name, known))
    return found


def run_options(args: argparse.Namespace, inputs: tuple[str, ...] = ()) -> RunOptions:
    """Runner options of parsed flags; `inputs` are files that are read beside the questions.

    Raises:
        ValueError: As `RunOptions`, or a path below the home of a user that does not exist.
    """
    for path in (args.question_file, args.answers_file, args.image_folder):
        user_path(path)
    given = {field.name: getattr(args, field.name) for field in fields(RunOptions) if field.name != "inputs"}
    return RunOptions(**given, inputs=inputs)


class _TokensFlag(argparse.Action):
    """Stores the value and that it was given: an image of another family than LLaVA-1.5 may have more tokens."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values)
        namespace.tokens_given = True


class _ChunkFlag(argparse.Action):
    """Stores the value and that it was given: `--num-chunks 1` means one chunk even under a launcher."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values)
        namespace.chunks_given = True


def _batch_size(text: str) -> int | str:
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, or {AUTO}") from None
