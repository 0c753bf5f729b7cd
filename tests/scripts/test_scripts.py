"""Every benchmark script from start to score on a miniature of its data set, and what happens when something fails."""

import ast
import importlib.util
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forking_python import forking_python

from apet.eval.benchmarks import get_benchmark
from apet.eval.recipes import FAMILIES
from llava.conversation import conv_templates

from .conftest import (
    MODEL,
    ROOT,
    SHORT,
    benchmark_scripts,
    kill_group,
    picture,
    read_lines,
    run_script,
    script_environment,
    start_script,
    write_miniature,
)

MODEL_16 = ROOT / "tests/golden/end_to_end/llava-v1.6-vicuna-tiny"
STARTED = (("llava1_5", "gqa"), ("llava1_5", "mmbench"), ("llava1_5", "sqa"))
NINE = ("gqa", "mmbench", "mmbench_cn", "mme", "pope", "sqa", "textvqa", "vizwiz", "vqav2")
GQA_RUN = "gqa/answers/llava_gqa_testdev_balanced"
VQAV2_SPLIT = "llava_vqav2_mscoco_test-dev2015"

# --- runs with a real (tiny) checkpoint -------------------------------------------------------------------------------


def run_benchmark(family: str, name: str, folder: Path) -> dict:
    """Run one benchmark script; answers go to OUT, beside a data folder that is left as it was."""
    data = write_miniature(folder / "eval")
    official(data / "gqa/eval.py", "--predictions")
    official(data / "MME/eval_tool/calculation.py", "--results_dir")
    before = sorted(path for path in data.rglob("*"))
    # One benchmark of every program starts as users start it.
    settings = {"OUT": folder / "out"} | ({"PYTHON": sys.executable} if (family, name) in STARTED else {})
    if family == "llava1_6":
        settings |= {"MODEL": MODEL_16, "LAYER_LIST": "[4]", "EXPERIMENT": MODEL_16.name}
    outcome = run_script(f"{family}/{name}", data, **settings)
    assert sorted(path for path in data.rglob("*")) == before
    return {"outcome": outcome, "out": folder / "out"}


