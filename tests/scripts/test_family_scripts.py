"""The scripts of Qwen2.5-VL and Video-LLaVA: from start to score with tiny checkpoints, and the commands they run."""

import json
import sys
from pathlib import Path

import pytest
from clips import write_clip, write_corrupt
from fake_endpoint import FakeEndpoint, Reply, message
from family_checkpoints import write_checkpoint

from .conftest import ROOT, read_lines, run_script, save, write_miniature
from .test_scripts import commands, flag

SMALL = ["--min_pixels", "3136", "--max_pixels", "12544"]
IMAGES = ("gqa", "mmbench", "mme", "pope", "sqa", "textvqa")
VIDEOS = {
    "msvd": ("MSVD", "videos"), "msrvtt": ("MSRVTT", "videos/all"), "tgif": ("TGIF", "mp4"),
    "activitynet": ("Activitynet", "all_test"),
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return write_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("model") / "tiny-qwen")


@pytest.fixture(scope="module")
def video_llava(tmp_path_factory) -> Path:
    return write_checkpoint("video_llava", tmp_path_factory.mktemp("model") / "tiny-video-llava")


def write_videos(root: Path, name: str) -> Path:
    """A miniature of a video benchmark: two clips, one that was cut, one that is not there; returns its folder."""
    data, videos = VIDEOS[name]
    folder = root / f"GPT_Zero_Shot_QA/{data}_Zero_Shot_QA"
    prefix = "v_" if name == "activitynet" else ""
    write_clip(folder / videos / f"{prefix}a.mp4", 12)
    write_clip(folder / videos / f"{prefix}b.avi", 9, seed=1)
    write_corrupt(folder / videos / f"{prefix}cut.mp4")
    names = ("a", "cut", "b", "a", "absent")
    save(folder / "test_q.json", [
        {"video_name": video, "question": f"what is it {index}", "question_id": f"v_{index}"}
        for index, video in enumerate(names)
    ])  # fmt: skip
    save(folder / "test_a.json", [{"answer": f"answer {index}", "type": 1} for index in range(len(names))])
    return folder


@pytest.mark.parametrize("name", ["gqa", "mmbench", "sqa"])
def test_qwen_to_its_score(name, qwen, tmp_path):
    data = write_miniature(tmp_path / "eval")
    outcome = run_script(f"qwen2_5_vl/{name}", data, *SMALL, MODEL=qwen, LAYER_LIST="[2]", EXPERIMENT="mine")
    assert outcome.status == 0, outcome.err
    (score,) = data.rglob("*.score.json")
    record = json.loads(score.with_name(score.name.replace(".score.", ".run.")).read_text())
    assert record["status"] == "complete" and record["settings"]["compression"]["image_token_ratio"] == 0.3
    assert record["settings"]["compression"]["image_token_ratio_list"] == [0.333]
    assert "ccuracy" in outcome.out


def test_videos_in_two_chunks_keep_their_answers(video_llava, tmp_path):
    folder = write_videos(tmp_path / "eval", "msvd")
    outcome = run_script("video_llava/msvd", tmp_path / "eval", MODEL=video_llava, CHUNKS=2)
    assert outcome.status == 0, outcome.err
    found = read_lines(folder / "tiny-video-llava/merge.jsonl")
    assert [(row["id"], row["answer"]) for row in found] == [(f"v_{i}", f"answer {i}") for i in (0, 2, 3)]
    record = json.loads((folder / "tiny-video-llava/merge.run.json").read_text())
    assert [one["question_id"] for one in record["failures"]] == ["v_1", "v_4"]
    score = json.loads((folder / "tiny-video-llava/merge.score.json").read_text())
    assert (score["name"], score["n_questions"], score["details"]["unanswered"]) == ("msvd", 3, 2)
    assert "Normalised accuracy: " in outcome.out and "Not counted: 2 questions" in outcome.out


