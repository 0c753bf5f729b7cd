"""The assembled model for `apet.compare` and `apet.vis`: `--loader examples.sample_vlm.real.loader`.

It differs from a LLaVA checkpoint in its prompt only, which comes from the folder's chat template.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from apet.eval.benchmarks import Question
from apet.eval.scoring_cli import Parser
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.eval.answerer import LlavaPreparer
from llava.eval.apet_loader import LoadedLlava
from llava.eval.generation import GenerationSettings
from llava.eval.program import add_model_flags, load_model


def add_flags(parser: Parser) -> None:
    """Checkpoint and length of answers; decoding is greedy."""
    add_model_flags(parser)
    parser.add_argument("--max_new_tokens", type=int, default=16)


def load(args: argparse.Namespace) -> LoadedLlava:
    """The checkpoint of the model flags."""
    tokenizer, model, image_processor = load_model(args)
    preparer = ChatPreparer(tokenizer, image_processor, model.config, "chat_template")
    return LoadedLlava(model, preparer, GenerationSettings(max_new_tokens=args.max_new_tokens), args.model_path)


@dataclass(frozen=True)
class ChatPreparer(LlavaPreparer):
    """LLaVA's preparation with the prompt of the checkpoint's own chat template."""

    def render(self, question: Question) -> str:
        """The prompt text, one user turn and an open assistant turn."""
        shown = question.image is not None or question.image_base64 is not None
        content = [{"type": "image"}] * shown + [{"type": "text", "text": question.prompt}]
        message = {"role": "user", "content": content}
        return self.tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)

    def input_ids(self, question: Question) -> Tensor:
        """(L,) int64 ids, -200 for the image.

        The template writes the tokenizer's BOS into the text itself. LLaVA's rule, one BOS to be taken off every piece
        of the prompt, would take off what really stands behind the image.
        """
        before, *behind = self.render(question).split(DEFAULT_IMAGE_TOKEN)
        ids = self._ids(before)
        for piece in behind:
            ids += [IMAGE_TOKEN_INDEX, *self._ids(piece)]
        return torch.tensor(ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)
