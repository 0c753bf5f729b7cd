"""A run that is killed, interrupted or runs out of space at any point: nothing lost, nothing twice, nothing silent."""

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest
from forking_python import forking_python
from PIL import Image

from apet.eval.interrupts import Terminated
from llava.eval import model_vqa_loader, program

QUESTIONS, POINTS, SEED = 60, 20, 15


class Site:
    """A folder with questions and pictures, and a driver that runs the program on them."""

    def __init__(self, folder: Path, questions: int = QUESTIONS) -> None:
        self.folder, self.questions = folder, questions
        (folder / "images").mkdir()
        for index in range(10):
            Image.new("RGB", (index + 3, 5)).save(folder / "images" / f"{index}.png")
        rows = []
        for index in range(questions):
            text = f"Question {index}?" + " long" * (index * 7 % 5)
            rows.append({"question_id": index // 2, "image": f"{index % 10}.png", "text": text})
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._driver = subprocess.Popen(
            [forking_python(), str(Path(__file__).with_name("fault_driver.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        self._driver.communicate()

    def run(self, answers: Path, *flags: str, **request) -> dict:
        """Run the program once; the reply of the driver and how many questions were asked."""
        argv = ["--question-file", self.folder / "questions.jsonl", "--image-folder", self.folder / "images"]
        argv += ["--answers-file", answers, "--temperature", "0", *flags]
        asked = self.folder / "asked"
        asked.write_text("")
        request |= {"argv": [str(word) for word in argv], "asked": str(asked), "log": str(self.folder / "log")}
        self._driver.stdin.write(json.dumps(request) + "\n")
        self._driver.stdin.flush()
        reply = json.loads(self._driver.stdout.readline())
        return reply | {"asked": len(asked.read_text())}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.close()


@pytest.fixture(scope="module")
def whole(site) -> bytes:
    """The answers of a run in one piece, without workers and batches."""
    path = site.folder / "whole.jsonl"
    reply = site.run(path, "--num_workers", "0")
    assert reply["status"] == 0 and reply["asked"] == QUESTIONS, reply
    return path.read_bytes()


def whole_lines(path: Path) -> int:
    """How many answers are in a file; each is a JSON object, but for a last one that was cut off."""
    content = path.read_bytes() if path.is_file() else b""
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    assert all("answer_id" in json.loads(line) for line in lines)
    return len(lines)


def record_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".run.json").read_text())


def check_complete(path: Path, expected: bytes) -> None:
    """The byte-equal file, a record with the counts of its answers, and nothing beside them."""
    assert path.read_bytes() == expected
    rows = [json.loads(line) for line in expected.splitlines()]
    counts, count = record_of(path)["counts"], len(rows)
    assert record_of(path)["status"] == "complete"
    assert (counts["answers"], counts["measured"], counts["with_visual"]) == (count, count, count)
    assert counts["new_tokens"] == sum(len(row["prompt"]) for row in rows)
    assert record_of(path)["layer_averaged_tokens"] == pytest.approx(
        sum(index % 10 + 3 for index in range(count)) / count
    )
    assert {one.name for one in path.parent.iterdir()} == {path.name, path.with_suffix(".run.json").name}


def finish(site: Site, path: Path, expected: bytes, *flags: str, **request) -> None:
    """Resume, and check that what was answered is not asked again."""
    before = whole_lines(path)
    reply = site.run(path, "--resume", *flags, **request)
    assert reply["status"] == 0 and "Traceback" not in reply["log"], reply
    assert reply["asked"] == len(expected.splitlines()) - before
    check_complete(path, expected)


WORKERS = ("--num_workers", "2", "--batch_size", "4")
ENDS = {signal.SIGKILL: (-9,), signal.SIGTERM: (143,), signal.SIGINT: (130,)}


def test_twenty_kills_at_random_points_end_in_the_same_file(site, whole, tmp_path):
    draw, reached = random.Random(SEED), []
    for point in range(POINTS):
        number = list(ENDS)[point % 3]
        path = tmp_path / str(point) / "answers.jsonl"
        target = "group" if number == signal.SIGINT else "process"  # as a terminal's Ctrl-C
        kill = [number, draw.randrange(QUESTIONS), draw.uniform(0.001, 0.05), target]
        reply = site.run(path, *WORKERS, kill=kill)
        assert reply["status"] in (0, *ENDS[number]), (point, reply)
        assert "Traceback" not in reply["log"], (point, reply)
        if reply["status"] > 0:
            last = reply["log"].strip().splitlines()[-1]
            assert "stopped; this goes on from here: python -m llava.eval.model_vqa_loader" in last
            assert last.endswith("--resume")
            if path.with_suffix(".run.json").is_file():
                assert record_of(path)["counts"]["answers"] == whole_lines(path)
        reached.append(whole_lines(path))
        finish(site, path, whole, *WORKERS)
    assert sum(0 < count < QUESTIONS for count in reached) >= POINTS // 2, reached


@pytest.fixture
def expected(whole) -> bytes:
    """The answers to the first questions."""
    return b"".join(whole.splitlines(keepends=True)[:4])


class TestEveryPoint:
    """The process ends before any line of the modules that write files, or in the middle of a line of a file."""

    FEW = ("--limit", "4", "--num_workers", "0", "--batch_size", "2")

    @pytest.mark.parametrize("before", ["nothing", "replaced", "continued"])
    def test_of_a_line_of_code(self, site, expected, tmp_path, before):
        draw = random.Random(before)
        path = tmp_path / "passed" / "answers.jsonl"
        lines = site.run(path, *self.FEW, *self.prepare(site, path, before), line=0)["lines"]
        for line in sorted(draw.sample(range(1, lines + 1), POINTS)):
            path = tmp_path / str(line) / "answers.jsonl"
            flags = self.prepare(site, path, before)
            old = path.read_bytes() if before == "replaced" else b""
            reply = site.run(path, *self.FEW, *flags, line=line)
            assert reply["status"] == 9 and "Traceback" not in reply["log"], (line, reply)
            if before == "replaced" and path.read_bytes() == old:
                # Still the old answers, all of them. They are refused as another run's, or replaced; never mixed.
                reply = site.run(path, *self.FEW, "--resume")
                if reply["status"] != 0:
                    assert "other settings" in reply["log"] and path.read_bytes() == old, reply
                    assert site.run(path, *self.FEW, "--overwrite")["status"] == 0
                check_complete(path, expected)
            else:
                finish(site, path, expected, *self.FEW)

    def prepare(self, site, path, before) -> list[str]:
        """What was there before the run that is killed, and the flag of that run."""
        if before == "replaced":  # answers of other settings
            assert site.run(path, *self.FEW, words=1)["status"] == 0
            return ["--overwrite"]
        if before == "continued":  # a finished run of fewer questions
            assert site.run(path, "--limit", "2", "--num_workers", "0")["status"] == 0
            return ["--resume"]
        return []

    @pytest.mark.parametrize("line", range(1, 9))
    def test_of_a_line_of_a_file(self, site, expected, tmp_path, line):
        path = tmp_path / "answers.jsonl"
        assert site.run(path, *self.FEW, half=line)["status"] == 9
        finish(site, path, expected, *self.FEW)


@pytest.fixture(scope="module")
def long(site) -> bytes:
    """Answers of 3 kB each."""
    path = site.folder / "long.jsonl"
    assert site.run(path, "--num_workers", "0", words=400)["status"] == 0
    return path.read_bytes()


class TestNoSpace:
    def test_a_file_that_the_system_refuses_keeps_whole_lines(self, site, long, tmp_path):
        path = tmp_path / "out" / "answers.jsonl"
        reply = site.run(path, *WORKERS, words=400, most=80_000)
        self.check_refused(reply, path)
        assert "File too large" in reply["log"]
        finish(site, path, long, *WORKERS, words=400)

    def test_a_full_disk(self, site, long, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a tmpfs of 1 MiB is not allowed here")
        try:
            (disk / "filling").write_bytes(b"x" * 800_000)
            path = disk / "run" / "answers.jsonl"
            reply = site.run(path, *WORKERS, words=400)
            self.check_refused(reply, path)
            assert "No space left on device" in reply["log"]
            (disk / "filling").unlink()
            finish(site, path, long, *WORKERS, words=400)
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def check_refused(self, reply: dict, path: Path) -> None:
        """One sentence, whole lines, and a record with the counts of exactly those."""
        last = reply["log"].strip().splitlines()[-1]
        assert reply["status"] == 1 and "Traceback" not in reply["log"], reply
        assert "cannot be written" in last and "what is in it stays valid" in last and "--resume" in last
        assert 0 < whole_lines(path) < QUESTIONS and path.read_bytes().endswith(b"\n")
        assert record_of(path)["counts"]["answers"] == record_of(path)["counts"]["measured"] == whole_lines(path)
        assert record_of(path)["status"] == "running"

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("images", ["is no file that answers can go to"]),
            ("/dev/full", ["is no file that answers can go to"]),
            ("questions.jsonl/answers.jsonl", ["cannot be written", "questions.jsonl"]),
            ("/proc/answers.jsonl", ["cannot be written", "/proc/answers.jsonl"]),
            ("a" * 300, ["cannot be written"]),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_a_target_that_cannot_be_one(self, site, name, words):
        reply = site.run(site.folder / name)
        (line,) = reply["log"].strip().splitlines()
        assert reply["status"] == 1 and all(word in line for word in words), line


def test_a_worker_that_is_ended_from_outside_is_one_line(site, whole, tmp_path):
    rows = (site.folder / "questions.jsonl").read_text().splitlines()
    rows[30] = json.dumps(json.loads(rows[30]) | {"image": "fatal.png"})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(row + "\n" for row in rows))
    path = tmp_path / "out" / "answers.jsonl"
    reply = site.run(path, *WORKERS, "--question-file", str(questions))
    last = reply["log"].strip().splitlines()[-1]
    assert reply["status"] == 1 and "Traceback" not in reply["log"], reply
    assert "prepares pictures was ended from outside" in last and "--num_workers 2" in last
    assert record_of(path)["counts"]["answers"] == whole_lines(path)


def test_ids_that_are_numbers_and_texts_are_one_line(site, tmp_path):
    rows = [
        {"question_id": key, "image": "0.png", "text": f"Which, {number}?"} for number, key in enumerate((1, 2, "1"))
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reply = site.run(tmp_path / "answers.jsonl", "--question-file", str(questions))
    (line,) = reply["log"].strip().splitlines()
    assert reply["status"] == 1 and "question_id 1 and question_id '1' are one id to the scorers" in line
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_stop_while_the_model_is_loaded_says_how_to_go_on(site, tmp_path, capsys, monkeypatch, flag, stop, status):
    def interrupted(args):
        raise stop

    monkeypatch.setattr(program, "_local_answerer", interrupted)
    given = ["--question-file", str(site.folder / "questions.jsonl"), "--answers-file", str(tmp_path / "my answers")]
    assert program.main(model_vqa_loader.parser(), [*given, *([flag] if flag == "--overwrite" else [])]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--answers-file '{tmp_path}/my answers' {flag}")
    assert "stopped; this goes on from here: python -m llava.eval.model_vqa_loader --question-file" in line
