"""Chat about an image in the terminal: ``python -m llava.serve.cli``. An empty line or end of input ends the chat."""

import argparse
import sys

import torch
from transformers import TextStreamer

import apet
from apet.eval.cli import add_compression_flags, config_from_flags
from apet.eval.prompts import PromptError
from apet.eval.scoring_cli import Parser, run
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import new_conversation, resolve_conv_mode
from llava.eval.generation import GenerationSettings
from llava.eval.lengths import context_of, crops_of, room_of_prompt
from llava.eval.program import add_model_flags, load_model
from llava.eval.run_llava import insert_images, load_image
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.processors import FamilyProcessor


class _AnswerStreamer(TextStreamer):
    """Prints new tokens as they come. `generate` announces a prompt of no ids when it is given embeddings."""

    def put(self, value: torch.Tensor) -> None:
        if value.numel() > 0:
            super().put(value)


def chat(args: argparse.Namespace) -> None:
    """Load the model and talk until the user stops."""
    name = get_model_name_from_path(args.model_path)
    generation = GenerationSettings(args.temperature, None, 1, args.max_new_tokens)
    config = config_from_flags(args)
    conversation = new_conversation(resolve_conv_mode(name, args.conv_mode, warn=print))
    image = load_image(args.image_file)
    tokenizer, model, image_processor = load_model(args)
    if isinstance(image_processor, FamilyProcessor):
        raise ValueError(f"{args.model_path} is no LLaVA checkpoint; ask it with python -m llava.eval.run_llava")
    apet.apply_patch(model, config)
    roles = ("user", "assistant") if "mpt" in name.lower() else conversation.roles
    pixels = process_images([image], image_processor, model.config).to(model.device, model.dtype)

    first = True
    while True:
        text = _said(roles[0], int(first), getattr(model.config, "mm_use_im_start_end", False))
        if not text:
            print("exit...")
            return
        first = False
        prompt = conversation.ask(text)
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
        room_of_prompt(context_of(model.config), model.config, config, ids, [(image.size, crops_of(pixels[0]))])
        print(f"{roles[1]}: ", end="")
        output = model.generate(
            ids.unsqueeze(0).to(model.device),
            images=pixels,
            image_sizes=[image.size],
            streamer=_AnswerStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True),
            **generation.kwargs(),
        )
        answer = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
        # What a model writes is no place for a picture.
        conversation.messages[-1][-1] = answer.replace(DEFAULT_IMAGE_TOKEN, "")
        if args.debug:
            print("\n", {"prompt": prompt, "outputs": answer}, "\n")


def _said(role: str, images: int, start_end: bool) -> str:
    """What the user types next, with the image where it has to be shown; "" ends the chat."""
    while True:
        try:
            text = input(f"{role}: ")
        except EOFError:
            return ""
        try:
            return text and insert_images(text, images, start_end)
        except PromptError as error:
            print(error)


def parser() -> Parser:
    """The program's flags."""
    flags = Parser(prog="python -m llava.serve.cli", description=__doc__.partition(":")[0], allow_abbrev=False)
    add_model_flags(flags)
    flags.set_defaults(device="cuda")
    flags.add_argument("--image-file", type=str, required=True, help="path or http(s) address")
    flags.add_argument("--conv-mode", type=str, default=None, help="prompt template (default: of the model's name)")
    flags.add_argument("--temperature", type=float, default=0.2, help="0 is greedy")
    flags.add_argument("--max-new-tokens", type=int, default=512, help="longest answer")
    flags.add_argument("--debug", action="store_true", help="print prompt and answer of every turn")
    add_compression_flags(flags)
    return flags


if __name__ == "__main__":
    sys.exit(run(parser(), chat))
