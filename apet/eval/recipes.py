"""How every benchmark was published: per model family its checkpoint and budgets, per benchmark its files and commands.

`apet.eval.suite` turns an entry of each into a run. Which file lies where is in `apet.eval.data_check.DATA`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apet.eval.data_check import find_data

_IMAGES = ("gqa", "mmbench", "mmbench_cn", "mme", "pope", "sqa", "textvqa", "vizwiz", "vqav2")
_VIDEOS = ("activitynet", "msrvtt", "msvd", "tgif")


@dataclass(frozen=True)
class Family:
    """A model family as it was published with ApET.

    Attributes:
        model: Its checkpoint.
        conv_mode: Its prompt template.
        benchmarks: Those it was run on.
        budgets: Published budget -> (budget of the vision stage, budget behind `layer`; "" for no decoder stage), in
            the units of the two flags.
        tokens: The budget that is run where none is asked for.
        other_tokens: The same for benchmarks with another one.
        layer: Decoder layer of the published budgets.
        vision_flag: Flag of the vision stage's budget; in capitals it is the environment variable.
        llm_flag: Flag of the decoder stages' budgets, likewise.
        all_tokens: What the vision stage is given to keep everything; None to leave the flag out.
        published: Budgets of the published accounting (`--compat published`), where they differ.
        ocr: "1" if TextVQA was published with OCR tokens in the prompt, else "0".
    """

    model: str
    conv_mode: str
    benchmarks: Sequence[str]
    budgets: Mapping[str, tuple[str, str]]
    tokens: str
    layer: int
    other_tokens: Mapping[str, str] = field(default_factory=dict)
    vision_flag: str = "visual_token_num"
    llm_flag: str = "image_token_list"
    all_tokens: str | None = "576"
    published: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    ocr: str = "1"


FAMILIES: Mapping[str, Family] = {
    # Tokens per image, averaged over the 32 layers of the 7B model.
    "llava1_5": Family(
        "data/model/llava-v1.5-7b", "vicuna_v1", _IMAGES,
        {"192": ("288", "96"), "128": ("192", "64"), "64": ("96", "32")}, "192", 16, {"gqa": "64"},
    ),
    # visual_token_num is per crop, image_token_list per image; the budget is the mean over 32 layers for an image of
    # five crops (newline tokens come on top; what was kept is printed after the run). The published flags mean the same
    # budgets, but their code cuts only the base crop in the decoder: --compat published repeats those numbers.
    "llava1_6": Family(
        "data/model/llava-v1.6-vicuna-7b", "vicuna_v1", _IMAGES,
        {"640": ("192", "320"), "320": ("96", "160"), "160": ("48", "80")}, "640", 16, {"vqav2": "320"}, ocr="0",
        published={"640": ("192", "64"), "320": ("96", "32"), "160": ("48", "16")},
    ),
    # Percent of the tokens, averaged over the 28 layers of the 7B model. The published flags say 20; the published code
    # ignored the one for the layer, so that its numbers are those of 30. The prompt is the checkpoint's chat template.
    "qwen2_5_vl": Family(
        "data/model/Qwen2.5-VL-7B-Instruct", "vicuna_v1", ("gqa", "mmbench", "mme", "pope", "sqa", "textvqa"),
        {"20": ("0.300", "0.333"), "30": ("0.300", "")}, "20", 14,
        vision_flag="image_token_ratio", llm_flag="image_token_ratio_list", all_tokens="1.0",
    ),
    # Patch tokens of 8 frames, 22 merged and 10 basis tokens each; none are dropped in the decoder.
    "video_llava": Family(
        "data/model/Video-LLaVA-7B-hf", "llava_v1", _VIDEOS, {"256": ("22", "")}, "256", 16,
        vision_flag="video_token_num", all_tokens=None,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a run finds its data and leaves its answers; what only some benchmarks read is empty unless it is given.

    Attributes:
        data: Folder of the benchmarks.
        out: Root of answers and scores.
        experiment: Their name.
        python: The interpreter of the programs.
        images: Folder of images or videos, in place of the benchmark's own.
        split: Question file, where a benchmark has several.
        ocr: TextVQA's prompts have the OCR tokens: "1" or "0".
        annotations: VQAv2's annotations of a split with published answers.
        mme_part: Score the MME categories that are there.
        judge: Chat model that judges answers about videos.
    """

    data: Path
    out: Path
    experiment: str
    python: str
    images: str = ""
    split: str = ""
    ocr: str = "1"
    annotations: str = ""
    mme_part: bool = False
    judge: str = ""

    def module(self, name: str, *words: object) -> "Step":
        """A program of ours as a step."""
        return Step((self.python, "-m", name, *map(str, words)))

    def link(self, folder: Path, *files: Path) -> list["Step"]:
        """Links to files in a folder: some official tools want questions and answers in one; OUT makes them two."""
        wanted = [file for file in files if file.exists() and not (folder / file.name).exists()]
        return [Step(("ln", "-s", str(file.absolute()), str(folder / file.name))) for file in wanted]

    def official(self, tool: Path, *words: object) -> list["Step"]:
        """An official scorer beside our own, in its folder, where the user has put it there."""
        step = Step((self.python, tool.name, *map(str, words)), inside=tool.parent)
        return [step] if tool.is_file() else []


