"""Accuracy with and without compression on the held-out exam, many questions a picture: `grade`.

A picture is compressed once per method and its cache asked every question, each in a row of its own. That gives the
logits of an ordinary prompt for methods that do not look at the question (a test holds this); others are refused, and
`apet.compare` serves them. An answer counts where greedy decoding would write exactly it and stop.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import apet
from apet.adapters import host
from apet.compare.bootstrap import Outcome, interval, resampled_scores
from apet.compare.plan import parse_methods
from apet.compare.published import agreement
from apet.methods import get_method, parse_options
from examples.sample_vlm import questions as q
from examples.sample_vlm.real.ask import budget
from examples.sample_vlm.real.batches import MIX
from examples.sample_vlm.real.chat import Chat
from examples.sample_vlm.real.exam import SEED, held_out
from examples.sample_vlm.scenes import BRIGHT, CANVAS, Style

NONE = "none"
SETTINGS = ("methods", "tokens", "depths", "apet", "questions", "split", "sizes")  # what a file of results is made with
_READ_TEXT = {"text_embeddings", "clip_relevance"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, on how much."""
    parser.add_argument("--model", type=Path, default=Path("runs/real/model"), help="written by `assemble`")
    parser.add_argument("--out", type=Path, default=Path("runs/real/grade.jsonl"), help="a line per picture; resumable")
    parser.add_argument("--methods", default="random,apet,apet_plus,divprune", help="beside none")
    parser.add_argument("--tokens", type=int, default=64, help="visual tokens averaged over the decoder layers")
    parser.add_argument("--depths", help="5,10,...: nothing but a stage that leaves --tokens behind one such layer")
    parser.add_argument("--apet", default="", metavar="NAME=VALUE,...", help="further settings of every compressed run")
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--questions", type=int, default=12, help="per picture")
    parser.add_argument("--against", default=NONE, help="methods that the table's last lines set the others against")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="train: to choose a method on")
    parser.add_argument("--sizes", help="LOW,HIGH: pixels of shapes and digits, where not those of the training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(args: argparse.Namespace) -> None:
    """Grade what `--out` does not hold yet, and print the table."""
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval().to(args.device)
    methods, against = parse_methods(args.methods), parse_methods(args.against)
    if missing := set(against) - {NONE, *methods}:
        raise SystemExit(f"--against {args.against!r}: {', '.join(sorted(missing))} not among --methods {args.methods}")
    depths = None if args.depths is None else layers_of(args.depths, model.config.text_config.num_hidden_layers)
    cells = {NONE: None} | {
        name if depth is None else f"{name}@{depth}": with_settings(
            independent_of_questions(model, name, args.tokens, depth), args.apet
        )
        for depth in depths or [None]
        for name in methods
    }
    settings = {name: getattr(args, name) for name in SETTINGS}
    style = BRIGHT if args.sizes is None else sized(args.sizes)
    rows = finished(args.out, settings)
    processor, chat = AutoProcessor.from_pretrained(args.model), Chat(args.model)
    for number, (scene, rng) in enumerate(islice(held_out(SEED, style, args.split), args.pictures)):
        asked = list({one.text: one for one in q.ask(scene, rng, 4 * args.questions, MIX)}.values())[: args.questions]
        if number < len(rows):
            continue
        pixels = processor.image_processor(scene.pixels, return_tensors="pt")["pixel_values"]
        right = {name: right_answers(model, chat, config, pixels, asked) for name, config in cells.items()}
        rows.append({"types": [one.type for one in asked], "right": right})
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{number + 1} of {args.pictures} pictures", flush=True)
    if depths is None:
        print(table(rows[: args.pictures], against))
        print(published_order(rows[: args.pictures], args.tokens))
    else:
        print(by_depth(rows[: args.pictures], methods, depths))


def layers_of(text: str, layers: int) -> list[int]:
    """The decoder layers that `--depths` names.

    Raises:
        SystemExit: Something that is no layer of the model with another one behind it.
    """
    words = text.split(",")
    if not all(word.isdecimal() and 0 < int(word) < layers for word in words):
        raise SystemExit(f"--depths {text!r} must be layers from 1 to {layers - 1}, like 5,10")
    return sorted(set(map(int, words)))


def independent_of_questions(model: nn.Module, method: str, tokens: int, depth: int | None = None) -> apet.ApetConfig:
    """The method's configuration: as published, or with nothing but a stage behind the layer `depth`.

    Raises:
        SystemExit: It reads the question, which comes after the picture is compressed here.
    """
    config = budget(model, method, tokens)
    if depth is not None:
        config = apet.ApetConfig(
            method=config.method, method_options=config.method_options, layer_list=(depth,), image_token_list=(tokens,)
        )
    chosen = get_method(config.method, **config.method_options)
    read = [*chosen.needs("llm"), *(_READ_TEXT & chosen.needs("vision").keys())]
    if read:
        raise SystemExit(f"{method} asks for {', '.join(read)}, which the question decides: use apet.compare for it")
    return config


def with_settings(config: apet.ApetConfig, text: str) -> apet.ApetConfig:
    """The configuration with further settings, ``name=value,name=value``.

    Raises:
        SystemExit: An unknown name, or a value it cannot have.
    """
    try:
        further = parse_options(text, f"--apet {text!r}", "name=value,name=value")
        return apet.ApetConfig.from_dict(config.to_dict() | further)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def sized(text: str) -> Style:
    """The pictures' style with other sizes of shapes and digits.

    Raises:
        SystemExit: The text is not two numbers of pixels, the smaller one first.
    """
    low, comma, high = text.partition(",")
    if not (comma and low.isdecimal() and high.isdecimal() and 11 <= int(low) <= int(high) < CANVAS):
        raise SystemExit(f"--sizes {text!r} must be LOW,HIGH: pixels from 11 to {CANVAS - 1}, like 80,150")
    sizes = (float(low), float(high))
    return replace(BRIGHT, shapes=sizes, digits=sizes)


def finished(path: Path, settings: dict) -> list[dict]:
    """The lines that are there; a new file gets its first line, the settings.

    Raises:
        SystemExit: The file was made with other settings.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    there, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if there != settings:
        raise SystemExit(f"{path} was made with {there}, now it would be {settings}; give another --out")
    return rows


@torch.inference_mode()
def right_answers(
    model: nn.Module, chat: Chat, config: apet.ApetConfig | None, pixels: Tensor, asked: Sequence[q.Question]
) -> list[bool]:
    """Which questions about a picture (1, 3, H, W) are answered exactly, compressed by `config`."""
    with nullcontext() if config is None else apet.patched(model, config):
        logits, targets, own = asked_together(model, chat, pixels, asked)
    return [bool((row[places].argmax(-1) == ids).all()) for row, places, ids in zip(logits, own, targets, strict=True)]


def asked_together(
    model: nn.Module, chat: Chat, pixels: Tensor, asked: Sequence[q.Question]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits (questions, places, vocabulary) at all places of answer tokens, and per question its ids and its places.

    Rows are filled up behind the answers, where nothing is read.
    """
    device = model.device
    image = [model.config.image_token_index] * model.config.image_seq_length
    head = torch.tensor([[*chat.prefix, *image]], device=device)
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=head, pixel_values=pixels.to(device), **host.with_cache(cache), logits_to_keep=1)
    turns = [chat.turn(q.prompt_text(one)) for one in asked]
    replies = [chat.answer(one.answer) for one in asked]
    rows = [torch.tensor([*turn, *reply[:-1]]) for turn, reply in zip(turns, replies, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=chat.end).to(device)
    places = [torch.arange(len(turn) - 1, len(row)) for turn, row in zip(turns, rows, strict=True)]
    read = torch.cat(places).unique()
    several = copy.deepcopy(cache)
    several.batch_repeat_interleave(len(rows))
    logits = model(input_ids=ids, **host.with_cache(several), logits_to_keep=read.to(device)).logits.cpu()
    return logits, [torch.tensor(reply) for reply in replies], [torch.searchsorted(read, own) for own in places]


def published_order(rows: Sequence[dict], tokens: int) -> str:
    """How the exam orders the methods, against published results with LLaVA-1.5-7B."""
    names, scores = list(rows[0]["right"]), _resampled(rows)
    none = names.index(NONE)
    full = 100 * np.mean(_of(rows, NONE, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        resamples = dict(zip(names, 100 * scores / scores[none], strict=True))
    percents = {name: 100 * 100 * np.mean(_of(rows, name, None)) / full for name in names} if full else {}
    found = agreement(tokens, percents, resamples)
    return "" if found is None else str(found)


def _resampled(rows: Sequence[dict]) -> np.ndarray:
    """(methods, resamples) percent right, where whole pictures are drawn."""
    pictures = tuple(str(number) for number, row in enumerate(rows) for _ in row["types"])
    ids = tuple(map(str, range(len(pictures))))
    right = [np.array(_of(rows, name, None), dtype=float) for name in rows[0]["right"]]
    return resampled_scores("exam", [Outcome(ids, one, pictures=pictures) for one in right])


def table(rows: Sequence[dict], against: Sequence[str] = (NONE,)) -> str:
    """Percent right per type, and over all with the 95 % intervals of `apet.compare`, which draws whole pictures.

    The last lines are the intervals of the differences from the methods `against`.
    """
    names = list(rows[0]["right"])
    lines = ["| | " + " | ".join(["questions", *names]) + " |", "|---" * (len(names) + 2) + "|"]
    for kind in sorted({kind for row in rows for kind in row["types"]}):
        lines.append(_line(kind, [_of(rows, name, kind) for name in names]))
    lines.append(_line("all", [_of(rows, name, None) for name in names]))
    scores = _resampled(rows)
    for title, values in (("95 %", scores), *((f"minus {one}", scores - scores[names.index(one)]) for one in against)):
        bounds = [f"{low:.1f} .. {high:.1f}" for low, high in map(interval, values)]
        lines.append(f"| {title} | | " + " | ".join(bounds) + " |")
    return "\n".join(lines)


def by_depth(rows: Sequence[dict], methods: Sequence[str], depths: Sequence[int]) -> str:
    """Percent right with one stage at each depth, and the intervals of what methods are above the first one."""
    names, scores = list(rows[0]["right"]), _resampled(rows)
    first, *others = methods
    lines = ["| layer | " + " | ".join([*methods, *(f"{one} minus {first}" for one in others)]) + " |"]
    lines.append("|---" * (len(methods) + len(others) + 1) + "|")
    for depth in depths:
        cells = [f"{100 * np.mean(_of(rows, f'{one}@{depth}', None)):.1f}" for one in methods]
        for one in others:
            low, high = interval(scores[names.index(f"{one}@{depth}")] - scores[names.index(f"{first}@{depth}")])
            cells.append(f"{low:.1f} .. {high:.1f}")
        lines.append(f"| {depth} | " + " | ".join(cells) + " |")
    full = 100 * np.mean(_of(rows, NONE, None))
    return "\n".join([*lines, f"{len(_of(rows, NONE, None))} questions; without compression {full:.1f}"])


def _of(rows: Sequence[dict], name: str, kind: str | None) -> list[bool]:
    """Marks of a method on the questions of a type, or on all."""
    return [
        mark for row in rows for mark, one in zip(row["right"][name], row["types"], strict=True) if kind in (None, one)
    ]


def _line(title: str, marks: Sequence[list[bool]]) -> str:
    """A row of the table."""
    return f"| {title} | {len(marks[0])} | " + " | ".join(f"{100 * np.mean(one):.1f}" for one in marks) + " |"
