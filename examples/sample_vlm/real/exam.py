"""The held-out questions as a benchmark: GQA's layout, pictures in the trained style, one question per picture.

Questions about one picture are right or wrong together, so as many pictures as questions say most.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.sample_vlm import questions as q
from examples.sample_vlm.benchmarks import write_gqa_of
from examples.sample_vlm.real.batches import MIX
from examples.sample_vlm.scenes import BRIGHT, Scene, Style, make_scene

SEED = 2026


def held_out(seed: int, style: Style = BRIGHT, split: str = "test") -> Iterator[tuple[Scene, np.random.Generator]]:
    """Endless pictures of a split's photographs, digits and words, and the generator that may ask about the last.

    With `split="train"` the pictures are new, but of what the model was trained on: methods are chosen there.
    """
    rng = np.random.default_rng(seed)
    while True:
        yield make_scene(rng, split, style=style), rng


def write_exam(out: Path, pictures: int) -> None:
    """`out/gqa` with so many questions."""
    if (out / "gqa").exists():
        raise SystemExit(f"{out / 'gqa'} is there already; name another folder with --out, or delete it")
    (out / "gqa").mkdir(parents=True)
    drawn = zip(range(pictures), held_out(SEED), strict=False)
    write_gqa_of(out / "gqa", ((scene, q.ask(scene, rng, 1, MIX)) for _, (scene, rng) in drawn))