@dataclass(frozen=True)
class Step:
    """A command of a run.

    Attributes:
        words: Program and arguments.
        inside: Where an official tool runs; such a step may fail. None for our own.
    """

    words: tuple[str, ...]
    inside: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """How a benchmark is answered and scored.

    Attributes:
        program: The module that answers.
        questions: Question file.
        answers: Answers file.
        flags: Of the program, beside those of every run.
        needs: Files and folders without which it cannot work.
        after: Steps behind answering.
        before: Steps in front of it.
        upload: The file for the benchmark's server that these steps write; None where there is none.
    """

    program: str
    questions: Path
    answers: Path
    flags: Sequence[str]
    needs: Sequence[Path]
    after: Sequence[Step]
    before: Sequence[Step] = ()
    upload: Path | None = None


def recipe(benchmark: str, place: Place) -> Recipe:
    """The recipe of a benchmark at a place."""
    return _RECIPES[benchmark](benchmark, place)


def first_of(*paths: Path) -> Path:
    """The first path that exists, or the first."""
    return next((path for path in paths if path.exists()), paths[0])


def _folder(benchmark: str, place: Place) -> tuple[Path, list[Path], Path]:
    """Folder of a benchmark, its files, and the folder of its images."""
    data = find_data(benchmark)
    folder = place.data / data.folder
    images = first_of(*(folder / name for name in data.images)) if data.images else folder
    return folder, [folder / file.path for file in data.files], Path(place.images) if place.images else images


_GQA_TOOLS = ("eval.py", "data/eval.py", "data/eval/eval.py")


def _gqa(benchmark: str, place: Place) -> Recipe:
    folder, files, images = _folder(benchmark, place)
    result = place.out / "gqa/answers" / files[0].stem / place.experiment
    answers, predictions = result / "merge.jsonl", result / "testdev_balanced_predictions.json"
    scoring = [
        "--tier", "testdev_balanced", "--questions", folder.absolute() / "{tier}_questions.json",
        "--predictions", result.absolute() / "{tier}_predictions.json",
    ]  # fmt: skip
    after = [
        place.module("apet.eval.convert", "gqa", "--src", answers, "--dst", predictions),
        place.module("llava.eval.eval_gqa", *scoring, "--output-json", result / "merge.score.json"),
        *place.official(first_of(*(folder / name for name in _GQA_TOOLS)), *scoring),
    ]
    return Recipe(_LOADER, files[0], answers, _shown("gqa", images), [*files, images], after)


def _pope(benchmark: str, place: Place) -> Recipe:
    folder, files, images = _folder(benchmark, place)
    answers = place.out / "pope/answers" / f"{place.experiment}.jsonl"
    scoring = ["--annotation-dir", folder / "coco", "--question-file", files[0], *_scored(answers)]
    after = [place.module("llava.eval.eval_pope", *scoring)]
    return Recipe(_LOADER, files[0], answers, _shown("pope", images), [*files, images], after)


def _textvqa(benchmark: str, place: Place) -> Recipe:
    _, files, images = _folder(benchmark, place)
    folder, questions, before = place.out / "textvqa/answers", files[0], []
    if place.ocr == "0":
        questions = folder / "questions_without_ocr.jsonl"
        before = [place.module("apet.eval.convert", "textvqa", "--src", files[0], "--dst", questions)]
    answers = folder / f"{place.experiment}.jsonl"
    after = [place.module("llava.eval.eval_textvqa", "--annotation-file", files[1], *_scored(answers))]
    return Recipe(_LOADER, questions, answers, _shown("textvqa", images), [*files, images], after, before)


def _mme(benchmark: str, place: Place) -> Recipe:
    folder, files, images = _folder(benchmark, place)
    out = place.out / "MME"
    answers, tables = out / "answers" / f"{place.experiment}.jsonl", out / "eval_tool/answers" / place.experiment
    scoring = ["--results_dir", tables, "--output-json", answers.with_suffix(".score.json")]
    after = [
        *place.link(out, files[1]),
        place.module("apet.eval.convert", "mme", "--dir", out, "--experiment", place.experiment),
        place.module("llava.eval.eval_mme", *scoring, *(["--present-only"] if place.mme_part else [])),
        *place.official(folder / "eval_tool/calculation.py", "--results_dir", tables.absolute()),
    ]
    return Recipe(_LOADER, files[0], answers, _shown("mme", images), [*files, images], after)