def official(path: Path, flag: str) -> None:
    """A stand-in for an official scorer: reads what `flag` names and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "import pathlib, sys\n"
        f"place = pathlib.Path(sys.argv[sys.argv.index('{flag}') + 1].replace('{{tier}}', 'testdev_balanced'))\n"
        "print('official', len(list(place.iterdir())) if place.is_dir() else len(place.read_text()) > 10)\n"
    )


@pytest.mark.parametrize("name", NINE)
def test_llava1_5_to_its_score_or_upload(name, tmp_path):
    check_end(run_benchmark("llava1_5", name, tmp_path), name, MODEL.name)


@pytest.mark.skipif(not MODEL_16.is_dir(), reason="no tiny LLaVA-1.6 checkpoint in tests/golden")
@pytest.mark.parametrize("name", NINE)
def test_llava1_6_to_its_score_or_upload(name, tmp_path):
    result = run_benchmark("llava1_6", name, tmp_path)
    check_end(result, name, MODEL_16.name)
    if name == "textvqa":
        prompts = {row["prompt"] for row in read_lines(result["out"] / f"textvqa/answers/{MODEL_16.name}.jsonl")}
        assert prompts == {text + SHORT for text in ("what does it say?", "which number?", "what brand?")}


def check_end(result: dict, name: str, experiment: str) -> None:
    """The script succeeded, printed its score, and its files are those of a complete run."""
    outcome, printed, answers, score = result["outcome"], *ENDS[name](experiment)
    assert outcome.status == 0, outcome.err
    assert all(words in outcome.out for words in printed), outcome.out
    record = json.loads((result["out"] / answers).with_suffix(".run.json").read_text())
    assert record["status"] == "complete" and record["counts"]["answers"] == len(read_lines(result["out"] / answers))
    assert record["settings"]["generation"]["temperature"] == 0
    if experiment == MODEL.name:
        vision, llm = (96, 32) if name == "gqa" else (288, 96)
        assert record["layer_averaged_tokens"] == pytest.approx((vision * 16 + llm * 4) / 20)
    scores = list(result["out"].rglob("*.score.json"))
    assert scores == ([result["out"] / score] if score.endswith(".score.json") else [])
    assert (result["out"] / score).stat().st_size > 10
    if not scores:
        rows = json.loads((result["out"] / score).read_text())
        assert [row.get("question_id", row.get("image")) for row in rows] == UPLOADED[name]
        assert all(row["answer"] == "" for row in rows if row.get("question_id") in (0, 4))


def _in_folder(folder: str, *printed: str, split: str = "") -> Callable:
    answers = f"{folder}/answers{split}"
    return lambda name: (printed, f"{answers}/{name}.jsonl", f"{answers}/{name}.score.json")


def _mmbench(split: str) -> Callable:
    return _in_folder("mmbench", "Circular accuracy: ", "(2 questions)", ".xlsx", split=f"/{split}")


# name -> (texts printed, answers file, score or upload file), below OUT and for an experiment's name
ENDS = {
    "gqa": lambda name: (
        ("Accuracy: ", "questions)", "official True"), f"{GQA_RUN}/{name}/merge.jsonl",
        f"{GQA_RUN}/{name}/merge.score.json",
    ),
    "pope": _in_folder("pope", "Mean of random, popular, adversarial: F1"),
    "textvqa": _in_folder("textvqa", "Samples: 3\nAccuracy: "),
    "mme": _in_folder("MME", "=== Perception", "=== Cognition", "official 14"),
    "sqa": _in_folder("scienceqa", "Total: 3", "IMG-Accuracy: "),
    "mmbench": _mmbench("mmbench_dev_20230712"),
    "mmbench_cn": _mmbench("mmbench_dev_cn_20231003"),
    "vizwiz": lambda name: (
        ("total results: 3, total split: 3, error_line: 0",), f"vizwiz/answers/{name}.jsonl",
        f"vizwiz/answers_upload/{name}.json",
    ),
    "vqav2": lambda name: (
        ("total results: 3, total split: 5",), f"vqav2/answers/{VQAV2_SPLIT}/{name}/merge.jsonl",
        f"vqav2/answers_upload/{VQAV2_SPLIT}/{name}.json",
    ),
}  # fmt: skip
UPLOADED = {"vizwiz": [f"VizWiz_test_{index:08d}.jpg" for index in range(3)], "vqav2": list(range(5))}


@pytest.fixture(scope="module")
def repaired(tmp_path_factory) -> dict:
    """A chunk that cannot open its last image; the image is put there; second start."""
    data = write_miniature(tmp_path_factory.mktemp("repaired") / "eval")
    image, answers = data / "gqa/images/n2.jpg", data / GQA_RUN / MODEL.name
    image.unlink()
    first = run_script("llava1_5/gqa", data, CHUNKS=2, BATCH_SIZE=1)
    files = {path.name for path in answers.iterdir()}
    kept = read_lines(answers / "merge.2_0.jsonl") + read_lines(answers / "merge.2_1.jsonl")
    picture(2).save(image)
    second = run_script("llava1_5/gqa", data, CHUNKS=2)
    return {"first": first, "files": files, "kept": kept, "second": second, "answers": answers}


def test_a_failed_chunk_stops_the_run_unscored_and_a_second_start_completes_it(repaired):
    first, second = repaired["first"], repaired["second"]
    assert first.status == 1 and "Accuracy" not in first.out
    assert "chunk 1 of 2" in first.err and "n2.jpg does not exist" in first.err and "Traceback" not in first.err
    assert "nothing was scored" in first.err and "start the same command again" in first.err
    assert not {"merge.jsonl", "merge.score.json", "testdev_balanced_predictions.json"} & repaired["files"]
    assert second.status == 0 and "Accuracy" in second.out, second.err
    rows = read_lines(repaired["answers"] / "merge.jsonl")
    assert len(repaired["kept"]) == 4 and all(row in rows for row in repaired["kept"])


def test_two_chunks_give_the_answers_and_score_of_one(repaired, tmp_path):
    assert "2 processes; logs: " in repaired["second"].out and "joined 2 chunks" in repaired["second"].out
    alone = run_benchmark("llava1_5", "gqa", tmp_path)["out"] / GQA_RUN / MODEL.name
    texts = [
        [(row["question_id"], row["text"]) for row in read_lines(folder / "merge.jsonl")]
        for folder in (alone, repaired["answers"])
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 6
    scores = [json.loads((folder / "merge.score.json").read_text()) for folder in (alone, repaired["answers"])]
    assert scores[0] == scores[1]
    assert {path.name for path in repaired["answers"].glob("merge.2_*")} == {
        f"merge.2_{index}.{kind}" for index in (0, 1) for kind in ("jsonl", "run.json", "log")
    }


def test_a_killed_run_goes_on_and_answers_nothing_twice(data):
    questions = data / "gqa/llava_gqa_testdev_balanced.jsonl"
    rows = read_lines(questions)
    # Repeated under other ids, so that the run is still going on when it is killed; those are not scored.
    many = [
        row | {"question_id": f"{row['question_id']}-{turn}" if turn else row["question_id"]}
        for turn in range(8)
        for row in rows
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in many))
    process = start_script("llava1_5/gqa", data, "--max_new_tokens", "2", BATCH_SIZE=1)
    answers = data / GQA_RUN / MODEL.name / "merge.jsonl"
    wait_for(lambda: answers.is_file() and answers.read_bytes().count(b"\n") >= 5, process)
    kill_group(process)
    process.communicate()
    kept = [json.loads(line) for line in answers.read_bytes().split(b"\n")[:5]]
    second = run_script("llava1_5/gqa", data)
    assert second.status == 0, second.err
    rows = read_lines(answers)
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in many]
    assert rows[:5] == kept and len({row["answer_id"] for row in rows}) == len(rows)
    assert "Accuracy" in second.out


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until something has happened while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_limited_run_is_not_scored(data):
    outcome = run_script("llava1_5/textvqa", data, "--limit", "2", TOKENS=64, OCR=0)
    assert outcome.status == 0 and "not scored: --limit" in outcome.out, outcome.err
    rows = read_lines(data / f"textvqa/answers/{MODEL.name}-apet-64-ocr0.jsonl")
    assert len(rows) == 2 and "OCR" not in rows[0]["prompt"]
    assert list(data.rglob("*.score.json")) == []


def test_answers_of_other_settings_and_of_a_running_script_are_left_alone(data):
    assert run_script("llava1_5/gqa", data).status == 0
    answers = data / GQA_RUN / MODEL.name
    second = run_script("llava1_5/gqa", data, "--visual_token_num", "48")
    assert second.status == 1 and "other settings" in second.err
    assert "EXPERIMENT=<name>" in second.err and "Accuracy" not in second.out
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from apet.eval.file_lock import FileLock\n"
         "with FileLock(Path(sys.argv[1])): print(flush=True); input()", str(answers / "merge.jsonl")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    holder.stdout.readline()
    third = run_script("llava1_5/gqa", data)
    holder.communicate(b"\n")
    assert third.status == 1 and "another run is writing" in third.err
    assert f"process {holder.pid} on " in third.err
    fourth = run_script("llava1_5/gqa", data, "--visual_token_num", "48", "--overwrite")
    assert fourth.status == 0 and "Accuracy" in fourth.out, fourth.err
    record = json.loads((answers / "merge.run.json").read_text())
    assert record["settings"]["compression"]["visual_token_num"] == 48


# --- command lines only -----------------------------------------------------------------------------------------------


def commands(name: str, *arguments: str, **settings: object) -> list[list[str]]:
    """The commands a script would run."""
    defaults = {"DRY_RUN": 1, "DATA": "data/eval", "MODEL": "", "NUM_WORKERS": "", "BATCH_SIZE": "", "DEVICE": ""}
    defaults["PYTHON"] = forking_python()
    script = ["bash", str(ROOT / f"scripts/{name}.sh"), *arguments]
    done = subprocess.run(
        script,
        env=script_environment(ROOT, **defaults | settings),
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if line and not line.startswith("==")]


def flag(command: list[str], name: str) -> str:
    """Value of a flag; the last one counts, as it does for the programs."""
    return command[len(command) - 1 - command[::-1].index(name) + 1]


SCRIPTS = list(benchmark_scripts())


def test_both_families_have_the_nine_scripts():
    assert {(family, name) for family in ("llava1_5", "llava1_6") for name in NINE} <= set(SCRIPTS)


@pytest.mark.parametrize(("family", "name"), SCRIPTS, ids="/".join)
def test_a_script_names_its_family_a_known_benchmark_and_modules(family, name):
    path = ROOT / f"scripts/{family}/{name}.sh"
    assert path.stat().st_mode & stat.S_IXUSR and name in FAMILIES[family].benchmarks
    assert f"eval {family} {name} " in path.read_text()
    assert len(path.read_text().splitlines()) == 2
    steps = commands(f"{family}/{name}")
    answering = next(command for command in steps if "--answers-file" in command)
    get_benchmark(flag(answering, "--benchmark") if "--benchmark" in answering else "scienceqa")
    assert flag(answering, "--temperature") == "0" and flag(answering, "--conv-mode") in conv_templates
    assert "--resume" in answering and flag(answering, "--num-chunks") == "1"
    layers = {"qwen2_5_vl": [14], "video_llava": []}.get(family, [16])
    assert ast.literal_eval(flag(answering, "--layer_list")) == layers
    for command in steps:
        if command[1] == "-m":
            assert importlib.util.find_spec(command[2]) is not None
        else:
            assert (ROOT / command[1]).is_file()


PUBLISHED = {
    "llava1_5": {None: (288, 96), "192": (288, 96), "128": (192, 64), "64": (96, 32), "none": (576, None)},
    "llava1_6": {None: (192, 320), "640": (192, 320), "320": (96, 160), "160": (48, 80), "none": (576, None)},
}
DEFAULT_BUDGETS = {("llava1_5", "gqa"): (96, 32), ("llava1_6", "vqav2"): (96, 160)}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in PUBLISHED for name in ("gqa", "pope", "vqav2")]
)
def test_published_budgets(family, name):
    for tokens, (vision, llm) in PUBLISHED[family].items():
        settings = {} if tokens is None else {"TOKENS": tokens}
        if tokens is None:
            vision, llm = DEFAULT_BUDGETS.get((family, name), (vision, llm))
        command = commands(f"{family}/{name}", **settings)[0]
        assert flag(command, "--visual_token_num") == str(vision)
        assert flag(command, "--image_token_list") == ("[]" if llm is None else f"[{llm}]")
        assert flag(command, "--basis_token_num") == "10" and flag(command, "--method") == "apet"
        model = {"llava1_5": "llava-v1.5-7b", "llava1_6": "llava-v1.6-vicuna-7b"}[family]
        suffix = {None: "", "none": "-none"}.get(tokens, f"-apet-{tokens}")
        assert (
            f"/{model}{suffix}" in flag(command, "--answers-file")
            and flag(command, "--model-path") == f"data/model/{model}"
        )


def test_the_published_accounting_has_the_published_flags():
    command = commands("llava1_6/pope", COMPAT="published")[0]
    assert flag(command, "--image_token_list") == "[64]" and flag(command, "--apet") == "compat=published"


def test_everything_comes_from_the_environment():
    settings = {
        "MODEL": "x/y/model", "DATA": "/d", "OUT": "/o", "IMAGE_FOLDER": "/i", "EXPERIMENT": "mine", "METHOD": "random",
        "VISUAL_TOKEN_NUM": 100, "LAYER_LIST": "[8, 16]", "IMAGE_TOKEN_LIST": "[50, 20]", "BASIS_TOKEN_NUM": 7,
        "BATCH_SIZE": 4, "NUM_WORKERS": 2, "DTYPE": "bf16", "DEVICE": "cuda:1", "CONV_MODE": "llava_v1",
    }  # fmt: skip
    answering, scoring = commands("llava1_5/pope", "--top_p", "0.9", **settings)
    values = {
        "--model-path": "x/y/model", "--question-file": "/d/pope/llava_pope_test.jsonl", "--image-folder": "/i",
        "--answers-file": "/o/pope/answers/mine.jsonl", "--method": "random", "--visual_token_num": "100",
        "--layer_list": "[8, 16]", "--image_token_list": "[50, 20]", "--basis_token_num": "7", "--batch_size": "4",
        "--num_workers": "2", "--dtype": "bf16", "--device": "cuda:1", "--conv-mode": "llava_v1", "--top_p": "0.9",
    }  # fmt: skip
    assert {name: flag(answering, name) for name in values} == values
    assert (
        flag(scoring, "--result-file") == "/o/pope/answers/mine.jsonl"
        and flag(scoring, "--annotation-dir") == "/d/pope/coco"
    )


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "llava-v1.5-7b"),
        ({"TOKENS": "128"}, "llava-v1.5-7b-apet-128"),
        ({"TOKENS": "none"}, "llava-v1.5-7b-none"),
        ({"METHOD": "random"}, "llava-v1.5-7b-random-192"),
        ({"LAYER_LIST": "[8, 16]", "IMAGE_TOKEN_LIST": "[50, 20]"}, "llava-v1.5-7b-apet-v288-l8+16-t50+20-b10"),
        ({"TOKENS": "64", "BASIS_TOKEN_NUM": "5"}, "llava-v1.5-7b-apet-v96-l16-t32-b5"),
        ({"MODEL": "owner/llava-x"}, "llava-x"),
        ({"OCR": "0"}, "llava-v1.5-7b-ocr0"),
        ({"COMPAT": "published"}, "llava-v1.5-7b-published"),
        ({"OCR": "1"}, "llava-v1.5-7b"),
        ({"OCR": "0", "EXPERIMENT": "mine", "TOKENS": "64"}, "mine"),
    ],
    ids=str,
)
def test_runs_of_other_settings_have_other_names(settings, name):
    answering = commands("llava1_5/textvqa", **settings)[-2]
    assert flag(answering, "--answers-file") == f"data/eval/textvqa/answers/{name}.jsonl"


@pytest.mark.parametrize(
    ("gpus", "chunks", "expected"),
    [("0", None, [None]), ("", "2", [None, None]), ("3,5", None, ["3", "5"]), ("0,1,2,3", "2", ["0,1", "2,3"]),
     ("0,1,2", "2", ["0", "1,2"]), ("4,6", "3", ["4", "6", "4"]), ("0,1", "1", [None])],
)  # fmt: skip
def test_chunks_and_their_gpus(gpus, chunks, expected):
    settings = {"CUDA_VISIBLE_DEVICES": gpus} | ({"CHUNKS": chunks} if chunks else {})
    steps = [command for command in commands("llava1_5/pope", **settings) if "--num-chunks" in command]
    chosen = [command[1].split("=")[1] if command[0] == "env" else None for command in steps]
    assert chosen == expected
    assert [(flag(command, "--num-chunks"), flag(command, "--chunk-idx")) for command in steps] == [
        (str(len(expected)), str(index)) for index in range(len(expected))
    ]
    assert len({flag(command, "--answers-file") for command in steps}) == len(expected)


@pytest.mark.parametrize(("depth", "layer"), [(12, "[6]"), (16, "[8]"), (17, "[16]"), (40, "[16]")])
def test_a_shallow_checkpoint_is_cut_behind_its_middle_layer(tmp_path, depth, layer):
    stored = {"num_hidden_layers": depth} if depth % 2 else {"text_config": {"num_hidden_layers": depth}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    answering = next(command for command in commands("llava1_5/pope", MODEL=str(tmp_path)) if "--layer_list" in command)
    assert flag(answering, "--layer_list") == layer


def test_a_broken_config_is_named(data, tmp_path):
    (tmp_path / "config.json").write_text("{")
    outcome = run_script("llava1_5/textvqa", data, MODEL=str(tmp_path))
    assert outcome.status == 1 and outcome.err.startswith(f"error: {tmp_path}/config.json is not JSON")


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ((), {"TOKENS": "63"}, ["TOKENS=63", "192, 128, 64, or none"]),
        ((), {"CHUNKS": "0"}, ["CHUNKS=0"]),
        ((), {"MODEL": "data/model/nowhere"}, ["checkpoint not found: data/model/nowhere", "data/README.md"]),
        ((), {"DATA": "/nowhere"}, ["/nowhere/textvqa/llava_textvqa_val_v051_ocr.jsonl", "apet check-data"]),
        ((), {"OCR": "yes"}, ["OCR=yes"]),
        (("--answers_file", "x"), {}, ["--answers_file", "EXPERIMENT"]),
        (("--question-file=x",), {}, ["--question-file", "SPLIT"]),
        (("--chunk-idx", "1"), {}, ["CHUNKS"]),
        (("--model-path", "x"), {}, ["MODEL"]),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_runs(data, arguments, settings, words):
    outcome = run_script("llava1_5/textvqa", data, *arguments, **settings)
    assert outcome.status == 1 and outcome.err.startswith("error: ") and all(word in outcome.err for word in words)
    assert not (data / "textvqa/answers").exists() and outcome.out == ""


# --- chunk processes, with a stand-in for the model -------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """An interpreter that runs a stand-in for the answering program, and everything else for real."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "index = sys.argv[sys.argv.index('--chunk-idx') + 1]\n"
        "print(f'step 1\\rstep 2 of chunk {index}', flush=True)\n"
        "open(os.environ['MARKS'] + index, 'w').write(str(os.getpid()))\n"
        "if index == os.environ.get('FAILS'):\n"
        "    sys.exit('loading went wrong')\n"
        "time.sleep(float(os.environ['SECONDS_TO_RUN']))\n"
    )
    python = tmp_path / "python"
    real = shlex.quote(sys.executable)
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *llava.eval.model_*) exec {real} {program} "$@" ;; *) exec {real} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    return python


