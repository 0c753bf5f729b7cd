"""Videos from file to score: decoding, every family on encoded clips, chunks, resume, and what cannot be read."""

import importlib.util
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from clips import STEP, write_clip, write_corrupt, write_empty
from families import FAMILIES
from family_checkpoints import write_checkpoint
from PIL import Image
from transformers import AutoConfig

import apet
from apet.eval.benchmarks import Question, get_benchmark
from apet.eval.images import ImageError, Pictures
from apet.eval.runner import merge_chunks
from apet.eval.videos import Clip, frame_indices, read_clip
from llava.eval import video_qa
from llava.eval.family_answerer import FamilyAnswerer, FamilyPreparer
from llava.eval.generation import GenerationSettings
from llava.eval.program import main
from llava.model.builder import load_pretrained_model
from llava.model.processors import Limits, load_processor

TINY = Path(__file__).resolve().parents[1] / "golden/end_to_end/llava-v1.5-tiny"
GOOD = ("a", "b", "c")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(family)`: the folder of a tiny one, written once."""
    root, known = tmp_path_factory.mktemp("checkpoints"), {}

    def find(family: str) -> Path:
        if family not in known:
            known[family] = write_checkpoint(family, root / family)
        return known[family]

    return find


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight questions about three clips and three files that are none."""
    root = tmp_path_factory.mktemp("data")
    for seed, (name, frames) in enumerate(zip(GOOD, (23, 5, 40), strict=True)):
        write_clip(root / "videos" / f"{name}{('.mp4', '.avi', '.mkv')[seed]}", frames, seed=seed)
    write_corrupt(root / "videos" / "broken.mp4")
    write_empty(root / "videos" / "nothing.mp4")
    asked = [
        {"video_name": name, "question": f"what is it {index}?", "question_id": f"q{index}"}
        for index, name in enumerate(("a", "broken", "b", "c", "nothing", "a", "missing", "b"))
    ]
    (root / "test_q.json").write_text(json.dumps(asked))
    answers = [{"answer": f"answer {row['question_id']}", "question_id": row["question_id"]} for row in asked]
    (root / "test_a.json").write_text(json.dumps(answers[::-1]))
    return root


def ask(model: Path, data: Path, out: Path, *flags: str, name: str = "merge") -> int:
    words = [
        "--model_path", str(model), "--video_dir", str(data / "videos"), "--gt_file_question",
        str(data / "test_q.json"), "--gt_file_answers", str(data / "test_a.json"), "--output_dir", str(out),
        "--output_name", name, "--cache_dir", "x", "--device", "cpu", "--num_workers", "0", "--max_new_tokens", "4",
        "--num_frames", "4", *flags,
    ]  # fmt: skip
    return main(video_qa.parser(), words, video_qa.read, video_qa.complete)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_specification(tmp_path):
    assert frame_indices(50, 8).tolist() == [0, 7, 14, 21, 28, 35, 42, 49]
    assert frame_indices(3, 8).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    clip = read_clip(write_clip(tmp_path / "x.mp4", 50, rate=25), 8)
    levels = [np.asarray(frame)[30:, 30:].mean() / STEP for frame in clip.frames]
    assert levels == pytest.approx(frame_indices(50, 8), abs=0.6)
    assert clip.times == pytest.approx(frame_indices(50, 8) / 25) and clip.seconds == pytest.approx(2)


class CountingContainer:
    """A container of PyAV that counts the frames it decodes."""

    def __init__(self, container, decoded: list) -> None:
        self._container, self._decoded = container, decoded

    def __getattr__(self, name):
        return getattr(self._container, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._container.close()

    def decode(self, *args, **kwargs):
        for frame in self._container.decode(*args, **kwargs):
            self._decoded.append(frame.pts)
            yield frame


# File, codec, its settings, and how many of 60 frames may be decoded for three of them.
LAYOUTS = [
    ("x.mp4", "mpeg4", {"gop_size": 10}, 30),
    ("x.avi", "mpeg4", {"gop_size": 10}, 30),
    ("x.mkv", "libx264", {"gop_size": 12, "max_b_frames": 2}, 36),
    ("x.mp4", "libx264", {"gop_size": 12, "max_b_frames": 2}, 36),
    ("x.mp4", "libx265", {"gop_size": 12}, 36),
    ("x.webm", "libvpx-vp9", {"gop_size": 10}, 30),
    ("x.ts", "mpeg2video", {"gop_size": 10}, 180),  # seeking lands too late, so all are decoded: to count, and to pick
    ("x.mp4", "mpeg4", {"gop_size": 250}, 60),  # a single keyframe
]


@pytest.mark.parametrize(("name", "codec", "fields", "most"), LAYOUTS, ids=lambda value: str(value))
def test_only_the_way_to_a_frame_is_decoded(tmp_path, monkeypatch, name, codec, fields, most):
    path = write_clip(tmp_path / name, 60, rate=25, codec=codec, **fields)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    decoded, own = [], av.open
    monkeypatch.setattr(av, "open", lambda *args: CountingContainer(own(*args), decoded))
    clip = read_clip(path, 3)
    for index, frame in zip((0, 29, 59), clip.frames, strict=True):
        np.testing.assert_array_equal(np.asarray(frame), every[index])
    assert clip.times == pytest.approx([0, 29 / 25, 59 / 25]) and len(decoded) <= most


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_frames_of_any_number(tmp_path, count):
    clip = read_clip(write_clip(tmp_path / "x.avi", 3), count)
    assert len(clip.frames) == len(clip.times) == count and {frame.size for frame in clip.frames} == {(64, 48)}


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("x.mp4", write_corrupt, "x.mp4 cannot be decoded"),
        ("x.avi", write_corrupt, "x.avi is cut off: it has .* of its 30 frames"),
        ("x.avi", write_empty, "x.avi holds no frame"),
        ("x.mp4", write_empty, "x.mp4"),
        ("x.mp4", lambda path: path.write_text("no video"), "x.mp4 cannot be decoded"),
        ("x.mp4", lambda path: path.write_bytes(b""), "x.mp4 cannot be decoded"),
        ("x.mp4", lambda path: None, "x does not exist"),
        ("x.mp4", lambda path: path.mkdir(), "x does not exist"),
    ],
    ids=["cut mp4", "cut avi", "empty avi", "empty mp4", "text", "empty file", "missing", "folder"],
)
def test_a_file_that_is_no_video_is_named(tmp_path, name, write, said):
    write(tmp_path / name)
    with pytest.raises(ImageError, match=said):
        read_clip(tmp_path / "x", 4)


def test_a_name_no_file_can_have_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match="cannot be decoded: .*File name too long"):
        read_clip(tmp_path / ("x" * 300), 4)


def test_a_video_is_decoded_once_for_questions_that_follow_each_other(tmp_path):
    path = write_clip(tmp_path / "x.mp4", 10)
    first = read_clip(path, 4)
    assert read_clip(tmp_path / "x", 4) is first and len(read_clip(path, 3).frames) == 3
    write_clip(path, 20)
    os.utime(path, ns=(0, 0))
    assert read_clip(path, 4).seconds == pytest.approx(2)


def test_pyav_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install av"):
        read_clip(tmp_path / "x", 4)


# --- every family -----------------------------------------------------------------------------------------------------

BUDGETS = {
    "video_llava": ["--apet", "video_token_num=6", "--basis_token_num", "2"],
    "internvl": ["--visual_token_num", "5", "--basis_token_num", "2"],
}
CLIP_BUDGET = ["--apet", "video_token_num=7,video_budget_per=clip", "--basis_token_num", "2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_what_it_can_and_records_the_rest(family, checkpoint, data, tmp_path, capsys):
    flags = BUDGETS.get(family, CLIP_BUDGET)
    assert ask(checkpoint(family), data, tmp_path, *flags) == 0
    found = rows(tmp_path / "merge.json")
    assert [row["id"] for row in found] == ["q0", "q2", "q3", "q5", "q7"]
    assert all(list(row) == ["id", "question", "answer", "pred"] for row in found)
    assert all(row["answer"] == f"answer {row['id']}" for row in found)
    record = json.loads((tmp_path / "merge.run.json").read_text())
    assert {one["question_id"]: Path(one["video"]).name for one in record["failures"]} == {
        "q1": "broken", "q4": "nothing", "q6": "missing",
    }  # fmt: skip
    whole = tmp_path / "whole"
    assert ask(checkpoint(family), data, whole) == 0
    before = json.loads((whole / "merge.run.json").read_text())["layer_averaged_tokens"]
    assert record["layer_averaged_tokens"] < before
    if family == "video_llava":  # class token, merged and basis tokens of four frames
        assert record["layer_averaged_tokens"] == 4 * (1 + 6 + 2) and before == 4 * 17
    assert ask(checkpoint(family), data, tmp_path, *flags, "--batch_size", "3", name="many") == 0
    assert rows(tmp_path / "many.json") == found


def test_chunks_keep_their_own_answers_and_can_be_resumed(checkpoint, data, tmp_path):
    model, flags = checkpoint("video_llava"), BUDGETS["video_llava"]
    assert ask(model, data, tmp_path, *flags) == 0
    expected = rows(tmp_path / "merge.json")
    for index in range(3):
        assert (
            ask(model, data, tmp_path, *flags, "--num_chunks", "3", "--chunk_idx", str(index), name=f"3_{index}") == 0
        )
    parts = [tmp_path / f"3_{index}.json" for index in range(3)]
    merge_chunks(parts, tmp_path / "joined.json")
    assert rows(tmp_path / "joined.json") == expected
    path = tmp_path / "merge.json"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert ask(model, data, tmp_path, *flags, "--resume") == 0
    assert rows(path) == expected
    assert get_benchmark("msvd").score(pred_path=path).details["unanswered"] == 3


def test_the_file_of_right_answers_is_no_place_for_those_of_the_model(data, tmp_path, capsys):
    before = (data / "test_a.json").read_bytes()
    for flags in ([], ["--overwrite"]):
        assert ask(tmp_path / "no_model", data, data, *flags, name="test_a") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "test_a.json would be written, but it is an input" in line
    assert (data / "test_a.json").read_bytes() == before


def test_workers_decode(checkpoint, data, tmp_path):
    model = checkpoint("internvl")
    assert ask(model, data, tmp_path) == 0
    assert ask(model, data, tmp_path, "--num_workers", "2", name="workers") == 0
    assert rows(tmp_path / "workers.json") == rows(tmp_path / "merge.json")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "video_llava"])
@pytest.mark.parametrize("per", ["frame", "clip"])
def test_tokens_of_a_video_in_the_decoder_are_known_before(family, per, checkpoint, data):
    """What decides whether a prompt fits the context, against what a patched model keeps."""
    _, model, processor, _ = load_pretrained_model(str(checkpoint(family)), None, family, device="cpu")
    for config in (
        apet.ApetConfig(video_token_num=5, video_budget_per=per, basis_token_num=2),
        apet.ApetConfig(video_token_num=500, video_budget_per=per),
        apet.ApetConfig(),
    ):
        preparer = FamilyPreparer(processor, "llava_v1", 5)
        answerer = FamilyAnswerer(model, preparer, GenerationSettings(max_new_tokens=1), config, family, "")
        question = Question(0, "what?", "what?", video="b")
        inputs = answerer.preparer.prepare(question, Pictures(question, str(data / "videos")))
        answerer.answer([inputs])
        entered = apet.last_result(model).tokens_per_layer[0][0]
        text = len(inputs.input_ids) - sum(inputs.visual)
        assert inputs.room == answerer.preparer.context.positions - text - entered
        apet.remove_patch(model)


def test_a_bad_video_stops_the_run_if_asked_to(checkpoint, data, tmp_path, capsys):
    assert ask(checkpoint("internvl"), data, tmp_path, "--on_error", "stop") == 1
    assert "broken" in capsys.readouterr().err
    assert [row["id"] for row in rows(tmp_path / "merge.json")] == ["q0"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_frames", "0"], "num_frames"),
        (["--benchmark", "gqa"], "model_vqa_loader"),
        (["--model_path", str(TINY)], "takes no videos"),
    ],
)
def test_what_cannot_be_asked_is_refused(checkpoint, data, tmp_path, capsys, flags, said):
    assert ask(checkpoint("internvl"), data, tmp_path, *flags) == 1
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


# --- layouts of videos ------------------------------------------------------------------------------------------------


def clip(count: int, size: tuple[int, int] = (70, 50)) -> Clip:
    generator = np.random.default_rng(count)
    frames = [Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(count)]
    return Clip(tuple(frames), tuple(0.5 * index for index in range(count)), 0.5 * count)


def processor(folder: Path):
    return load_processor(str(folder), AutoConfig.from_pretrained(folder), Limits())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("count", [3, 4])
def test_qwen_patches_hold_two_frames(checkpoint, family, count):
    """Against the definition: pixels of frame pairs, in blocks of merged patches."""
    made = processor(checkpoint(family))
    shown = clip(count)
    given = made("what?", clip=shown).tensors
    steps, rows_, columns = given["video_grid_thw"][0].tolist()
    side, frames = made.image_processor.patch_size, [*shown.frames, *shown.frames[-1:]][: 2 * steps]
    assert steps == 2
    arrays = np.stack(
        [np.asarray(one.resize((columns * side, rows_ * side), Image.Resampling.BICUBIC)) for one in frames]
    )
    pixels = ((arrays / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)
    blocks = pixels.reshape(steps, 2, 3, rows_ // 2, 2, side, columns // 2, 2, side).transpose(
        0, 3, 6, 4, 7, 2, 1, 5, 8
    )
    np.testing.assert_allclose(given["pixel_values_videos"], blocks.reshape(steps * rows_ * columns, -1), atol=1e-5)
    if family == "qwen2_5_vl":
        assert given["second_per_grid_ts"].tolist() == [1.0]


def test_qwen3_writes_the_time_of_every_pair(checkpoint):
    made = processor(checkpoint("qwen3_vl"))
    text = made.tokenizer.decode(made("what?", clip=clip(4)).input_ids)
    shown = text.replace("<|video_pad|>", "")
    assert "user\n<0.2 seconds><|vision_start|><|vision_end|><1.2 seconds><|vision_start|><|vision_end|>what?" in shown


def test_internvl_numbers_the_frames(checkpoint):
    made = processor(checkpoint("internvl"))
    text = made.tokenizer.decode(made("what?", clip=clip(2)).input_ids)
    run = "<img>" + "<IMG_CONTEXT>" * 9 + "</img>"
    assert f"user\nFrame1: {run}\nFrame2: {run}\nwhat?" in text


def test_video_llava_asks_as_published(checkpoint):
    made = processor(checkpoint("video_llava"))
    shown = made("what is it?", clip=clip(3), conv_mode="llava_v1")
    text = made.tokenizer.decode(shown.input_ids)
    assert text.replace("<video>", "") == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: \nwhat is it? ASSISTANT:"
    )
    assert text.count("<video>") == 3 * 17 and shown.tensors["pixel_values_videos"].shape == (1, 3, 3, 56, 56)
