"""Ask one question about one or several images: ``python -m llava.eval.run_llava``.

Other tools call `eval_model`.
"""

import argparse
import sys
from collections.abc import Sequence
from http.client import HTTPException
from io import BytesIO
from types import SimpleNamespace
from urllib.request import urlopen

import torch
from PIL import Image

import apet
from apet.eval.benchmarks import Question
from apet.eval.cli import add_compression_flags, config_from_flags
from apet.eval.images import ImageError, open_file, open_picture
from apet.eval.scoring_cli import Parser, run
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import new_conversation, resolve_conv_mode
from llava.eval.answerer import place_images
from llava.eval.family_answerer import FamilyAnswerer, FamilyPreparer
from llava.eval.generation import GenerationSettings
from llava.eval.lengths import context_of, crops_of, room_of_prompt
from llava.eval.program import add_decoding_flags, add_model_flags, load_model
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.processors import FamilyProcessor

_TIMEOUT_S = 30.0


def image_parser(args) -> list[str]:
    """Image names of an args object: `image_file` split at `sep`.

    Raises:
        ValueError: An empty `sep`.
    """
    if not args.sep:
        raise ValueError("--sep '' cannot separate image files; leave it out for a comma")
    return args.image_file.split(args.sep)


def load_image(image_file: str) -> Image.Image:
    """An RGB image from a path or an http(s) address.

    Raises:
        ImageError: It cannot be fetched, found or decoded.
    """
    if not image_file.startswith(("http://", "https://")):
        return open_file(image_file)
    try:
        with urlopen(image_file, timeout=_TIMEOUT_S) as response:
            content = response.read()
    except (OSError, HTTPException, ValueError) as error:
        raise ImageError(f"image {image_file} cannot be fetched: {error}") from None
    return open_picture(BytesIO(content), f"image {image_file}")


def load_images(image_files: Sequence[str]) -> list[Image.Image]:
    """RGB images of paths or addresses."""
    return [load_image(name) for name in image_files]


def insert_images(query: str, count: int, start_end: bool) -> str:
    """The query with an image token for every `<image-placeholder>` or `<image>`, or with `count` of them in front.

    Raises:
        PromptError: The query has other than `count` of them.
    """
    return place_images(query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN), count, start_end)


def eval_model(args) -> str:
    """Load the checkpoint, ask, print and return the answer.

    Args:
        args: Object with model_path, model_base, query, conv_mode, image_file, sep, temperature, top_p, num_beams and
            max_new_tokens; model_name and all flags of the parser may be missing.
    """
    args = SimpleNamespace(**(vars(parser().parse_args(["--image-file", "", "--query", ""])) | vars(args)))
    name = get_model_name_from_path(args.model_path)
    generation = GenerationSettings(args.temperature, args.top_p, args.num_beams, args.max_new_tokens)
    config = config_from_flags(args)
    images = load_images(image_parser(args))
    conversation = new_conversation(resolve_conv_mode(name, args.conv_mode, warn=print))
    tokenizer, model, image_processor = load_model(args)
    if isinstance(image_processor, FamilyProcessor):
        preparer = FamilyPreparer(image_processor, args.conv_mode or "llava_v1")
        answerer = FamilyAnswerer(model, preparer, generation, config, name, args.model_path)
        text = args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
        (given,) = answerer.answer([answerer.preparer.prepare(Question(0, text, text), images)])
        print(given.text)
        return given.text

    text = insert_images(args.query, len(images), getattr(model.config, "mm_use_im_start_end", False))
    ids = tokenizer_image_token(conversation.ask(text), tokenizer, return_tensors="pt").unsqueeze(0)
    pixels = process_images(images, image_processor, model.config)
    sizes = [image.size for image in images]
    shown = [(size, crops_of(one)) for size, one in zip(sizes, pixels, strict=True)]
    room = room_of_prompt(context_of(model.config), model.config, config, ids[0], shown)
    stacked = isinstance(pixels, torch.Tensor)
    pixels = pixels.to(model.device, model.dtype) if stacked else [one.to(model.device, model.dtype) for one in pixels]
    with apet.patched(model, config):
        output = model.generate(ids.to(model.device), images=pixels, image_sizes=sizes, **generation.kwargs())
    answer = tokenizer.decode(output[0][:room], skip_special_tokens=True).strip()
    print(answer)
    return answer


def parser() -> Parser:
    """The program's flags."""
    flags = Parser(prog="python -m llava.eval.run_llava", description=__doc__.partition(":")[0], allow_abbrev=False)
    add_model_flags(flags)
    flags.add_argument("--image-file", type=str, required=True, help="path or address; several joined by --sep")
    flags.add_argument("--query", type=str, required=True, help="the question")
    flags.add_argument("--sep", type=str, default=",", help="what stands between image files")
    add_decoding_flags(flags, 0.2, 512, None, compilable=False)
    add_compression_flags(flags)
    return flags


def _ask(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    eval_model(args)


if __name__ == "__main__":
    sys.exit(run(parser(), _ask))