def alive(mark: Path) -> bool:
    """Whether the process that left a mark still runs."""
    try:
        os.kill(int(mark.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_a_failure_is_told_at_once_and_the_others_go_on(data, stand_in, tmp_path):
    settings = {"PYTHON": stand_in, "MARKS": tmp_path / "mark", "SECONDS_TO_RUN": 3, "FAILS": 1, "CHUNKS": 3}
    process = start_script("llava1_5/pope", data, **settings)
    lines = [process.stderr.readline() for _ in range(4)]
    assert process.poll() is None and alive(tmp_path / "mark0") and alive(tmp_path / "mark2")
    assert "chunk 1 of 3" in lines[0]
    assert lines[1:] == ["step 1\n", "step 2 of chunk 1\n", "loading went wrong\n"]
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "nothing was scored" in error


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_stopped_script_stops_its_processes(data, stand_in, tmp_path, sent, chunks):
    process = start_script(
        "llava1_5/pope", data, PYTHON=stand_in, MARKS=tmp_path / "mark", SECONDS_TO_RUN=60, CHUNKS=chunks
    )
    marks = [tmp_path / f"mark{index}" for index in range(chunks)]
    wait_for(lambda: all(mark.is_file() and mark.read_text() for mark in marks), process, 30)
    process.send_signal(sent)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 130 and "goes on from here" in error
    assert not any(alive(mark) for mark in marks)


def test_an_unfinished_run_in_other_chunks_is_pointed_out(data, stand_in, tmp_path):
    settings = {"PYTHON": stand_in, "MARKS": tmp_path / "mark", "SECONDS_TO_RUN": 0, "FAILS": 0}
    answers = data / "pope/answers"
    answers.mkdir()
    (answers / f"{MODEL.name}.4_0.jsonl").write_text("")
    process = start_script("llava1_5/pope", data, **settings, CHUNKS=2)
    assert "CHUNKS=4 goes on with its answers" in process.communicate(timeout=30)[1]


# --- the shell files themselves ---------------------------------------------------------------------------------------

SHELL_FILES = sorted((ROOT / "scripts").rglob("*.sh"))


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_syntax(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(
        ["shellcheck", "-x", "-P", "SCRIPTDIR", "-S", "warning", *SHELL_FILES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
