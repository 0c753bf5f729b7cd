"""Accuracy per question type of a training checkpoint on held-out scenes, all image tokens kept.

    python -m examples.sample_vlm.evaluate --checkpoint runs/sample_vlm/small/last.pt

An answer is right when greedy decoding would give exactly the true answer and stop. One pass over prompt and true
answer decides that: decoding follows the true answer as long as every most likely token is the true one.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from examples.sample_vlm import questions as q
from examples.sample_vlm.data import Batch, collate
from examples.sample_vlm.export import load_checkpoint
from examples.sample_vlm.model import IGNORE, SampleVlm
from examples.sample_vlm.scenes import CANVAS, make_scene


def main(argv: list[str] | None = None) -> None:
    """Command line: a table for people, one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/sample_vlm/small/last.pt"))
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--per_picture", type=int, default=8)
    parser.add_argument("--side", type=int, default=CANVAS, help="window side in pixels; 336 is the real task")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_checkpoint(args.checkpoint).eval()
    report = evaluate(model, args.pictures, args.per_picture, args.side, args.split, args.seed)
    print(f"{'type':<24}{'questions':>10}{'accuracy':>10}")
    for name, (right, total) in report.items():
        print(f"{name:<24}{total:>10}{right / total:>10.1%}")
    print(json.dumps({name: round(right / total, 4) for name, (right, total) in report.items()}))


@torch.inference_mode()
def evaluate(
    model: SampleVlm, pictures: int, per_picture: int, side: int = CANVAS, split: str = "test", seed: int = 1
) -> dict[str, tuple[int, int]]:
    """Right and asked per type (`color/query`: our type / GQA's structural type), then over all."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for batch, asked in tqdm(batches(pictures, per_picture, side, split, seed), total=-(-pictures // 4), disable=None):
        right = correct(model, batch).flatten().tolist()
        for question, hit in zip((question for row in asked for question in row), right, strict=True):
            for name in (f"{question.type}/{question.structural}", "all"):
                counts[name][0] += hit
                counts[name][1] += 1
    return {name: tuple(counts[name]) for name in sorted(counts, key=lambda n: (n == "all", n))}


def batches(
    pictures: int, per_picture: int, side: int, split: str, seed: int
) -> Iterator[tuple[Batch, list[list[q.Question]]]]:
    """Batches of four pictures with their questions."""
    rng = np.random.default_rng([seed, 7])
    for first in range(0, pictures, 4):
        scenes = [make_scene(rng, split, side) for _ in range(min(4, pictures - first))]
        asked = [q.ask(scene, rng, per_picture) for scene in scenes]
        yield collate(scenes, asked, [[q.prompt_text(question) for question in row] for row in asked]), asked


def correct(model: SampleVlm, batch: Batch) -> torch.Tensor:
    """(B, Q) bool: every token of the answer, and its end, is the most likely one."""
    features, _ = model.see(batch.pixels, batch.origins)
    predicted = model.lm_head(model.read(features, batch.questions)).argmax(-1)
    return ((predicted == batch.labels) | (batch.labels == IGNORE)).all(-1)


if __name__ == "__main__":
    main()
