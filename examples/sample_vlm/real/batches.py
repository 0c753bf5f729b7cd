"""Batches of fixed shape: pictures, and for each as many questions as fit into one region behind its tokens.

All questions of a picture share its tokens. Each sees the prefix, the picture and itself only, and its positions start
right behind the picture, so it equals a single-turn prompt of its own (a test holds this).
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from examples.sample_vlm import questions as q
from examples.sample_vlm.orders import ordered
from examples.sample_vlm.real.chat import Chat
from examples.sample_vlm.real.wordings import caption_turn, training_turn
from examples.sample_vlm.scenes import BRIGHT, PATCH, Scene, make_scene, maybe_jpeg

MIX = {
    "existence": 3.0,
    "shape_existence": 1.0,
    "text_existence": 0.2,
    "color": 2.5,
    "color_verify": 0.6,
    "color_choose": 0.6,
    "shape": 2.0,
    "digit": 2.5,
    "word": 1.5,
    "word_verify": 0.3,
    "count": 2.5,
    "count_verify": 0.5,
    "relation": 1.0,
    "relation_choose": 0.8,
    "region": 1.0,
    "logical": 0.5,
    "compare": 0.6,
}
_CAPTIONS = 0.5  # of the training pictures are also described
_CAPTION_WEIGHT = 0.3  # of a description's token against an answer's
_MISSES = 6  # questions that were asked before or do not fit, before a region counts as full


@dataclass(frozen=True)
class Order:
    """What to make: batch number, picture side, pictures, tokens and answer tokens per picture, split.

    `region` 0 asks nothing: pictures and what their patches show, only.
    """

    number: int
    side: int
    pictures: int
    region: int
    answers: int
    split: str = "train"


def make_batch(seed: int, order: Order, chat: Chat) -> dict:
    """The batch of an order; depends on the seed and the order alone.

    Returns:
        pixels (B, side, side, 3) uint8; origins (B, 2) int64, first patch column and row on the full grid; shown
        (B, 2, n, n) int64, kind and colour per patch; and for `region` > 0: ids, owner, offset (B, region) int64
        (owner: the question's number or -1, offset: place in its turn); places, targets, of (B, answers) int64 and
        weights (B, answers) fp32 of the answer tokens (place in the region, id to predict there, question); types, a
        list of the questions' type names per picture.
    """
    rng = np.random.default_rng([seed, order.number, order.split == "test"])
    want = () if order.region else ("digit",)
    scenes = [make_scene(rng, order.split, order.side, want, style=BRIGHT) for _ in range(order.pictures)]
    rows = [_fill(scene, rng, order, chat) for scene in scenes] if order.region else []
    batch = {
        "pixels": torch.from_numpy(np.stack([maybe_jpeg(scene.pixels, rng) for scene in scenes])),
        "origins": torch.tensor([scene.origin for scene in scenes]) // PATCH,
        "shown": torch.from_numpy(np.stack([scene.labels[:2] for scene in scenes])),
    }
    if rows:
        names = ("ids", "owner", "offset", "places", "targets", "of", "weights")
        batch |= {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in names}
        batch["types"] = [row["types"] for row in rows]
    return batch


def _fill(scene: Scene, rng: np.random.Generator, order: Order, chat: Chat) -> dict:
    """One picture's row of a batch."""
    row = {name: np.zeros(order.region, dtype=np.int64) for name in ("ids", "offset")}
    row["owner"] = np.full(order.region, -1, dtype=np.int64)
    row |= {name: np.zeros(order.answers, dtype=np.int64) for name in ("places", "targets", "of")}
    row |= {"weights": np.zeros(order.answers, dtype=np.float32), "types": []}
    used = answered = misses = 0
    asked = set()
    while misses < _MISSES:
        kind, text, answer, weight = _next_turn(scene, rng, order.split, first=not row["types"])
        turn, reply = chat.turn(text), chat.answer(answer)
        ids = (*turn, *reply[:-1])  # the end of the turn is predicted, never read
        if text in asked or used + len(ids) > order.region or answered + len(reply) > order.answers:
            misses += 1
            continue
        here, slots = slice(used, used + len(ids)), slice(answered, answered + len(reply))
        row["ids"][here], row["offset"][here], row["owner"][here] = ids, np.arange(len(ids)), len(row["types"])
        row["places"][slots] = np.arange(len(reply)) + used + len(turn) - 1
        row["targets"][slots], row["weights"][slots], row["of"][slots] = reply, weight, len(row["types"])
        row["types"].append(kind)
        asked.add(text)
        used, answered = used + len(ids), answered + len(reply)
    return row


def _next_turn(scene: Scene, rng: np.random.Generator, split: str, first: bool) -> tuple[str, str, str, float]:
    """Type, user's text, answer and weight of the next turn about a scene."""
    if split == "train" and first and rng.random() < _CAPTIONS:
        return "caption", *caption_turn(scene, rng), _CAPTION_WEIGHT
    question = q.ask(scene, rng, 1, MIX)[0]
    if split == "test":
        return question.type, q.prompt_text(question), question.answer, 1.0
    return question.type, *training_turn(question, rng), 1.0


class _Batches(Dataset):
    """Order in, batch and order out."""

    def __init__(self, seed: int, chat_folder):
        self.seed, self.chat_folder, self.chat = seed, chat_folder, None

    def __getitem__(self, order: Order) -> tuple[Order, dict]:
        if self.chat is None:  # each worker process opens its own
            self.chat = Chat(self.chat_folder)
        return order, make_batch(self.seed, order, self.chat)


def loader(seed: int, chat_folder, workers: int, next_order: Callable[[], Order | None], pin: bool) -> DataLoader:
    """(order, batch) as `ordered` makes them."""
    made, ready = _Batches(seed, chat_folder), _leave_stopping_to_the_trainer
    return ordered(made, workers, next_order, pin_memory=pin, worker_init_fn=ready)


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """A SIGTERM for the whole process group must not take the data away before the trainer has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
