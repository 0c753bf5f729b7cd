"""Flag groups shared by the evaluation programs, and flags to `ApetConfig`.

Every flag is accepted with `_` and with `-`. Lists are parsed as literals, never evaluated.
"""

import argparse

from apet.config import BUDGETS_PER, VIDEO_BUDGETS_PER, ApetConfig, parse_list
from apet.eval.batches import AUTO, CPU_BATCH_SIZE
from apet.eval.benchmarks.files import user_path
from apet.eval.run_options import RunOptions
from apet.eval.scoring_cli import Parser
from apet.methods import get_method, method_names, parse_method

# Tokens of an image in LLaVA-1.5: as its budget it keeps everything.
ALL_TOKENS = 576


def add_data_flags(parser: Parser, question_file: str) -> None:
    """Question, answer and image files, and sharding."""
    parser.add_argument("--image-folder", type=str, default="", help="folder that image paths are relative to")
    parser.add_argument("--question-file", type=str, default=question_file)
    parser.add_argument("--answers-file", type=str, default="answer.jsonl")
    ranks = "; without chunk flags the ranks of torchrun or accelerate launch are the chunks"
    parser.add_argument("--num-chunks", type=int, default=1, action=_ChunkFlag, help="number of chunks" + ranks)
    parser.add_argument("--chunk-idx", type=int, default=0, action=_ChunkFlag, help="which chunk this is, from 0")
    parser.set_defaults(chunks_given=False)


def add_runner_flags(parser: Parser) -> None:
    """How the run is carried out."""
    add_batch_flags(parser)
    parser.add_argument("--resume", action="store_true", help="continue a partial answers file of the same settings")
    parser.add_argument("--overwrite", action="store_true", help="replace the answers file once a new answer is there")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many questions")
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="a question that cannot be asked (unreadable picture, prompt too long): stop, or list it and go on",
    )


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Batches and worker processes."""
    parser.add_argument(
        "--batch_size",
        type=_batch_size,
        default=1,
        help=f"questions per batch, or auto: the most that fit on a GPU, {CPU_BATCH_SIZE} on a CPU; answers do not "
        "depend on it",
    )
    parser.add_argument("--num_workers", type=int, default=4, help="processes that open images; 0 for none")


def add_compression_flags(parser: Parser) -> None:
    """Budgets and method. Without them nothing is compressed."""
    group = parser.add_argument_group("visual-token compression")
    group.add_argument(
        "--visual_token_num",
        type=int,
        default=ALL_TOKENS,
        action=_TokensFlag,
        help="tokens per image after the vision stage; not given, all of them, however many an image has",
    )
    parser.set_defaults(tokens_given=False)
    group.add_argument("--layer_list", type=str, default=None, help="decoder layers after which to cut, like '[16]'")
    group.add_argument("--image_token_list", type=str, default=None, help="tokens per image left there, like '[32]'")
    group.add_argument("--image_token_ratio", type=float, default=None, help="vision stage as a share of the tokens")
    group.add_argument("--image_token_ratio_list", type=str, default=None, help="layers' budgets as shares")
    group.add_argument(
        "--video_token_num",
        type=int,
        default=None,
        help="tokens per frame or clip of a video after the vision stage (default: as for images)",
    )
    group.add_argument(
        "--video_budget_per",
        type=str,
        default="auto",
        help=f"what a video's vision budget is for: {', '.join(VIDEO_BUDGETS_PER)} (as the family was published)",
    )
    group.add_argument("--basis_token_num", type=int, default=10, help="basis tokens k")
    group.add_argument(
        "--method",
        type=str,
        default="apet",
        help=f"with options as name:option=value,...; one of: {', '.join(method_names())}",
    )
    group.add_argument(
        "--error_target",
        type=float,
        default=None,
        help="apet_plus: fewer tokens than the budget, down to this share of the energy left unexplained",
    )
    group.add_argument("--basis_selection", type=str, default="fps", help="fps, dpc or random")
    group.add_argument("--fps_start", type=str, default="farthest", help="farthest, first, or a token index")
    group.add_argument("--position_mode", type=str, default="auto", help="auto, compact or keep")
    group.add_argument(
        "--budget_per",
        type=str,
        default="crop",
        help="what the budgets are for: each crop of an image, each image, or all pictures of a prompt together "
        f"({', '.join(BUDGETS_PER)})",
    )
    group.add_argument(
        "--size_bias", action="store_true", help="merged tokens count for as many as they stand for in the decoder"
    )
    group.add_argument("--compat", type=str, default=None, help="published: the published accounting of anyres images")
    group.add_argument("--seed", type=int, default=0, help="seed of sampling and of methods that draw at random")
    group.add_argument("--llm_pruning", action="store_true", help="accepted for old scripts; has no effect")


def config_from_flags(args: argparse.Namespace) -> ApetConfig:
    """The configuration that parsed flags describe.

    Raises:
        ValueError: As `ApetConfig`, or a list that is not a literal.
    """
    method, options = parse_method(args.method)
    if args.error_target is not None:
        options["error_target"] = args.error_target
        get_method(method, **options)
    ratio = None if args.image_token_ratio in (None, 1.0) else args.image_token_ratio
    # The flag's default means all tokens, and the method "none" takes no budget at all.
    whole = args.visual_token_num == ALL_TOKENS and (method == "none" or not args.tokens_given)
    return ApetConfig(
        visual_token_num=None if whole else args.visual_token_num,
        image_token_ratio=ratio,
        layer_list=parse_list(args.layer_list, "--layer_list"),
        image_token_list=parse_list(args.image_token_list, "--image_token_list"),
        image_token_ratio_list=parse_list(args.image_token_ratio_list, "--image_token_ratio_list"),
        video_token_num=args.video_token_num,
        video_budget_per=args.video_budget_per,
        basis_token_num=args.basis_token_num,
        method=method,
        method_options=options,
        basis_selection=args.basis_selection,
        fps_start=_fps_start(args.fps_start),
        position_mode=args.position_mode,
        budget_per=args.budget_per,
        compat=args.compat,
        size_bias=args.size_bias,
        seed=args.seed,
    )


def run_options(args: argparse.Namespace, inputs: tuple[str, ...] = ()) -> RunOptions:
    """Runner options of parsed flags; `inputs` are files that are read beside the questions.

    Raises:
        ValueError: As `RunOptions`, or a path below the home of a user that does not exist.
    """
    for path in (args.question_file, args.answers_file, args.image_folder):
        user_path(path)
    return RunOptions(
        question_file=args.question_file,
        answers_file=args.answers_file,
        image_folder=args.image_folder,
        num_chunks=args.num_chunks,
        chunk_idx=args.chunk_idx,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        resume=args.resume,
        limit=args.limit,
        on_error=args.on_error,
        overwrite=args.overwrite,
        inputs=inputs,
    )


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


def _fps_start(text: str) -> int | str:
    if text == "first":
        return 0
    if text == "farthest":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--fps_start {text!r} must be farthest, first, or a token index") from None
