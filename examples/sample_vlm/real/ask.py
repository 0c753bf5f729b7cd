"""One command from nothing to two answers: assemble if need be, ask about a picture, compress, ask again."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import apet
from apet.methods import get_method, parse_method
from examples.sample_vlm import questions as q
from examples.sample_vlm.real.batches import MIX
from examples.sample_vlm.real.exam import SEED, held_out

ASKED = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked, and how far the picture is compressed."""
    parser.add_argument("--image", type=Path, help="a picture of yours (default: a held-out one is drawn)")
    parser.add_argument("--question", action="append", help="repeat for more (default: what the generator would ask)")
    parser.add_argument("--tokens", type=int, default=64, help="visual tokens averaged over the decoder layers")
    parser.add_argument("--method", default="apet", help="a method of docs/methods.md, options after a colon")
    parser.add_argument("--seed", type=int, default=SEED, help="which held-out picture is drawn")
    parser.add_argument("--save", type=Path, help="write the picture that was drawn to this file")


def ask(model_folder: Path, args: argparse.Namespace) -> None:
    """Print question, true answer where it is known, and the answers without and with compression."""
    picture, questions, truths = subject(args)
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    config = budget(model, args.method, args.tokens)
    before = answers(model, processor, picture, questions)
    with apet.patched(model, config):
        after = answers(model, processor, picture, questions)
        kept = apet.last_result(model).layer_averaged_tokens[0]
    columns = ("question", "truth", f"{model.config.image_seq_length} tokens", f"{kept:.0f} tokens, {args.method}")
    rows = [columns, *zip(questions, truths, before, after, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def subject(args: argparse.Namespace) -> tuple[Image.Image, list[str], list[str]]:
    """Picture, questions and true answers ("" where they are not known).

    Raises:
        SystemExit: A picture without a question, or a file that is none.
    """
    if args.image is None:
        scene, rng = next(held_out(args.seed))
        picture = Image.fromarray(scene.pixels)
        if args.save is not None:
            picture.save(args.save)
        asked = [] if args.question else different(scene, rng)
        texts = args.question or [question.text for question in asked]
        return picture, texts, [question.answer for question in asked] or [""] * len(texts)
    if not args.question:
        raise SystemExit(f"--image {args.image} needs at least one --question")
    try:
        with Image.open(args.image) as file:
            return file.convert("RGB"), args.question, [""] * len(args.question)
    except (OSError, UnidentifiedImageError) as error:
        raise SystemExit(f"--image {args.image} cannot be read: {error}") from None


def different(scene, rng: np.random.Generator) -> list[q.Question]:
    """A few questions about a scene, of different types as far as they go."""
    drawn = q.ask(scene, rng, 40, MIX)
    return list({question.type: question for question in reversed(drawn)}.values())[:ASKED]


def budget(model: nn.Module, method: str, tokens: int) -> apet.ApetConfig:
    """The method's own way to spend so many tokens, averaged over the layers.

    Raises:
        SystemExit: An unknown method, or a budget it cannot reach.
    """
    layers = model.config.text_config.num_hidden_layers
    try:
        name, options = parse_method(method)
        fields = get_method(name, **options).plan(tokens, model.config.image_seq_length, layers)
        return apet.ApetConfig.from_dict(fields | {"method": name, "method_options": options})
    except ValueError as error:
        raise SystemExit(str(error)) from None


@torch.inference_mode()
def answers(model: nn.Module, processor, picture: Image.Image, questions: Sequence[str]) -> list[str]:
    """Greedy answers, one question at a time."""
    found = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question + q.SUFFIX}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=picture, text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(new, skip_special_tokens=True).strip())
    return found
