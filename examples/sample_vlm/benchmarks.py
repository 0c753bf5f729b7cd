"""Write the sample benchmarks: our held-out scenes and questions in the file formats of GQA, POPE, TextVQA and MME.

    python -m examples.sample_vlm.benchmarks --out data/sample/eval

Every benchmark draws its own pictures, from the `test` split unless told otherwise. The files are a function of the
seed, the split and the style alone.
"""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.sample_vlm import questions as q
from examples.sample_vlm.scenes import DIM, LARGE, Scene, Style, make_scene

SEED = 2024
GQA_IMAGES, GQA_PER_IMAGE = 220, 5
POPE_IMAGES, POPE_PER_IMAGE = 75, 4  # per category, half of them "yes"
TEXTVQA_IMAGES = 150  # one question about the word and one about the digit each
MME_IMAGES = 20  # per category
POPE_CATEGORIES = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}  # category -> first id minus one
MME_MAKERS = {
    "existence": q.existence,
    "count": q.count_verify,
    "color": q.color_verify,
    "position": q.relation,
    "OCR": q.word_verify,
}
STYLES = {"dim": DIM, "large": LARGE}


@dataclass(frozen=True)
class Pictures:
    """What pictures are made of: the photographs, digits and words of a split, in a style."""

    split: str = "test"
    style: Style = DIM

    def draw(
        self, rng: np.random.Generator, want: tuple[str, ...] = (), good: Callable[[Scene], object] | None = None
    ) -> Scene:
        """The next scene, or the next that is `good`."""
        while True:
            scene = make_scene(rng, self.split, want=want, style=self.style)
            if good is None or good(scene):
                return scene


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/sample/eval"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the pictures to write (for trials)")
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        default="test",
        help="train: pictures to choose settings on, so that the test pictures stay unseen",
    )
    parser.add_argument("--style", choices=STYLES, default="dim", help="large: things of five to seven patches")
    args = parser.parse_args(argv)
    pictures = Pictures(args.split, STYLES[args.style])
    for number, (name, write) in enumerate(tqdm(WRITERS.items(), desc="benchmarks")):
        folder = args.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder, np.random.default_rng([args.seed, number]), args.scale, pictures)


def write_gqa(folder: Path, rng: np.random.Generator, scale: float = 1.0, pictures: Pictures = Pictures()) -> None:
    """`llava_gqa_testdev_balanced.jsonl`, `testdev_balanced_questions.json` and `images/`."""
    scenes = (pictures.draw(rng) for _ in range(_count(GQA_IMAGES, scale)))
    write_gqa_of(folder, ((scene, _varied(scene, rng, GQA_PER_IMAGE)) for scene in scenes))


def write_gqa_of(folder: Path, asked: Iterable[tuple[Scene, list[q.Question]]]) -> None:
    """The files of GQA for these pictures and questions."""
    rows, annotations = [], {}
    for number, (scene, questions) in enumerate(asked):
        image_id = f"n{number:06d}"
        _save(scene, folder / "images" / f"{image_id}.jpg")
        for question in questions:
            question_id = f"{20_000_000 + len(rows)}"
            rows.append(_row(question_id, f"{image_id}.jpg", question.text))
            annotations[question_id] = _gqa_entry(question, image_id)
    _link_entailed(annotations)
    _write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(annotations, indent=0))


def write_pope(folder: Path, rng: np.random.Generator, scale: float = 1.0, pictures: Pictures = Pictures()) -> None:
    """`llava_pope_test.jsonl`, `coco/coco_pope_<category>.json` and `val2014/`.

    Each picture is asked about two coloured shapes it shows and two it does not: any absent ones (random), absent ones
    that are frequent in the other pictures (popular), absent ones that share a colour or a shape with a present one
    (adversarial).
    """
    scenes = [pictures.draw(rng, good=lambda s: len(_pairs(s)) >= 2) for _ in range(_count(POPE_IMAGES, scale))]
    frequency = Counter(pair for scene in scenes for pair in _pairs(scene))
    names = [f"COCO_val2014_{number:012d}.jpg" for number in range(1, len(scenes) + 1)]
    for name, scene in zip(names, scenes, strict=True):
        _save(scene, folder / "val2014" / name)
    rows = []
    (folder / "coco").mkdir()
    for category, first in POPE_CATEGORIES.items():
        labels = []
        for name, scene in zip(names, scenes, strict=True):
            for question in _pope_questions(scene, rng, category, frequency):
                question_id = first + len(labels) + 1
                rows.append(_row(question_id, name, question.text) | {"category": category})
                labels.append(
                    {"question_id": question_id, "image": name, "text": question.text, "label": question.answer}
                )
        _write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels)
    _write_jsonl(folder / "llava_pope_test.jsonl", rows)


def write_textvqa(folder: Path, rng: np.random.Generator, scale: float = 1.0, pictures: Pictures = Pictures()) -> None:
    """`llava_textvqa_val_v051_ocr.jsonl` (its OCR line empty), `TextVQA_0.5.1_val.json` and `train_images/`."""
    rows, data = [], []
    for number in range(_count(TEXTVQA_IMAGES, scale)):
        scene = pictures.draw(rng, ("word", "digit"), lambda s: s.of("word") and s.of("digit"))
        image_id = f"{number:016x}"
        _save(scene, folder / "train_images" / f"{image_id}.jpg")
        for maker in (q.word, q.digit):
            question = maker(scene, rng, True)
            rows.append(_row(image_id, f"{image_id}.jpg", question.text + q.OCR_LINE))
            data.append(
                {
                    "question": question.text,
                    "image_id": image_id,
                    "image_classes": [],
                    "image_width": scene.side,
                    "image_height": scene.side,
                    "question_id": len(data) + 34602,
                    "question_tokens": question.text.lower().rstrip("?").split(),
                    "answers": [question.answer.lower()] * 10,
                    "set_name": "val",
                }
            )
    _write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps(content, indent=0))


