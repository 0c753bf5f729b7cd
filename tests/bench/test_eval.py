"""`eval`: whole runs of the runner on a tiny checkpoint."""

import json
from pathlib import Path

from apet.bench import __main__ as program

GOLDEN = Path(__file__).parents[1] / "golden" / "end_to_end"


def test_runs_in_turns(tmp_path, capsys):
    folder = tmp_path / "gqa"
    folder.mkdir()
    (folder / "images").symlink_to(GOLDEN / "images")
    rows = [{"question_id": str(i), "image": "image_a.png", "text": "What?\nOne word."} for i in range(3)]
    (folder / "llava_gqa_testdev_balanced.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "testdev_balanced_questions.json").write_text("{}")
    words = ["--model-path", str(GOLDEN / "llava-v1.5-tiny"), "--data", str(tmp_path), "--limit", "2"]
    words += [
        "--repeats",
        "1",
        "--num_workers",
        "0",
        "--max_new_tokens",
        "2",
        "--device",
        "cpu",
        "--batch_size",
        "auto",
    ]
    assert program.main(["eval", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    none, random, ours = result["runs"]
    assert [run["visual_tokens"] for run in result["runs"]] == [576, 64, 64]
    assert none["speedup"]["median"] == 1 and random["share_of_random"] == 1
    assert ours["questions_per_second"]["median"] <= ours["answering_per_second"]["median"]


def test_data_that_is_not_there_is_one_line(tmp_path, capsys):
    assert program.main(["eval", "--data", str(tmp_path)]) == 1
    assert "is not there" in capsys.readouterr().err