def test_videos_with_a_judge(video_llava, tmp_path):
    folder = write_videos(tmp_path / "eval", "activitynet")
    with FakeEndpoint(lambda body: Reply(body=message('{"pred": "yes", "score": 4}'))) as server:
        outcome = run_script(
            "video_llava/activitynet",
            tmp_path / "eval",
            MODEL=video_llava,
            JUDGE="tiny",
            OPENAI_BASE_URL=server.url,
            PYTHON=sys.executable,  # starts as users start it
        )
    assert outcome.status == 0, outcome.err
    assert "Judge: tiny" in outcome.out and "Average score: 4.000" in outcome.out
    assert len(list((folder / "tiny-video-llava/judge-tiny").glob("*.json"))) == 3


@pytest.mark.parametrize("name", IMAGES)
def test_published_flags_of_qwen(name):
    answering = commands(f"qwen2_5_vl/{name}")[0]
    values = {
        "--temperature": "0", "--layer_list": "[14]", "--image_token_ratio_list": "[0.333]",
        "--image_token_ratio": "0.300", "--basis_token_num": "10",
        "--model-path": "data/model/Qwen2.5-VL-7B-Instruct",
    }  # fmt: skip
    assert {key: flag(answering, key) for key in values} == values
    assert ("--single-pred-prompt" in answering) == (name in ("mmbench", "sqa"))
    assert "Qwen2.5-VL-7B-Instruct" in flag(answering, "--answers-file") and "--visual_token_num" not in answering
    without = commands(f"qwen2_5_vl/{name}", TOKENS="30")[0]
    assert flag(without, "--layer_list") == flag(without, "--image_token_ratio_list") == "[]"
    assert flag(without, "--image_token_ratio") == "0.300"
    assert "Instruct-apet-30" in flag(without, "--answers-file")
    whole = commands(f"qwen2_5_vl/{name}", TOKENS="none")[0]
    assert flag(whole, "--image_token_ratio") == "1.0" and flag(whole, "--layer_list") == "[]"


@pytest.mark.parametrize("name", VIDEOS)
def test_published_flags_of_video_llava(name):
    answering, scoring = commands(f"video_llava/{name}")
    folder = f"data/eval/GPT_Zero_Shot_QA/{VIDEOS[name][0]}_Zero_Shot_QA"
    values = {
        "--apet": "video_token_num=22", "--basis_token_num": "10", "--layer_list": "[]", "--conv-mode": "llava_v1",
        "--benchmark": name, "--video_dir": f"{folder}/{VIDEOS[name][1]}", "--question-file": f"{folder}/test_q.json",
        "--gt_file_answers": f"{folder}/test_a.json", "--answers-file": f"{folder}/Video-LLaVA-7B-hf/merge.jsonl",
    }  # fmt: skip
    assert {key: flag(answering, key) for key in values} == values
    assert flag(scoring, "--pred_path") == values["--answers-file"]
    whole = commands(f"video_llava/{name}", TOKENS="none")[0]
    assert "--apet" not in whole and flag(whole, "--layer_list") == "[]"


def test_budgets_from_the_environment():
    settings = {"VIDEO_TOKEN_NUM": "12", "LAYER_LIST": "[8]", "IMAGE_TOKEN_LIST": "[64]"}
    answering = commands("video_llava/msvd", **settings)[0]
    assert flag(answering, "--apet") == "video_token_num=12" and flag(answering, "--image_token_list") == "[64]"
    assert "Video-LLaVA-7B-hf-apet-v12-l8-t64-b10/" in flag(answering, "--answers-file")
    answering = commands("qwen2_5_vl/pope", IMAGE_TOKEN_RATIO="0.5")[0]
    assert flag(answering, "--image_token_ratio") == "0.5" and flag(answering, "--image_token_ratio_list") == "[0.333]"


def test_every_script_of_the_issue_is_there():
    assert all((ROOT / f"scripts/qwen2_5_vl/{name}.sh").is_file() for name in IMAGES)
    assert all((ROOT / f"scripts/video_llava/{name}.sh").is_file() for name in VIDEOS)
