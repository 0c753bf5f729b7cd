"""What the question-file programs share: model flags, loading, running, and the lines printed around it."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

import llava._unmixed  # noqa: F401  here too, where another `llava` has replaced `llava/__init__.py`
from apet.eval.answerer import Answerer
from apet.eval.benchmarks import Benchmark, Question, get_benchmark
from apet.eval.benchmarks.video_qa import VideoQa
from apet.eval.cli import add_compression_flags, add_data_flags, add_runner_flags, config_from_flags, run_options
from apet.eval.endpoint import KEY_VARIABLE, Endpoint
from apet.eval.interrupts import Interrupted, Terminated, raising
from apet.eval.run_record import RunRecord
from apet.eval.runner import check, merge_ranks, rank_options, run
from apet.eval.scoring_cli import USER_ERRORS, Parser, show_notes
from apet.eval.server import ServerAnswerer
from llava.conversation import new_conversation, plain_conv_mode
from llava.eval.answerer import LlavaAnswerer, LlavaPreparer
from llava.eval.family_answerer import FRAMES, FamilyAnswerer, FamilyPreparer
from llava.eval.generation import GenerationSettings
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.processors import FamilyProcessor, Limits

_DTYPES = {"auto": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def add_model_flags(parser: Parser) -> None:
    """Which checkpoint, where, and in what precision."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--model-path", type=str, metavar="PATH", default="facebook/opt-350m", help="folder or hub id")
    group.add_argument("--model-base", type=str, metavar="PATH", help="base of a projector-only or LoRA checkpoint")
    group.add_argument("--vision-tower", metavar="DIR", help="CLIP folder, instead of the one in config.json")
    group.add_argument("--dtype", choices=tuple(_DTYPES), default="auto", help="auto is fp16 on a GPU, fp32 on a CPU")
    group.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--attn_implementation", metavar="NAME", help="sdpa, eager or flash_attention_2")
    group.add_argument("--load-8bit", action="store_true", help="quantise with bitsandbytes")
    group.add_argument("--load-4bit", action="store_true", help="quantise with bitsandbytes")
    group.add_argument("--min_pixels", type=int, metavar="N", help="Qwen: of the smallest image (default: 256 tokens)")
    group.add_argument("--max_pixels", type=int, metavar="N", help="Qwen: of the largest image (default: 2048 tokens)")


def add_decoding_flags(
    parser: Parser, temperature: float, new_tokens: int, conv_mode: str | None, *, compilable: bool = True
) -> None:
    """How an answer is written; the arguments are the defaults, and whether there is --compile."""
    group = parser.add_argument_group("prompt and decoding")
    group.add_argument(
        "--conv-mode", type=str, metavar="NAME", default=conv_mode, help="prompt of checkpoints without a chat template"
    )
    group.add_argument("--temperature", type=float, metavar="T", default=temperature, help="0 is greedy")
    group.add_argument("--top_p", type=float, metavar="P", help="sample among the likeliest tokens of this share")
    group.add_argument("--num_beams", type=int, metavar="N", default=1, help="beams of beam search")
    group.add_argument("--max_new_tokens", type=int, metavar="N", default=new_tokens, help="longest answer")
    if compilable:
        group.add_argument("--compile", action="store_true", help="compile decoding (with CUDA graphs on a GPU)")


def question_parser(program: str, description: str, question_file: str, conv_mode: str, new_tokens: int) -> Parser:
    """Parser with the flags all question-file programs have."""
    name = f"python -m {program}"
    parser = Parser(prog=name, usage=f"{name} [options]", description=description, allow_abbrev=False)
    add_model_flags(parser)
    add_data_flags(parser, question_file)
    add_decoding_flags(parser, 0.2, new_tokens, conv_mode)
    add_runner_flags(parser)
    add_compression_flags(parser)
    add_server_flags(parser)
    return parser