def write_mme(folder: Path, rng: np.random.Generator, scale: float = 1.0, pictures: Pictures = Pictures()) -> None:
    """`llava_mme.jsonl` and `MME_Benchmark_release_version/<category>/`: one "yes" and one "no" per picture."""
    rows = []
    for category, maker in MME_MAKERS.items():
        target = folder / "MME_Benchmark_release_version" / category
        for number in range(_count(MME_IMAGES, scale)):
            scene, pair = _mme_pair(rng, pictures, maker)
            name = f"{number:06d}"
            _save(scene, target / f"{name}.jpg")
            path = f"{category}/{name}.jpg"
            rows += [_row(path, path, p.text) | {"category": category} for p in pair]
            truth = [f"{p.text} Please answer yes or no.\t{p.answer.capitalize()}\n" for p in pair]
            (target / f"{name}.txt").write_text("".join(truth))
    _write_jsonl(folder / "llava_mme.jsonl", rows)


WRITERS = {"gqa": write_gqa, "pope": write_pope, "textvqa": write_textvqa, "MME": write_mme}


def _mme_pair(rng: np.random.Generator, pictures: Pictures, maker: q.Maker) -> tuple[Scene, list[q.Question]]:
    """A scene for which the maker has a "yes" and a "no" question, and the two."""
    want = ("word",) if maker is q.word_verify else ()
    while True:
        scene = pictures.draw(rng, want)
        pair = [maker(scene, rng, True), maker(scene, rng, False)]
        if None not in pair:
            return scene, pair


def _pairs(scene: Scene) -> list[tuple[str, str]]:
    """The distinct (colour, shape) pairs of a scene, in the order drawn."""
    return list(dict.fromkeys((t.color, t.name) for t in scene.of("shape")))


def _pope_questions(scene: Scene, rng: np.random.Generator, category: str, frequency: Counter) -> list[q.Question]:
    """As many present pairs as absent ones of the category, alternating yes and no."""
    half = POPE_PER_IMAGE // 2
    present = _pairs(scene)
    yes = [present[int(i)] for i in rng.choice(len(present), size=half, replace=False)]
    absent = q.absent_pairs(scene, hard=category == "adversarial")
    if category == "popular":
        no = sorted(absent, key=lambda pair: -frequency[pair])[:half]
    else:
        no = [absent[int(i)] for i in rng.choice(len(absent), size=half, replace=False)]
    both = zip(yes, no, strict=True)
    return [question for a, b in both for question in (q.existence_of(*a, True), q.existence_of(*b, False))]


def _varied(scene: Scene, rng: np.random.Generator, number: int) -> list[q.Question]:
    """`number` different questions, of different types as far as the scene allows."""
    chosen: dict[str, q.Question] = {}
    kinds: Counter = Counter()
    limit = 1
    while len(chosen) < number:
        for question in q.ask(scene, rng, 20):
            if len(chosen) < number and question.text not in chosen and kinds[question.type] < limit:
                chosen[question.text] = question
                kinds[question.type] += 1
        limit += 1
    return list(chosen.values())


def _gqa_entry(question: q.Question, image_id: str) -> dict:
    """GQA's annotation of a question; binary answers have no global group there, open ones are grouped by type."""
    steps = [
        {"operation": operation, "dependencies": [i - 1] if i else [], "argument": argument}
        for i, (operation, argument) in enumerate(question.program)
    ]
    text = "->".join(f"{s['operation']}: {s['argument']} {s['dependencies']}" for s in steps)
    subject = question.program[0][1]
    open_ended = question.structural == "query"
    return {
        "semantic": steps,
        "entailed": [],
        "equivalent": [],
        "question": question.text,
        "imageId": image_id,
        "isBalanced": True,
        "groups": {"global": question.type if open_ended else None, "local": f"{image_id}-{subject}_{question.type}"},
        "answer": question.answer.lower(),
        "semanticStr": text,
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {
            "detailed": f"{question.type}{question.structural.capitalize()}",
            "semantic": question.semantic,
            "structural": question.structural,
        },
        "fullAnswer": question.full_answer,
    }


def _link_entailed(annotations: dict[str, dict]) -> None:
    """Every question entails itself, as in GQA; equal programs about one picture are equivalent."""
    groups: dict[tuple[str, str], list[str]] = {}
    for question_id, entry in annotations.items():
        groups.setdefault((entry["imageId"], entry["semanticStr"]), []).append(question_id)
    for same in groups.values():
        for question_id in same:
            annotations[question_id]["entailed"] = same
            annotations[question_id]["equivalent"] = same


def _row(question_id: int | str, image: str, text: str) -> dict:
    """A line of a LLaVA question file."""
    return {"question_id": question_id, "image": image, "text": text + q.SUFFIX, "category": "default"}


def _count(full: int, scale: float) -> int:
    """The number of pictures at this scale, at least two."""
    return max(2, round(full * scale))


def _save(scene: Scene, path: Path) -> None:
    """A compact JPEG without chroma subsampling, which would wash out the smallest coloured shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.pixels).save(path, quality=80, subsampling=0, optimize=True)


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