def _sqa(benchmark: str, place: Place) -> Recipe:
    folder, files, images = _folder(benchmark, place)
    result = place.out / "scienceqa/answers" / place.experiment
    answers = result.with_name(f"{result.name}.jsonl")
    analysis = ["--output-file", f"{result}_output.jsonl", "--output-result", f"{result}_result.json"]
    after = [place.module("llava.eval.eval_science_qa", "--base-dir", folder, *_scored(answers), *analysis)]
    flags = ["--image-folder", str(images), "--single-pred-prompt"]
    return Recipe("llava.eval.model_vqa_science", files[0], answers, flags, [*files, images], after)


def _mmbench(benchmark: str, place: Place) -> Recipe:
    """MMBench and, with questions and request in Chinese, MMBench-CN."""
    language, split = ("cn" if benchmark == "mmbench_cn" else "en"), place.split or _folder(benchmark, place)[1][0].stem
    table = first_of(*(place.data / name / f"{split}.tsv" for name in ("mmbench", "mmbench_cn")))
    result, upload = (place.out / "mmbench" / name / split for name in ("answers", "answers_upload"))
    answers = result / f"{place.experiment}.jsonl"
    scoring = ["--annotation-file", table, *_scored(answers), "--lang", language]
    # The answers of the test splits are with the server; only the upload file is written.
    after = [] if "_test_" in split else [place.module("llava.eval.eval_mmbench", *scoring)]
    submission = ["--annotation-file", table, "--result-dir", result, "--upload-dir", upload]
    after.append(place.module("apet.eval.convert", "mmbench", *submission, "--experiment", place.experiment))
    flags = ["--benchmark", benchmark, "--lang", language, "--single-pred-prompt"]
    return Recipe(
        "llava.eval.model_vqa_mmbench", table, answers, flags, [table], after,
        upload=upload / f"{place.experiment}.xlsx",
    )  # fmt: skip


def _vizwiz(benchmark: str, place: Place) -> Recipe:
    _, files, images = _folder(benchmark, place)
    answers, upload = (
        place.out / "vizwiz" / folder / f"{place.experiment}.{suffix}"
        for folder, suffix in (("answers", "jsonl"), ("answers_upload", "json"))
    )
    submission = ["--annotation-file", files[0], "--result-file", answers, "--result-upload-file", upload]
    after = [place.module("apet.eval.convert", "vizwiz", *submission)]
    return Recipe(
        _LOADER, files[0], answers, _shown("vizwiz", images), [files[0], images], after, upload=upload
    )  # fmt: skip


def _vqav2(benchmark: str, place: Place) -> Recipe:
    """VQAv2 test-dev, to the upload file; with annotations of a split whose answers are published, to its accuracy."""
    folder, (questions, test), images = _folder(benchmark, place)
    questions, out = folder / f"{place.split or questions.stem}.jsonl", place.out / "vqav2"
    answers = out / "answers" / questions.stem / place.experiment / "merge.jsonl"
    if place.annotations:
        after = [place.module("llava.eval.eval_vqav2", "--annotation-file", place.annotations, *_scored(answers))]
        upload = None
    else:
        submission = ["--dir", out, "--split", questions.stem, "--ckpt", place.experiment]
        after = [*place.link(out, test, questions), place.module("apet.eval.convert", "vqav2", *submission)]
        upload = out / "answers_upload" / questions.stem / f"{place.experiment}.json"
    needs = [questions, Path(place.annotations) if place.annotations else test, images]
    return Recipe(_LOADER, questions, answers, _shown("vqav2", images), needs, after, upload=upload)


def _video_qa(benchmark: str, place: Place) -> Recipe:
    """Open-ended questions about videos, to normalised accuracy or, with a judge, to the accuracy it gives."""
    _, (questions, truth), videos = _folder(benchmark, place)
    result = place.out / find_data(benchmark).folder / place.experiment
    answers = result / "merge.jsonl"
    scoring = ["--pred_path", answers, "--benchmark", benchmark, "--output_json", result / "merge.score.json"]
    if place.judge:
        folder = f"judge-{re.sub('[^A-Za-z0-9._-]', '_', place.judge)}"
        scoring += ["--judge", place.judge, "--output_dir", result / folder]
    flags = ["--benchmark", benchmark, "--gt_file_answers", str(truth), "--video_dir", str(videos)]
    after = [place.module("llava.eval.eval_video_qa", *scoring)]
    return Recipe("llava.eval.video_qa", questions, answers, flags, [questions, truth, videos], after)


_LOADER = "llava.eval.model_vqa_loader"
_RECIPES: Mapping[str, Callable[[str, Place], Recipe]] = {
    "gqa": _gqa, "mmbench": _mmbench, "mmbench_cn": _mmbench, "mme": _mme, "pope": _pope, "sqa": _sqa,
    "textvqa": _textvqa, "vizwiz": _vizwiz, "vqav2": _vqav2, **dict.fromkeys(_VIDEOS, _video_qa),
}  # fmt: skip


def _shown(benchmark: str, images: Path) -> list[str]:
    return ["--benchmark", benchmark, "--image-folder", str(images)]


def _scored(answers: Path) -> list[object]:
    return ["--result-file", answers, "--output-json", answers.with_suffix(".score.json")]
