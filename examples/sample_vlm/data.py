"""Training batches: scenes with several questions each, tokenised exactly as LLaVA's evaluation scripts do.

LLaVA tokenises the text before and after `<image>` separately and drops the second BOS, so the text after the picture
starts with a lone space piece followed by the newline. `encode` does the same, once per question.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaTokenizer

from examples.sample_vlm import questions as q
from examples.sample_vlm import tokenizer
from examples.sample_vlm.model import IGNORE
from examples.sample_vlm.orders import ordered
from examples.sample_vlm.scenes import PATCH, Scene, make_scene, maybe_jpeg

PREFIX_TEXT = tokenizer.SYSTEM + " USER: "
_TAIL = " ASSISTANT:"
_OCR_SHARE = 0.3  # of the read-out questions come with TextVQA's OCR line


@lru_cache(maxsize=1)
def load_tokenizer() -> LlamaTokenizer:
    """The sample's tokenizer, built on the fly."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.build(folder)
        return LlamaTokenizer.from_pretrained(folder)


def prefix_ids(vocabulary: LlamaTokenizer) -> list[int]:
    """Ids in front of the picture, BOS included."""
    return vocabulary(PREFIX_TEXT).input_ids


@lru_cache(maxsize=65536)
def _ids(text: str) -> tuple[int, ...]:
    """Ids of a text after the picture, without BOS."""
    return tuple(load_tokenizer()(text).input_ids[1:])


def encode(text: str, answer: str | None = None) -> tuple[list[int], list[int]]:
    """Ids of a question turn (with its answer and EOS, if given) and the labels to predict at each of them."""
    open_turn = list(_ids(f"\n{text}{_TAIL}"))
    if answer is None:
        return open_turn, [IGNORE] * len(open_turn)
    reply = list(_ids(f"\n{text}{_TAIL} {answer}"))[len(open_turn) :] + [load_tokenizer().eos_token_id]
    # The last id of the turn predicts the first of the reply; EOS itself predicts nothing and is left out.
    ids = open_turn + reply[:-1]
    return ids, [IGNORE] * (len(open_turn) - 1) + reply


@dataclass
class Batch:
    """Pictures with their questions.

    Attributes:
        pixels: (B, 3, side, side) uint8.
        origins: (B, 2) int64, first patch column and row of each window.
        targets: (B, 3, n, n) int64, what each patch shows.
        questions: (B, Q, L) int64 ids, 0 where padded.
        labels: (B, Q, L) int64, the id to predict at each place or -100.
    """

    pixels: torch.Tensor
    origins: torch.Tensor
    targets: torch.Tensor
    questions: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device."""
        return Batch(**{name: t.to(device, non_blocking=True) for name, t in vars(self).items()})


def make_batch(seed: tuple[int, ...], side: int, pictures: int, per_picture: int) -> Batch:
    """A training batch that depends on `seed` alone."""
    rng = np.random.default_rng(seed)
    # Handwriting takes longest to see: every picture that is only looked at has a digit.
    want = () if per_picture else ("digit",)
    scenes = [make_scene(rng, "train", side, want) for _ in range(pictures)]
    asked = [q.ask(scene, rng, per_picture) for scene in scenes]
    for scene in scenes:
        scene.pixels = maybe_jpeg(scene.pixels, rng)
    texts = [[q.prompt_text(question, ocr=_with_ocr(question, rng)) for question in row] for row in asked]
    return collate(scenes, asked, texts)


def collate(scenes: list[Scene], asked: list[list[q.Question]], texts: list[list[str]]) -> Batch:
    """Scenes, equally many questions for each, and the questions' prompt texts, as tensors."""
    turns = [
        encode(text, question.answer)
        for row, questions in zip(texts, asked, strict=True)
        for text, question in zip(row, questions, strict=True)
    ]
    ids, labels = pad([t[0] for t in turns], 0), pad([t[1] for t in turns], IGNORE)
    shape = (len(scenes), len(turns) // len(scenes), ids.shape[-1])
    return Batch(
        pixels=torch.stack([to_tensor(scene.pixels) for scene in scenes]),
        origins=torch.tensor([scene.origin for scene in scenes]) // PATCH,
        targets=torch.from_numpy(np.stack([scene.labels for scene in scenes])),
        questions=ids.view(shape),
        labels=labels.view(shape),
    )


def _with_ocr(question: q.Question, rng: np.random.Generator) -> bool:
    """Whether this question comes in TextVQA's prompt: some of the read-outs do."""
    return question.type in ("word", "digit") and bool(rng.random() < _OCR_SHARE)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(h, w, 3) uint8 to (3, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of different length as one right-padded int64 tensor; no rows give shape (0, 0)."""
    length = max((len(row) for row in rows), default=0)
    padded = [row + [value] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), length)


@dataclass(frozen=True)
class Order:
    """What the trainer wants next: batch number, window side, pictures and questions per picture (0: none asked)."""

    number: int
    side: int
    pictures: int
    per_picture: int


class _Batches(Dataset):
    """Order in, batch out."""

    def __init__(self, seed: int):
        self.seed = seed

    def __getitem__(self, order: Order) -> Batch:
        return make_batch((self.seed, order.number), order.side, order.pictures, order.per_picture)


def loader(seed: int, workers: int, next_order: Callable[[], Order | None]) -> DataLoader:
    """Batches as `ordered` makes them."""
    return ordered(_Batches(seed), workers, next_order)