def add_server_flags(parser: Parser) -> None:
    """A server that answers in place of a model in this process."""
    group = parser.add_argument_group("server")
    group.add_argument("--server", metavar="URL", help=f"ask an OpenAI-compatible server (its key: {KEY_VARIABLE})")
    group.add_argument("--server_model", metavar="NAME", help="which of its models, if it serves several")
    group.add_argument("--concurrency", type=int, metavar="N", default=8, help="requests under way at a time")
    group.add_argument(
        "--allow-outside-pictures", action="store_true",
        help="send it pictures outside --image-folder too (.., absolute paths, links)",
    )  # fmt: skip


def main(
    parser: Parser,
    argv: list[str] | None,
    read: Callable[..., list[Question]] | None = None,
    complete: Callable[[argparse.Namespace], None] | None = None,
) -> int:
    """Parse, answer, report. Returns the exit status; what the user can mend is one line, not a traceback.

    Ctrl-C and SIGTERM end it with one line that says how to go on, and status 130 or 143.

    Args:
        parser: From `question_parser`.
        argv: Arguments, None for the command line's.
        read: (benchmark, args) -> questions, where reading depends on flags.
        complete: Fills in arguments that follow from others.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        with raising(Terminated, signal.SIGTERM):
            args = parser.parse_args(words)
            show_notes()
            if complete is not None:
                complete(args)
            return _answer(parser, args, read)
    except KeyboardInterrupt as stop:
        flag = stop.flag if isinstance(stop, Interrupted) else "--overwrite" if "--overwrite" in words else "--resume"
        again = shlex.join([*(word for word in words if word not in ("--resume", "--overwrite")), flag])
        print(f"{parser.prog}: stopped; this goes on from here: {parser.prog} {again}", file=sys.stderr)
        return 128 + Interrupted.signal_of(stop)
    except USER_ERRORS as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1


def load_model(args: argparse.Namespace) -> tuple:
    """(tokenizer, model, image processor) of the model flags; for other families than LLaVA, a `FamilyProcessor`.

    Raises:
        ValueError: The checkpoint is not a vision-language model.
    """
    device = _default_device() if args.device == "auto" else args.device
    options = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    if _DTYPES[args.dtype] is not None:
        options["dtype"] = _DTYPES[args.dtype]
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        get_model_name_from_path(args.model_path),
        args.load_8bit,
        args.load_4bit,
        device=device,
        vision_tower=args.vision_tower,
        limits=Limits(args.min_pixels, args.max_pixels),
        **options,
    )
    if image_processor is None:
        raise ValueError(
            f"{args.model_path} is a language model without vision; --model-path must name a vision-language checkpoint"
        )
    return tokenizer, model, image_processor


def _answer(parser: Parser, args: argparse.Namespace, read: Callable[..., list[Question]] | None) -> int:
    if args.server is not None:
        _refuse_local_flags(parser, args)
    elif args.allow_outside_pictures:
        raise ValueError("--allow-outside-pictures is about what is sent to a --server; leave it out without one")
    config_from_flags(args)
    _generation(args).check_batch(args.batch_size if args.server is None else 1)
    answer_file = getattr(args, "gt_file_answers", None)  # of questions about videos
    wanted = run_options(args, () if answer_file is None else (answer_file,))
    if args.server is not None:
        if args.concurrency < 1:
            raise ValueError(f"--concurrency {args.concurrency} must be at least 1")
        # The server forms its own batches; ours only keep it busy: while the last answers of one come, others wait.
        wanted = replace(wanted, batch_size=4 * args.concurrency)
    options = rank_options(wanted, args.chunks_given)
    benchmark: Benchmark = get_benchmark(args.benchmark)
    questions = (read or _read)(benchmark, args)
    check(benchmark, options, questions)
    answerer = _local_answerer(args) if args.server is None else _server_answerer(args)
    if any(question.video is not None for question in questions) and not answerer.preparer.videos:
        raise ValueError(f"{answerer.model_id} takes no videos here; name a checkpoint of a family that does")
    record = run(benchmark, answerer, options, questions)
    merge_ranks(options, wanted.answers_file)
    _print_summary(record, wanted.answers_file)
    return 0


def _read(benchmark: Benchmark, args: argparse.Namespace) -> list[Question]:
    if isinstance(benchmark, VideoQa):
        raise ValueError(f"--benchmark {benchmark.name} is about videos; answer it with llava.eval.video_qa")
    return benchmark.read(args.question_file)


def require_benchmark(benchmark: Benchmark, kind: type[Benchmark]) -> None:
    """Raise ValueError where a program that reads the files of one kind of benchmark is asked for another."""
    if not isinstance(benchmark, kind):
        raise ValueError(
            f"--benchmark {benchmark.name} has other question files than this program reads, those of {kind.name}; "
            "answer it with llava.eval.model_vqa_loader"
        )


def _local_answerer(args: argparse.Namespace) -> Answerer:
    name = get_model_name_from_path(args.model_path)
    conv_mode = plain_conv_mode(name, args.conv_mode)
    new_conversation(conv_mode)  # an unknown mode is refused before minutes go into loading
    shared = (_generation(args), config_from_flags(args), name, args.model_path)
    tokenizer, model, processor = load_model(args)
    if isinstance(processor, FamilyProcessor):
        family_preparer = FamilyPreparer(processor, conv_mode, getattr(args, "num_frames", FRAMES))
        return FamilyAnswerer(model, family_preparer, *shared)
    return LlavaAnswerer(model, LlavaPreparer(tokenizer, processor, model.config, conv_mode), *shared)


def _generation(args: argparse.Namespace) -> GenerationSettings:
    return GenerationSettings(args.temperature, args.top_p, args.num_beams, args.max_new_tokens, args.compile)


def _server_answerer(args: argparse.Namespace) -> Answerer:
    generation = _generation(args)
    decoding = {"temperature": generation.temperature, "max_tokens": generation.max_new_tokens}
    if generation.temperature > 0:
        decoding["seed"] = args.seed
        if generation.top_p is not None:
            decoding["top_p"] = generation.top_p
    folder = None if args.allow_outside_pictures else args.image_folder
    return ServerAnswerer(Endpoint(args.server, concurrency=args.concurrency), decoding, args.server_model, folder)


def _refuse_local_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Raise ValueError for flags about a model in this process: a server would not hear of them."""
    local, shared = Parser(add_help=False), ("seed", "llm_pruning")
    add_model_flags(local)
    add_compression_flags(local)
    names = [name for name in vars(local.parse_args([])) if name not in shared] + [
        "conv_mode",
        "num_beams",
        "batch_size",
    ]
    given = [name for name in names if getattr(args, name) != parser.get_default(name)]
    if given:
        raise ValueError(
            f"--{given[0]} is for a model in this process; with --server leave it out: the model, its chat template "
            "and its compression are chosen where the server is started (scripts/serve.sh)"
        )


def _default_device() -> str:
    """The GPU of this rank, all GPUs for a single process, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def _print_summary(record: RunRecord, answers_file: str) -> None:
    answered = record.questions - len(record.failures)
    parts = [f"{answered} answers in {answers_file}"]
    if record.layer_averaged_tokens is not None:
        parts.append(f"{record.layer_averaged_tokens:.1f} visual tokens per question (averaged over layers)")
    if record.samples_per_second:
        parts.append(f"{record.samples_per_second:.2f} questions/s")
    print("; ".join(parts))
    if record.failures:
        first = record.failures[0]
        print(
            f"{len(record.failures)} questions have no answer, the first is {first['question_id']!r}: {first['error']} "
            f"(all in {record.path})"
        )
    if record.settings.get("sample_weights") == "random":
        print("NOTE: this checkpoint has random weights; its answers and scores mean nothing")
